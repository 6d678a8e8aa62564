"""The gated biased network: easy samples are answered by a kernel regression and skip most of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..index import Engine
from .base import positive
from .dense_objective import DenseObjective
from .evidence import Neighbors
from .gate import Gate
from .projectors import build_projector
from .registry import register_head
from .trust import TrustedRegressionHead


@dataclass(frozen=True)
class Gated:
    """What a batch answered and how.

    Attributes:
        log_probs: (B, C) log-probabilities.
        gate: (B,) the gate's value g, from 0 to 1.
        skipped: (B,) bool, True where f2 was not asked.
    """

    log_probs: Tensor
    gate: Tensor
    skipped: Tensor


@register_head("biased")
class BiasedHead(TrustedRegressionHead):
    """Kernel regression where a gate trusts it, the rest of the network elsewhere (review, equation 14).

    ``h = f1(x)``, ``phi = p(h)``, ``z1 = sum_i z_i k(phi, phi_i) / sum_i k(phi, phi_i)`` over the k nearest stored
    phi_i, ``z2 = f2(h)``, g a mean kernel with a width of its own, ``z = g z1 + (1 - g) z2``,
    ``y = clf(z)``. In evaluation rows with g at or above the threshold have ``z = z1``, and a model cut in two by
    ``attach_head(model, "biased", at=...)`` does not run f2 on them.

    The network is trained first, by the cross-entropy of ``clf(z2)``, as with a dense head; beside it the projector by
    the cross-entropy of a linear layer, whose gradient stops at h. Then, with f1, f2 and clf frozen, `gate_loss` goes
    on training the projector, and the gate (`nnheads.fit_gate`; `nnheads.fit` ends with it). The gate earns its trust:
    g is trained to be the probability that z1 is answered as the whole network would answer, which is what skipping f2
    puts at risk. Its kernel compares codes, the roots of the class probabilities of the projector's linear layer (see
    `Gate`). Its gradient does not reach the projector, which it would make a worse classifier. At each refresh, on
    samples that taught neither projector nor gate, the exponent and the threshold of g are chosen with which
    most samples skip while accuracy falls, with a standard error, by no more than ``tolerance``.

    Embeddings (B, in_features) are phi and z2 side by side. Without a projector both are the whole embedding: the head
    works on any backbone, and there is nothing to skip. Classes that the classifier was not trained on are answered by
    the share of their samples in the kernel regression's weights; classes without a stored sample are not answered.

    Args:
        in_features: width of the embeddings, the projection's included.
        num_classes: number of classes C.
        projector: the projector as `build_projector` takes it, or a module, with ``dim``; None for none.
        dim: width of the projection where the projector is a module.
        k: number of neighbours.
        sigma: width of the regression's kernel: a number or ``"auto"``, chosen at each refresh.
        gate_sigma: width of the gate's kernel: ``"learned"`` or a number; codes are at most the root of 2 apart.
        threshold: g from which f2 is skipped, above 1 for never; ``"auto"`` chooses it at each refresh.
        tolerance: accuracy that may be lost to skipping, as a share, for ``threshold="auto"``.
        per_class: samples of each class that a refresh keeps as centers; None keeps all.
        holdout: share of the samples, by id, that teach neither projector nor gate and choose the threshold.
        gate_epochs: passes over the data with which `nnheads.fit` trains projector and gate at its end.
        normalize: scale projections to unit length.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
    """

    differentiable = True
    trains_with = "objective"
    evidence_scale = "logit"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        projector: Mapping[str, Any] | nn.Module | None = None,
        dim: int | None = None,
        k: int = 16,
        sigma: float | Literal["auto"] = "auto",
        gate_sigma: float | Literal["learned"] = "learned",
        threshold: float | Literal["auto"] = "auto",
        tolerance: float = 0.005,
        per_class: int | None = 200,
        holdout: float = 0.1,
        gate_epochs: int = 3,
        normalize: bool = False,
        engine: Engine = "auto",
    ) -> None:
        spec: Mapping[str, Any] | None = (
            {"kind": "module", "dim": dim} if isinstance(projector, nn.Module) else projector
        )
        projected = int(spec.get("dim") or 0) if spec is not None else 0
        super().__init__(
            in_features,
            num_classes,
            projected=projected,
            k=k,
            sigma=sigma,
            per_class=per_class,
            normalize=normalize,
            engine=engine,
        )
        positive("biased", "gate_epochs", gate_epochs, integer=True, zero=True)
        self.spec = dict(spec) if spec is not None else None
        self.projector = projector if isinstance(projector, nn.Module) else build_projector(spec) if spec else None
        self.gate_epochs = gate_epochs
        self.gate = Gate(gate_sigma, threshold, tolerance, holdout)
        self.classifier = DenseObjective(in_features - projected, num_classes)
        self.auxiliary = DenseObjective(projected, num_classes) if projected else None

    def config(self) -> dict[str, Any]:
        return {
            "projector": self.spec,
            "k": self.k,
            "sigma": self.width.sigma,
            "gate_sigma": self.gate.sigma,
            "threshold": self.gate.option,
            "tolerance": self.gate.tolerance,
            "per_class": self.per_class,
            "holdout": self.gate.holdout,
            "gate_epochs": self.gate_epochs,
            "normalize": self.normalize,
            "engine": self.engine,
        }

    # ---- answering -----------------------------------------------------------------------------------------------

    def project(self, h: Tensor) -> Tensor:
        """Features h of f1, (B, ...), to projections (B, projected)."""
        if self.projector is None:
            raise ConfigError("head 'biased' has no projector: attach_head(model, 'biased', at=...) gives it one")
        own = next(self.projector.parameters(), None)
        if own is not None and h.is_floating_point() and not torch.is_autocast_enabled(h.device.type):
            h = h.to(own.dtype)  # the projector stays in float32 where its network is cast to half precision
        projected: Tensor = self.projector(h)
        return projected

    def gated(self, h: Tensor, f2: Callable[[Tensor], Tensor], *, ids: Tensor | None = None) -> Gated:
        """Answers with conditional compute: f2 sees only the rows whose gate is below the threshold.

        Args:
            h: (B, ...) features of f1.
            f2: from rows of h to embeddings (n, d).
            ids: as in `forward`.
        """
        phi = self.project(h)
        given = self._check_ids(ids, len(h))
        if not bool(torch.isfinite(phi).all()):
            raise ShapeError("head 'biased': projections hold NaN or infinity; check the input")
        if not len(self.memory):
            out = self._uniform(phi.detach())
            return Gated(out, out.new_zeros(len(out)), torch.zeros(len(out), dtype=torch.bool, device=out.device))
        with torch.autocast(h.device.type, enabled=False):
            phi = phi if phi.dtype == torch.float64 else phi.float()
            z, g, votes = self._regression(self._embed(phi.to(self.memory.keys.dtype)), given)
        skipped = g >= self.gate.threshold
        rows = (~skipped).nonzero().squeeze(1)
        if len(rows):
            z2 = f2(h if len(rows) == len(h) else h[rows])
            if not bool(torch.isfinite(z2).all()):
                raise ShapeError("head 'biased': embeddings hold NaN or infinity; check the input")
            z = z.index_copy(0, rows, torch.lerp(z2.to(z.dtype), z[rows], g[rows].unsqueeze(-1)))
        with torch.autocast(h.device.type, enabled=False):
            return Gated(self.calibrated(self._answer(z, votes)).to(phi.dtype), g, skipped)

    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        if not len(self.memory):
            return self._uniform(z)
        z = z.to(self.memory.keys.dtype)
        z1, g, votes = self._regression(self._embed(z), ids)
        mixed = torch.lerp(self._second(z), z1, g.unsqueeze(-1))
        if not self.training:
            mixed = torch.where((g >= self.gate.threshold).unsqueeze(-1), z1, mixed)
        return self._answer(mixed, votes)

    def _shares(self, z: Tensor, found: Neighbors, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A neighbour contributes what the classifier makes of its z_i, times its weight and the gate, to the logits (g
        counts as one where f2 is skipped); the rest is from f2, the biases and the normalization."""
        given = self._check_ids(ids, len(z))
        log_probs = self._log_probs(z, given).to(z.dtype)
        if not len(self.memory):
            return z.new_zeros(*found.rows.shape, self.num_classes), log_probs
        phi = self._embed(z.to(self.memory.keys.dtype))
        gate = self._regression(phi, given)[1]
        gate = gate.masked_fill(gate >= self.gate.threshold, 1)
        weights = found.weights * gate.unsqueeze(-1)
        values = self.memory.column("z")[found.rows.clamp_min(0)] @ self.classifier.layer.weight.T
        shares = (weights.unsqueeze(-1) * values).to(z.dtype)
        return shares, log_probs - shares.sum(1)
