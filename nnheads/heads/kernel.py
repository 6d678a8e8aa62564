"""The kernel neuron, Xu, Zhang and Li 2001."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._lasting import lasting
from ..functional import kernel_log_weights, kernel_neuron, nearest_sigma, squared_distances
from ..index import Engine
from .base import positive
from .evidence import Neighbors
from .memory_head import MemoryHead
from .registry import register_head
from .row_steps import trained_rows
from .width import Width


@register_head("kernel")
class KernelHead(MemoryHead):
    """``log softmax( sum_i alpha_i k(z, c_i) + beta )`` with all three learned (review, equations 4 to 6).

    A center starts at the embedding it was stored with and its alpha at ``alpha`` for its class, so that the head is a
    Parzen classifier before any training. The sum is not normalized: a center that the backbone leaves behind sees no
    sample and gets no gradient. Centers therefore follow their samples by default; with ``track=False`` they are
    learned, which is for a backbone that is frozen or moves slowly.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of nearest centers that count (equation 6), or None for all of them (equation 4).
        sigma: width: a number, ``"auto"`` (see `nnheads.functional.nearest_sigma`) or ``"learned"``.
        alpha: what a stored center adds to the logit of its class at first.
        alpha_lr: step size of alpha; 0 keeps it.
        center_lr: step size of centers that do not track, as a share of the way to the samples that pull; 0 keeps them.
        track: whether a training step moves the centers of its batch to their new embeddings.
        normalize: scale embeddings to unit length.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
    """

    differentiable = True
    trains_with = "output"
    evidence_scale = "logit"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int | None = 32,
        sigma: float | Literal["auto", "learned"] = "auto",
        alpha: float = 1.0,
        alpha_lr: float = 0.1,
        center_lr: float = 0.1,
        track: bool = True,
        normalize: bool = False,
        engine: Engine = "auto",
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            k=32 if k is None else k,  # where all count, the width still looks at the 32 nearest
            normalize=normalize,
            engine=engine,
            columns={"alpha": "classes"},
        )
        positive("kernel", "alpha", alpha)
        positive("kernel", "alpha_lr", alpha_lr, zero=True)
        positive("kernel", "center_lr", center_lr, zero=True)
        self.all_centers = k is None
        self.alpha = alpha
        self.alpha_lr = alpha_lr
        self.center_lr = center_lr
        self.track = track
        self.width = Width("kernel", sigma, nearest_sigma)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def config(self) -> dict[str, Any]:
        return {
            "k": None if self.all_centers else self.k,
            "sigma": self.width.sigma,
            "alpha": self.alpha,
            "alpha_lr": self.alpha_lr,
            "center_lr": self.center_lr,
            "track": self.track,
            "normalize": self.normalize,
            "engine": self.engine,
        }

    @property
    def follows(self) -> bool:
        return self.track or self.center_lr > 0

    @property
    def moves(self) -> bool:
        return self.track

    def add(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        held = super().add(z, y, ids)
        rows = self.memory.rows_of(held)
        self.memory.column("alpha")[rows] = self.alpha * self.memory.values_at(rows)
        return held

    @lasting
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        if self.num_classes > len(self.bias):
            more = self.bias.new_zeros(self.num_classes - len(self.bias))
            self.bias = nn.Parameter(torch.cat([self.bias.detach(), more]))

    def neighbors(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Neighbors:
        """As in `MemoryHead`; the weights are shares of the kernel sum, before alpha and the bias."""
        return super().neighbors(z, ids=ids, k=self._count() if k is None else k)

    def _shares(self, z: Tensor, found: Neighbors, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A center contributes its alpha times its kernel to the logits; the rest is the bias."""
        if not len(self.memory):
            return z.new_zeros(len(z), found.rows.shape[1], self.num_classes), z.new_zeros(len(z), self.num_classes)
        near = self._embed(z.to(self.memory.keys.dtype))
        kernels = self._kernels(squared_distances(near, self.memory.keys[found.rows.clamp_min(0)])) * (found.rows >= 0)
        shares = kernels.unsqueeze(-1) * self.memory.column("alpha")[found.rows.clamp_min(0)]
        return shares, self.bias.detach().expand(len(z), -1)

    def _count(self) -> int:
        return max(1, len(self.memory)) if self.all_centers else self.k

    @torch.no_grad()
    def refreshed(self) -> None:
        """Choose the width from the samples stored."""
        super().refreshed()
        self.width.choose(self._stored_distances(), len(self.memory))

    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        if not len(self.memory):
            return self._uniform(z)
        z = self._embed(z.to(self.memory.keys.dtype))
        if self.width.wanted(len(self.memory)):
            self.width.choose(self._stored_distances(), len(self.memory))
        logits = self._over_all(z, ids) if self.all_centers else self._over_nearest(z, ids)
        if self._learning and self.track:
            self._track(z, ids)
        return logits.log_softmax(-1)

    def _over_nearest(self, z: Tensor, ids: Tensor | None) -> Tensor:
        rows = self._search(z, ids, self.k)
        sq = squared_distances(z, self._centers(rows, len(z)))
        if self._learning:
            self.width.follow(sq.detach(), rows >= 0)
        return kernel_neuron(self._kernels(sq) * (rows >= 0), self._alphas(rows, len(z)), self.bias)

    def _over_all(self, z: Tensor, ids: Tensor | None) -> Tensor:
        """Logits over all centers, each gathered once for the whole batch."""
        rows = torch.arange(len(self.memory), device=z.device)
        centers = self._centers(rows, len(z))
        # Distances come from a product of matrices, which loses small ones where all are far from the origin.
        origin = centers.detach().mean(0)
        kernels = self._kernels(torch.cdist(z - origin, centers - origin).square())
        if ids is not None:
            own = (rows == self.memory.rows_of(ids).unsqueeze(-1)).any(1)
            kernels = kernels.masked_fill(own, 0)
        elif self.training:
            self._warn_without_ids()
        return kernel_neuron(kernels, self._alphas(rows, len(z)), self.bias)

    def _centers(self, rows: Tensor, batch: int) -> Tensor:
        if not self._learning or self.track or not self.center_lr:
            return self.memory.keys[rows.clamp_min(0)]
        step = self.center_lr * self.width().detach().square()
        return trained_rows(self.memory, self.memory.keys, rows, step, batch)

    def _alphas(self, rows: Tensor, batch: int) -> Tensor:
        table = self.memory.column("alpha")
        if not self._learning or not self.alpha_lr:
            return table[rows.clamp_min(0)]
        return trained_rows(self.memory, table, rows, self.alpha_lr, batch)

    def _kernels(self, sq: Tensor) -> Tensor:
        sigma: Tensor = self.width()
        return (sq / (-2 * sigma * sigma)).exp()

    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        sq = squared_distances(z, self.memory.keys[rows.clamp_min(0)])
        return kernel_log_weights(sq, self.width(), rows >= 0)
