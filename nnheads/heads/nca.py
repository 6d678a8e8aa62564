"""Conv-KNN: no dense layer at all, trained by neighbourhood component analysis, deciding by a kNN vote."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..functional import Vote, nca_loss
from ..index import Engine
from .base import one_of, positive
from .evidence import Neighbors
from .registry import register_head
from .voting import VotingHead


@register_head("nca")
class NCAHead(VotingHead):
    """Trained by the leave-one-out NCA loss of each batch, decides by the vote of k stored samples (Conv-KNN).

    A batch should hold at least two samples of each class: anchors without a partner teach nothing and are left out.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours of the vote; None for the root of the number of samples stored (the paper's 100 of
            10,000).
        per_class: at each refresh keep this many random samples of each class (the paper's balanced subset); None
            keeps all.
        objective: ``"expected"`` is the paper's ``1 - mean p``; ``"log"`` is ``-mean log p``, whose gradient does not
            vanish for samples that are badly wrong.
        distance: ``"euclidean"`` (the paper) or ``"sqeuclidean"``.
        vote, sigma, smoothing: see `VotingHead`.
        normalize: scale embeddings to unit length.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
        seed: of the balanced subset.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int | None = None,
        per_class: int | None = 1000,
        objective: Literal["expected", "log"] = "expected",
        distance: Literal["euclidean", "sqeuclidean"] = "euclidean",
        vote: Vote = "uniform",
        sigma: float | Literal["auto"] = "auto",
        smoothing: float = 1.0,
        normalize: bool = False,
        engine: Engine = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            k=1 if k is None else k,
            vote=vote,
            sigma=sigma,
            smoothing=smoothing,
            normalize=normalize,
            engine=engine,
        )
        if per_class is not None:
            positive("nca", "per_class", per_class, integer=True)
        one_of("nca", "objective", objective, ("expected", "log"))
        one_of("nca", "distance", distance, ("euclidean", "sqeuclidean"))
        self.fixed_k = k
        self.per_class = per_class
        self.objective: Literal["expected", "log"] = objective
        self.distance: Literal["euclidean", "sqeuclidean"] = distance
        self.seed = seed

    def config(self) -> dict[str, Any]:
        return {
            "k": self.fixed_k,
            "per_class": self.per_class,
            "objective": self.objective,
            "distance": self.distance,
            "seed": self.seed,
            **self._vote_config(),
        }

    def loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The NCA loss of the batch; arguments as in `Head.loss`. It needs no memory and no ids."""
        z = self._check(z)
        self._check_labels(y, len(z))
        with torch.autocast(z.device.type, enabled=False):
            return nca_loss(self._embed(z), y, self.objective, self.distance)

    @torch.no_grad()
    def refreshed(self) -> None:
        """Keep a class-balanced random subset and choose the width of the vote."""
        if self.per_class is not None and len(self.memory):
            self._balance(self.per_class)
        super().refreshed()

    def _balance(self, per_class: int) -> None:
        held = len(self.memory)
        labels = self.memory.labels[:held]
        # The same ids are drawn whatever the order in which the samples came.
        order = self.memory.ids[:held].argsort()
        generator = torch.Generator().manual_seed(self.seed)
        order = order[torch.randperm(held, generator=generator).to(order.device)]
        surplus = [order[labels[order] == c][per_class:] for c in labels.unique()]
        self.memory.drop(self.memory.ids[torch.cat(surplus)])

    def _votes(self) -> int:
        return self.fixed_k or max(1, round(math.sqrt(len(self.memory))))

    def neighbors(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Neighbors:
        return super().neighbors(z, ids=ids, k=self._votes() if k is None else k)
