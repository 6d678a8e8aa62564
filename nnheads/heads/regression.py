"""Kernel regression of stored vectors, over a class-balanced set of centers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..functional import kernel_log_weights, squared_distances
from ..index import Engine
from .base import one_of, positive
from .gate import per_class_rank
from .memory_head import MemoryHead
from .width import Width


@dataclass(frozen=True)
class Near:
    """What the neighbours of a batch say.

    Attributes:
        keys: (B, k, projected) their projections.
        valid: (B, k) False in empty slots.
        regressed: (B, d) weighted mean of the vectors stored with the neighbours.
        votes: (B, C) share of each class in the weights.
    """

    keys: Tensor
    valid: Tensor
    regressed: Tensor
    votes: Tensor


class RegressionHead(MemoryHead):
    """Stores (phi_i -> z_i) and answers with ``z1 = sum_i z_i k(phi, phi_i) / sum_i k(phi, phi_i)``. Abstract.

    Embeddings are phi and z side by side; with ``projected=0`` both are the whole embedding.

    Args:
        in_features: width of the embeddings, the projection's included.
        num_classes: number of classes C.
        projected: width of phi.
        k: number of neighbours.
        sigma: width of the kernel: a number or ``"auto"``, chosen at each refresh.
        per_class: samples of each class that a refresh keeps as centers; None keeps all.
        normalize: scale projections to unit length.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        projected: int,
        k: int,
        sigma: float | Literal["auto"],
        per_class: int | None,
        normalize: bool,
        engine: Engine,
    ) -> None:
        if projected >= in_features:
            raise ConfigError(
                f"head {self.name!r}: a projection of {projected} leaves nothing of {in_features} features"
            )
        super().__init__(
            in_features,
            num_classes,
            k=k,
            normalize=normalize,
            engine=engine,
            columns={"z": in_features - projected},
            dim=projected or None,
        )
        if isinstance(sigma, str):
            one_of(self.name, "sigma", sigma, ("auto",))
        if per_class is not None:
            positive(self.name, "per_class", per_class, integer=True)
        self.projected = projected
        self.per_class = per_class
        self.width = Width(self.name, sigma)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] | None = None

    # ---- storing -------------------------------------------------------------------------------------------------

    def memorize(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> None:
        if self._waiting is None or ids is None:
            self.add(z, y, ids)
            return
        z = self._check(z.detach())
        self._check_labels(y, len(z), seen=False)
        self._waiting.append((z, y.to(z.device), ids.to(z.device)))

    def begin_refresh(self, *, replace: bool = False) -> None:
        super().begin_refresh(replace=replace)
        self._waiting = []

    def abandon_refresh(self) -> None:
        self._waiting = None
        super().abandon_refresh()

    @torch.no_grad()
    def refreshed(self) -> None:
        """Keep a class-balanced set of centers, choose the widths and what else follows from the samples."""
        with torch.autocast(self.memory.keys.device.type, enabled=False):
            waiting, self._waiting = self._waiting, None
            if waiting:
                z, ids = (torch.cat([part[i] for part in waiting]) for i in (0, 2))
                self._widen_to(torch.cat([_hard(part[1]) for part in waiting]))
                y = torch.cat([self._as_given(part[1], waiting) for part in waiting])
                self._keep(z, y, ids)
                self.choose_widths()
                self._refreshed_with(z, _hard(y), ids)
            elif len(self.memory):
                self.choose_widths()
        super().refreshed()

    def _as_given(self, y: Tensor, waiting: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Labels of one kind: soft ones for all batches where one has them."""
        if all(part[1].dim() == 1 for part in waiting):
            return y
        wide = F.one_hot(y, self.num_classes).float() if y.dim() == 1 else y.float()
        return F.pad(wide, (0, self.num_classes - wide.shape[1]))

    def _keep(self, z: Tensor, y: Tensor, ids: Tensor) -> None:
        """Store the samples of a refresh: those held move, others enter, and each class keeps ``per_class``."""
        if self.per_class is not None:
            few = per_class_rank(_hard(y), ids) < self.per_class
            z, y, ids = z[few], y[few], ids[few]
        rows = self.memory.rows_of(ids)
        same = rows >= 0
        if bool(same.any()):
            same &= self._refreshing & (self.memory.labels[rows.clamp_min(0)] == _hard(y))
        self.memory.write(rows[same], self._embed(z[same].to(self.memory.keys.dtype)))
        self.memory.column("z")[rows[same]] = self._second(z[same]).to(self.memory.keys.dtype)
        self.add(z[~same], y[~same], ids[~same])
        if self.per_class is not None:
            held = len(self.memory)
            surplus = per_class_rank(self.memory.labels[:held], self.memory.ids[:held]) >= self.per_class
            self.memory.drop(self.memory.ids[:held][surplus])

    def add(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        held = super().add(z, y, ids)
        z = self._second(self._check(z.detach())).to(self.memory.keys)
        # The last of equal ids counts, as in the memory.
        for part in torch.arange(len(held)).split(1) if len(held.unique()) < len(held) else [torch.arange(len(held))]:
            self.memory.column("z")[self.memory.rows_of(held[part])] = z[part]
        return held

    @torch.no_grad()
    def choose_widths(self) -> None:
        """Choose the widths of the kernels from the samples stored."""
        self.width.choose(self._stored_distances(), len(self.memory))

    def _refreshed_with(self, z: Tensor, y: Tensor, ids: Tensor) -> None:
        """Called at the end of a refresh with all its samples: embeddings (n, in_features), labels and ids (n,)."""

    # ---- asking --------------------------------------------------------------------------------------------------

    def _near(self, phi: Tensor, ids: Tensor | None) -> Near:
        """The neighbours of projections (B, projected) and what they say; own centers left out."""
        rows = self._search(phi, ids, self.k)
        valid, held = rows >= 0, rows.clamp_min(0)
        keys = self.memory.keys[held]
        sq = squared_distances(phi, keys)
        if self._learning:
            self.width.follow(sq.detach(), valid)
        weights = kernel_log_weights(sq, self._current_width(), valid).exp() * valid
        regressed = torch.einsum("bk,bkd->bd", weights, self.memory.column("z")[held])
        return Near(keys, valid, regressed, torch.einsum("bk,bkc->bc", weights, self.memory.values_at(rows)))

    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        sq = squared_distances(z, self.memory.keys[rows.clamp_min(0)])
        return kernel_log_weights(sq, self._current_width(), rows >= 0)

    def _current_width(self) -> Tensor:
        if self.width.wanted(len(self.memory)):
            self.choose_widths()
        width: Tensor = self.width()
        return width

    def _second(self, z: Tensor) -> Tensor:
        """The network's embedding, beside the projection."""
        return z[:, self.projected :]

    def _embed(self, z: Tensor) -> Tensor:
        return super()._embed(z[:, : self.projected] if self.projected else z)


def _hard(y: Tensor) -> Tensor:
    return y if y.dim() == 1 else y.argmax(-1)
