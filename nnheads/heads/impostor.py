"""Impostor networks, Lebedev, Babenko and Lempitsky 2018."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..coding import ROTATION
from ..index import Engine
from .base import one_of, positive
from .compressed import coding_of
from .kernel_vote import KernelVoteHead
from .registry import register_head


@register_head("impostor")
class ImpostorHead(KernelVoteHead):
    """Kernel vote over centers near the embeddings, without per-sample weights (review, equations 8 and 9).

    Centers c_i are

    - ``"loose"``: trained too, and held near their samples by ``lambda * mean ||f(x_i) - c_i||^2`` over the
      batch, which `loss` adds; a criterion on the output alone trains them without that tie;
    - ``"tied"``: c_i = f(x_i), followed as samples pass by in training and at each refresh;
    - ``"fixed"``: c_i = f_0(x_i), where they were when they were stored.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours.
        sigma: width: a number, ``"auto"`` (chosen at each refresh) or ``"learned"``.
        centers: ``"loose"``, ``"tied"`` or ``"fixed"``.
        tie: lambda of the tie, in units of one over squared distance: how strongly the backbone is held back.
        center_lr: share of the way that a loose center goes, at each visit, to its sample and to the samples whose vote
            pulls it.
        floor: smallest probability of a class.
        auxiliary: share of a dense layer's cross-entropy in `loss`, see `KernelVoteHead`; 0 is the paper's own loss.
        normalize: scale embeddings to unit length.
        whiten: 0: Euclidean distances; above 0: Mahalanobis distances of the covariance within classes, shrunk by this
            share, see `KernelVoteHead`.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
        bytes_per_center, rotation, code_bits: compressed centers, see `coding_of`. Loose ones then follow their ties
            alone: steps of the vote are smaller than the cells of a code.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int = 32,
        sigma: float | Literal["auto", "learned"] = "auto",
        centers: Literal["loose", "tied", "fixed"] = "loose",
        tie: float = 0.002,
        center_lr: float = 0.5,
        floor: float = 1e-6,
        auxiliary: float = 0.75,
        normalize: bool = False,
        whiten: float = 0.0,
        engine: Engine = "auto",
        bytes_per_center: int | None = None,
        rotation: str = ROTATION,
        code_bits: Literal[4, 8] = 8,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            k=k,
            sigma=sigma,
            floor=floor,
            auxiliary=auxiliary,
            normalize=normalize,
            whiten=whiten,
            engine=engine,
            coding=coding_of(self.name, bytes_per_center, rotation, code_bits, in_features),
        )
        one_of("impostor", "centers", centers, ("loose", "tied", "fixed"))
        positive("impostor", "tie", tie, zero=True)
        positive("impostor", "center_lr", center_lr, zero=True)
        self.centers = centers
        self.tie = tie
        self.center_lr = center_lr

    @property
    def tracks(self) -> bool:
        return self.centers == "tied"

    @property
    def follows(self) -> bool:
        return self.centers != "fixed"

    @property
    def moves(self) -> bool:
        return self.centers == "tied"

    @property
    def anchored(self) -> bool:
        return self.centers == "loose"

    def config(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "sigma": self.width.sigma,
            "centers": self.centers,
            "tie": self.tie,
            "center_lr": self.center_lr,
            "floor": self.floor,
            "auxiliary": self.auxiliary,
            "normalize": self.normalize,
            "whiten": self.whiten,
            "engine": self.engine,
            **self._coding_config(),
        }

    def loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of the vote, plus the tie of equation 8 for loose centers; arguments as in `Head.loss`.

        The tie is the mean over the samples of the batch that have a center, so lambda does not depend on how many
        centers there are.
        """
        loss = super().loss(z, y, ids=ids)
        if self.centers != "loose" or ids is None or ids.dim() != 1 or not self.tie:
            return loss
        with torch.autocast(z.device.type, enabled=False):
            z = self._embed(self._check(z).to(self.memory.keys.dtype))
            own = self.memory.rows_of(ids)
            z, own = z[own >= 0], own[own >= 0]
            if not len(own):
                return loss
            if self.memory.coded:
                centers = self.memory.keys_at(own)
                if self._learning:
                    self.memory.write(own, centers.lerp(z.detach(), self.center_lr))
                return loss + self.tie * (z - centers).square().sum(-1).mean()
            # Whatever lambda, a center goes center_lr of the way to its sample; once, also where replay put the sample
            # into the batch several times.
            repeats = (own.unsqueeze(1) == own).sum(1, keepdim=True)
            centers = self._step_rows(self.memory.keys, own, self.center_lr / (2 * self.tie * repeats))
            return loss + self.tie * (z - centers).square().sum(-1).mean()

    def _centers(self, rows: Tensor) -> Tensor:
        if self.centers != "loose" or self.memory.coded:
            return super()._centers(rows)
        # The gradient of the vote is in units of distance / sigma^2. With a step of a fixed size, a narrow kernel would
        # throw the centers out of reach; this way center_lr is a share of the way to the samples that pull.
        return self._step_rows(self.memory.keys, rows, self.center_lr * self.width().detach().square())
