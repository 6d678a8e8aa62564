"""What the heads that vote with Gaussian kernels share."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor

from .._lasting import lasting
from ..coding import Coding
from ..errors import ConfigError
from ..functional import floored_log_probs, kernel_log_weights, log_shares, squared_distances
from ..index import Engine
from .base import positive
from .dense_objective import DenseObjective
from .evidence import Neighbors
from .memory_head import MemoryHead
from .row_steps import trained_rows
from .whitening import LEAST, Whitening
from .width import Width

_FAINT: Final = 1e-30
"""A share below is summed in logarithms: what is left of single precision would lose some of its digits."""


class KernelVoteHead(MemoryHead):
    """``y(z) = sum_i w_i y_i k(z, c_i) / sum_i w_i k(z, c_i)`` over the k nearest centers. Abstract.

    ``k(z, c) = exp(-||z - c||^2 / (2 sigma^2))``.

    In training, a sample's own center is left out (by its id).

    A vote of k neighbours teaches a network that knows nothing yet very slowly: the neighbours' labels are noise. So
    `loss` is ``(1 - a) vote + a dense``, with the cross-entropy of a dense layer that only training uses. ``a = 0`` is
    the papers' own loss, fit for a backbone that is trained already.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        sigma: width: a number, ``"auto"`` or ``"learned"``, see `Width`.
        floor: smallest probability of a class, see `nnheads.functional.class_log_probs`.
        auxiliary: share of a dense layer's cross-entropy in `loss`, 0 or more and below 1.
        whiten: above 0, distances are Mahalanobis distances of the covariance within classes, which is shrunk by this
            share towards a multiple of the identity, see `Whitening`; fitted to the stored samples at each refresh. 0:
            Euclidean.
        k, normalize, engine, columns, coding: see `MemoryHead`.
    """

    differentiable = True
    trains_with = "output"

    @property
    def tracks(self) -> bool:
        """Whether a training step moves the centers of its batch to their new embeddings."""
        return False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int,
        sigma: float | Literal["auto", "learned"],
        floor: float,
        auxiliary: float,
        normalize: bool,
        engine: Engine,
        whiten: float = 0.0,
        columns: dict[str, int | Literal["classes"]] | None = None,
        coding: Coding | None = None,
    ) -> None:
        super().__init__(
            in_features, num_classes, k=k, normalize=normalize, engine=engine, columns=columns, coding=coding
        )
        if not 0 < floor < 1 / max(2, num_classes):
            raise ConfigError(
                f"head {self.name!r}: floor must be above 0 and below 1/{max(2, num_classes)}, got {floor!r}"
            )
        if not 0 <= auxiliary < 1:
            raise ConfigError(f"head {self.name!r}: auxiliary must be 0 or more and below 1, got {auxiliary!r}")
        self.floor = floor
        self.auxiliary = auxiliary
        self.dense = DenseObjective(in_features, num_classes) if auxiliary else None
        self.width = Width(self.name, sigma)
        positive(self.name, "whiten", whiten, zero=True)
        if 0 < whiten < LEAST:
            raise ConfigError(f"head {self.name!r}: whiten must be 0 or at least {LEAST:g}, got {whiten!r}")
        self.whiten = whiten
        self.whitening = Whitening(in_features, whiten) if whiten else None

    def loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of the vote, and the auxiliary dense layer's in its share; arguments as in `Head.loss`."""
        if self.dense is None:
            return super().loss(z, y, ids=ids)
        vote = super().loss(z, y, ids=ids)
        z = self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            dense: Tensor = self.dense(z, y)
        return (1 - self.auxiliary) * vote + self.auxiliary * dense

    @lasting
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        if self.dense is not None:
            self.dense.widen(self.num_classes)

    @property
    def bytes(self) -> int:
        return super().bytes + (self.whitening.bytes if self.whitening is not None else 0)

    def embeddings_of(self, keys: Tensor) -> Tensor:
        """Embeddings (n, d) whose keys these are."""
        return keys if self.whitening is None else self.whitening.inverse(keys)

    def _embed(self, z: Tensor) -> Tensor:
        z = super()._embed(z)
        return z if self.whitening is None else self.whitening(z)

    @torch.no_grad()
    def refreshed(self) -> None:
        """Fit the distances to the samples stored, and choose the width from them."""
        if self.whitening is not None and len(self.memory):
            if self.memory.coded:
                self.memory.expand()
            z = self.embeddings_of(self.memory.all_keys())
            self.whitening.fit(z, self.memory.labels[: len(z)])
            self.memory.replace_keys(self.whitening(z))
        super().refreshed()
        if self.whitening is not None and self._sampled is not None and not len(self._sampled[0]):
            self._sampled = None  # none was embedded anew: the width is chosen from what was decoded
        self.width.choose(self._stored_distances(), len(self.memory))

    def _centers(self, rows: Tensor) -> Tensor:
        """(B, k, d) centers at rows (B, k), a copy."""
        return self.memory.keys_at(rows)

    def _log_w(self, rows: Tensor) -> Tensor | None:
        """(B, k) logarithm of the per-sample weights, None where there are none."""
        return None

    def log_weights_of_rows(self, rows: Tensor) -> Tensor | None:
        """(n,) logarithm of the per-sample weights of rows (n,) of the memory, None where the head has none."""
        log_w = self._log_w(rows.unsqueeze(0))
        return None if log_w is None else log_w[0].detach()

    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        if self.width.wanted(len(self.memory)):
            self.width.choose(self._stored_distances(), len(self.memory))
        sq = squared_distances(z, self._centers(rows), overwrite=True)
        if self._learning:
            self.width.follow(sq.detach(), rows >= 0)
        return kernel_log_weights(sq, self.width(), rows >= 0, self._log_w(rows))

    def _shares(self, z: Tensor, found: Neighbors, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A neighbour contributes its weight; the rest is the floor of classes that (almost) no neighbour has."""
        votes = found.weights.unsqueeze(-1) * self.memory.values_at(found.rows).to(z.dtype)
        total = votes.sum(1)
        floored = total.clamp_min(self.floor)
        norm = floored.sum(-1, keepdim=True)
        return votes / norm.unsqueeze(1), (floored - total) / norm

    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        if not len(self.memory):
            return self._uniform(z)
        z = self._embed(z.to(self.memory.keys.dtype))
        rows = self._search(z, ids, self.k)
        log_probs = floored_log_probs(self._log_shares(self._log_weights(z, rows), rows), self.floor)
        if self._learning and self.tracks:
            self._track(z, ids)
        return log_probs

    def _log_shares(self, log_weights: Tensor, rows: Tensor) -> Tensor:
        """(B, C) logarithm of what each class has of the weights (B, k) of rows (B, k), as `log_shares` has it.

        Summed as they are, which takes B k numbers in place of the B k C logarithms; those are taken for the samples
        with a class whose share is too small for single precision, and which would otherwise not pull.
        """
        share = self.memory.share_of(rows, log_weights.exp())
        near = self.memory.share_of(rows, torch.ones_like(log_weights)) > 0
        log_p = share.clamp_min(_FAINT).log().masked_fill(~near, -math.inf)
        faint = ((share < _FAINT) & near).any(1).nonzero().flatten()
        if len(faint):
            exact = log_shares(log_weights[faint], self.memory.values_at(rows[faint]).to(log_weights.dtype))
            log_p = log_p.index_copy(0, faint, exact)
        return log_p

    def _step_rows(self, table: Tensor, rows: Tensor, step: float | Tensor) -> Tensor:
        """Rows (B, k) or (n,) of a table; in training they take a step of that size, see `trained_rows`."""
        if self._learning and (isinstance(step, Tensor) or step > 0):
            return trained_rows(self.memory, table, rows, step)
        return table[rows.clamp_min(0)]
