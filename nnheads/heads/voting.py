"""What the heads that count votes share."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..coding import Coding
from ..errors import ConfigError
from ..functional import Metric, Vote, neighbor_distances, smoothed_share, vote_log_weights
from ..index import Engine
from .base import one_of, positive
from .evidence import Neighbors
from .memory_head import MemoryHead
from .width import Width


class VotingHead(MemoryHead):
    """A head that decides by the vote of its k nearest samples and is trained by something else. Abstract.

    A vote has no useful gradient. Where classes have equally many votes the lower class number wins, as in
    scikit-learn.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours.
        vote: ``"uniform"``; ``"distance"``, by inverse distance; ``"gaussian"``, by a Gaussian kernel.
        sigma: width of the Gaussian vote: a number, or ``"auto"``, chosen at each refresh.
        smoothing: extra votes spread over the classes, so that a class without votes has a finite log-loss.
        metric, normalize, engine, dim, coding: see `MemoryHead`.
    """

    differentiable = False
    trains_with = "objective"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int,
        vote: Vote,
        sigma: float | Literal["auto"],
        smoothing: float,
        metric: Metric = "l2",
        normalize: bool = False,
        engine: Engine = "auto",
        dim: int | None = None,
        coding: Coding | None = None,
    ) -> None:
        super().__init__(
            in_features, num_classes, k=k, metric=metric, normalize=normalize, engine=engine, dim=dim, coding=coding
        )
        one_of(self.name, "vote", vote, ("uniform", "distance", "gaussian"))
        positive(self.name, "smoothing", smoothing)
        if isinstance(sigma, str) and sigma != "auto":
            raise ConfigError(f"head {self.name!r}: sigma must be a number or auto, got {sigma!r}")
        self.vote: Vote = vote
        self.smoothing = smoothing
        self.width = Width(self.name, sigma)

    def _vote_config(self) -> dict[str, Any]:
        return {
            "vote": self.vote,
            "sigma": self.width.sigma,
            "smoothing": self.smoothing,
            "normalize": self.normalize,
            "engine": self.engine,
        }

    @torch.no_grad()
    def refreshed(self) -> None:
        """Choose the width of a Gaussian vote from the samples stored."""
        super().refreshed()
        if self.vote == "gaussian":
            self.width.choose(self._stored_distances(self._votes()), len(self.memory))

    def _votes(self) -> int:
        """Number of neighbours that vote."""
        return self.k

    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        if self.vote == "gaussian" and self.width.wanted(len(self.memory)):
            self.width.choose(self._stored_distances(self._votes()), len(self.memory))
        if self.vote == "uniform":  # all alike, however far away
            return vote_log_weights(torch.zeros(rows.shape, dtype=z.dtype, device=z.device), rows >= 0)
        distances = neighbor_distances(z, self.memory.keys_at(rows), self.metric)
        return vote_log_weights(distances, rows >= 0, self.vote, self.width())

    def _shares(self, z: Tensor, found: Neighbors, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A vote contributes its weight; the rest are the smoothing votes, the same for each class."""
        values = self.memory.values_at(found.rows).to(z.dtype)
        count = (found.rows >= 0).sum(1, keepdim=True)
        shares = (found.weights * count / (count + self.smoothing)).unsqueeze(-1) * values
        rest = (self.smoothing / (count + self.smoothing) / self.num_classes).to(z.dtype)
        return shares, rest.expand(len(z), self.num_classes)

    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        if not len(self.memory):
            return self._uniform(z.detach())
        # Not even the smooth votes pass a gradient on: `loss` trains, and a criterion on the output must fail loudly.
        z = self._embed(z.detach().to(self.memory.keys.dtype))
        rows = self._search(z, ids, self._votes())
        share = self.memory.share_of(rows, self._log_weights(z, rows).exp())
        return smoothed_share(share, (rows >= 0).sum(1), self.smoothing)
