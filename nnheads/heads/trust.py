"""A kernel regression, a classifier, and a gate that learns where the first can stand in for the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import squared_distances
from .dense_objective import DenseObjective
from .gate import SHARPNESS, Gate, Verdicts, held_out
from .regression import Near, RegressionHead

_FLOOR = 1e-6
"""Probability that is spread over all classes where some are not answered, so that their log-loss is finite."""


class TrustedRegressionHead(RegressionHead):
    """A regression with the gate that says when to trust it, and how both are trained. Abstract.

    Attributes:
        gate: see `Gate`.
        classifier: answers for embeddings of the network, z2, and for those regressed, z1.
        auxiliary: answers for projections; None where there is no projector.
    """

    gate: Gate
    classifier: DenseObjective
    auxiliary: DenseObjective | None
    _gating = False

    # ---- training ------------------------------------------------------------------------------------------------

    @property
    def gating(self) -> bool:
        """Whether `loss` is `gate_loss` for now, see `training_the_gate`."""
        return self._gating

    @contextmanager
    def training_the_gate(self) -> Iterator[None]:
        """`loss` is `gate_loss` and the classifier is frozen as long as this lasts."""
        frozen = [(p, p.requires_grad) for p in self.classifier.parameters()]
        self._gating = True
        for p, _ in frozen:
            p.requires_grad_(False)
        try:
            yield
        finally:
            self._gating = False
            for p, needed in frozen:
                p.requires_grad_(needed)

    def loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of the network's answer and of the projector's linear layer; arguments as in `Head.loss`."""
        if self._gating:
            return self.gate_loss(z, y, ids=ids)
        z = self._check(z)
        self._check_labels(y, len(z))
        given = self._check_ids(ids, len(z))
        with torch.autocast(z.device.type, enabled=False):
            loss: Tensor = self.classifier(self._second(z), y)
            return loss + self._auxiliary_loss(z, y, held_out(given, len(z), self.gate.holdout))

    def gate_loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """What teaches projector and gate once the network is trained; the gate needs a filled memory.

        The cross-entropy of the projector's linear layer, and the binary cross-entropy of the mean kernel with whether
        ``clf(z1)`` and the network's answer ``clf(z2)`` name the same class. Samples that are held out (by id) are left
        out. Centers of the batch's samples move to their new projections.
        """
        z = self._check(z)
        self._check_labels(y, len(z))
        given = self._check_ids(ids, len(z))
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.memory.keys.dtype)
            out = held_out(given, len(z), self.gate.holdout)
            loss = self._auxiliary_loss(z, y, out)
            teaches = ~out
            if not len(self.memory) or not bool(teaches.any()):
                return loss
            phi = self._embed(z).detach()
            near = self._near(phi, given)
            network = self.classifier.layer(self._second(z)).argmax(-1)
            agrees = (self.classifier.layer(near.regressed).argmax(-1) == network).to(z.dtype)
            trust = self.gate.mean_kernel(self._code_distances(phi, near), near.valid)
            if self._learning:
                self._track(phi, given)
            return loss + F.binary_cross_entropy(trust.clamp(1e-6, 1 - 1e-6)[teaches], agrees[teaches])

    def _auxiliary_loss(self, z: Tensor, y: Tensor, out: Tensor) -> Tensor:
        if self.auxiliary is None or bool(out.all()):
            return z.sum() * 0
        loss: Tensor = self.auxiliary(z[~out, : self.projected], y[~out])
        return loss

    # ---- storing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _refreshed_with(self, z: Tensor, y: Tensor, ids: Tensor) -> None:
        self.calibrate(z, y, ids)

    @torch.no_grad()
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        self.classifier.widen(self.num_classes)
        if self.auxiliary is not None:
            self.auxiliary.widen(self.num_classes)

    @torch.no_grad()
    def calibrate(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> None:
        """Choose the gate's threshold on samples, where it is automatic.

        Args:
            z: (n, in_features) embeddings.
            y: (n,) labels.
            ids: (n,) ids of samples of the training set: of these, those held out count, unless they are few. None for
                samples that were not trained on, which all count.
        """
        if self.gate.option != "auto" or not len(self.memory) or not len(z):
            return
        given = self._check_ids(ids, len(z))
        if given is not None:
            out = held_out(given, len(z), self.gate.holdout)
            if int(out.sum()) >= min(100, len(z)):
                z, y, given = z[out], y[out], given[out]
        found = self.verdicts(z, y, given, sharpness=SHARPNESS)
        self.gate.choose(dict(zip(SHARPNESS, found, strict=True)))

    @torch.no_grad()
    def verdicts(
        self, z: Tensor, y: Tensor, ids: Tensor | None = None, *, sharpness: Sequence[float] = ()
    ) -> list[Verdicts]:
        """The gate's value for samples, and who answers them right: regression, mixture, network.

        Args:
            z: (n, in_features) embeddings.
            y: (n,) labels.
            ids: (n,) or (n, m) ids of samples that are stored, each of which is judged without itself; None for others.
            sharpness: exponents of g to try; the gate's own by default.

        Returns:
            One for each exponent.
        """
        given = self._check_ids(ids, len(z))
        exponents = tuple(sharpness) or (float(self.gate.sharpness),)
        parts: list[list[Tensor]] = [[] for _ in exponents]
        with torch.autocast(z.device.type, enabled=False):
            for part in torch.arange(len(z), device=z.device).split(1024):
                own = given[part] if given is not None else None
                phi, z2 = (each.to(self.memory.keys.dtype) for each in (self._embed(z[part]), self._second(z[part])))
                near = self._near(phi, own)
                mean = self.gate.mean_kernel(self._code_distances(phi, near), near.valid)
                first, network = (self._answer(each, near.votes).argmax(-1) == y[part] for each in (near.regressed, z2))
                for place, exponent in enumerate(exponents):
                    g = mean**exponent
                    mixed = self._answer(torch.lerp(z2, near.regressed, g.unsqueeze(-1)), near.votes).argmax(-1)
                    parts[place].append(torch.stack([g, first.to(g), (mixed == y[part]).to(g), network.to(g)], 1))
        found = [torch.cat(each) for each in parts]
        return [Verdicts(each[:, 0], *each[:, 1:].bool().unbind(1)) for each in found]

    # ---- answering --------------------------------------------------------------------------------------------------

    def _regression(self, phi: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """z1 (B, d), gate (B,) and class shares (B, C) of the neighbours of projections (B, projected)."""
        near = self._near(phi, ids)
        return near.regressed, self.gate(self._code_distances(phi, near), near.valid), near.votes

    def _code_distances(self, phi: Tensor, near: Near) -> Tensor:
        """(B, k) squared distances of the codes of projections to those of their neighbours."""
        return squared_distances(self._codes(phi), self._codes(near.keys))

    def _codes(self, phi: Tensor) -> Tensor:
        """(..., projected) -> (..., C), roots of the class probabilities that the projection alone would give."""
        own = self.auxiliary or self.classifier
        logits: Tensor = own.layer(phi)
        if bool(own.seen.any()):
            logits = logits.masked_fill(~own.seen, -1e4)
        # The root's gradient at 0 is infinite.
        return logits.softmax(-1).clamp_min(1e-8).sqrt()

    def _answer(self, z: Tensor, votes: Tensor) -> Tensor:
        """Log-probabilities of the classes with stored samples, from the classifier or, where it knows none, votes."""
        held = torch.bincount(self.memory.labels[: len(self.memory)], minlength=self.num_classes) > 0
        known = self.classifier.seen & held
        logits: Tensor = self.classifier.layer(z)
        if bool(known.all()):
            return logits.log_softmax(-1)
        others = votes * ~known
        if bool(known.any()):
            probabilities = logits.masked_fill(~known, -math.inf).softmax(-1)
            others = probabilities * (1 - others.sum(-1, keepdim=True)).clamp_min(0) + others
        mixed = (1 - _FLOOR) * others + _FLOOR / self.num_classes
        return mixed.log().log_softmax(-1)
