"""The kernel neuron, Xu, Zhang and Li 2001."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..functional import kernel_neuron, squared_distances
from .base import positive
from .kernel_vote import KernelVoteHead
from .memory_head import Neighbors
from .registry import register_head


@register_head("kernel")
class KernelHead(KernelVoteHead):
    """``log softmax( sum_i alpha_i k(z, c_i) + beta )`` with all three learned (review, equations 4 to 6).

    A center starts at the embedding it was stored with and its alpha at ``alpha`` for its class, so that the head is a
    Parzen classifier before any training.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of nearest centers that count (equation 6), or None for all of them (equation 4).
        sigma: width: a number, ``"auto"`` (chosen when centers are stored and at each refresh) or ``"learned"``.
        alpha: what a stored center adds to the logit of its class at first.
        alpha_lr, center_lr: step sizes of alpha and of the centers; 0 keeps them.
        normalize: scale embeddings to unit length.
        engine: see `nnheads.index.build_index`.
    """

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
        normalize: bool = False,
        engine: Literal["auto", "torch", "faiss"] = "auto",
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            k=32 if k is None else k,  # where all count, the width still looks at the 32 nearest
            sigma=sigma,
            floor=1e-6 / num_classes,
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
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def config(self) -> dict[str, Any]:
        return {
            "k": None if self.all_centers else self.k,
            "sigma": self.width.sigma,
            "alpha": self.alpha,
            "alpha_lr": self.alpha_lr,
            "center_lr": self.center_lr,
            "normalize": self.normalize,
            "engine": self.engine,
        }

    def add(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        held = super().add(z, y, ids)
        rows = self.memory.rows_of(held)
        self.memory.column("alpha")[rows] = self.alpha * self.memory.values_at(rows)
        return held

    @torch.no_grad()
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        if self.num_classes > len(self.bias):
            more = self.bias.new_zeros(self.num_classes - len(self.bias))
            self.bias = nn.Parameter(torch.cat([self.bias.detach(), more]))

    def neighbors(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Neighbors:
        """As in `MemoryHead`; the weights are shares of the kernel sum, before alpha and the bias."""
        return super().neighbors(z, ids=ids, k=self._count() if k is None else k)

    def _count(self) -> int:
        return max(1, len(self.memory)) if self.all_centers else self.k

    def _move(self, rows: Tensor, keys: Tensor) -> None:
        """Centers are learned: they do not follow their samples."""

    def _centers(self, rows: Tensor) -> Tensor:
        return self._trained_rows(self.memory.keys, rows, self.center_lr)

    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        if not len(self.memory):
            return self._uniform(z)
        z = self._embed(z.to(self.memory.keys.dtype))
        if self.width.wanted(len(self.memory)):
            self.width.choose(self._stored_distances(), len(self.memory))
        if self.all_centers:
            return self._over_all(z, ids).log_softmax(-1)
        rows = self._search(z, ids, self.k)
        kernels = self._kernels(squared_distances(z, self._centers(rows))) * (rows >= 0)
        alpha = self._trained_rows(self.memory.column("alpha"), rows, self.alpha_lr)
        return kernel_neuron(kernels, alpha, self.bias).log_softmax(-1)

    def _kernels(self, sq: Tensor) -> Tensor:
        sigma: Tensor = self.width()
        return (sq / (-2 * sigma * sigma)).exp()

    def _over_all(self, z: Tensor, ids: Tensor | None) -> Tensor:
        """Logits over all centers, each gathered once for the whole batch."""
        rows = torch.arange(len(self.memory), device=z.device)
        centers = self._trained_rows(self.memory.keys, rows, self.center_lr, len(z))
        alpha = self._trained_rows(self.memory.column("alpha"), rows, self.alpha_lr, len(z))
        kernels = self._kernels(torch.cdist(z, centers).square())
        if ids is not None:
            own = (rows == self.memory.rows_of(ids).unsqueeze(-1)).any(1)
            kernels = kernels.masked_fill(own, 0)
        elif self.training:
            self._warn_without_ids()
        return kernel_neuron(kernels, alpha, self.bias)
