"""What the heads that decide by stored samples share."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EmptyMemoryError
from ..functional import Metric, auto_sigma, neighbor_distances
from ..index import Index, build_index
from ..memory import ColumnWidth, Memory
from .base import Head, one_of, positive


@dataclass(frozen=True)
class Neighbors:
    """The stored samples that decided, nearest first; slots beyond the samples held have id -1 and weight 0.

    Attributes:
        rows: (B, k) int64 rows of the memory, -1 in an empty slot; meaningful until the memory changes.
        ids: (B, k) int64 ids of the samples.
        labels: (B, k) int64 labels they were given.
        distances: (B, k) in the head's metric; infinite in an empty slot.
        weights: (B, k) share of each in the decision; a row sums to one.
    """

    rows: Tensor
    ids: Tensor
    labels: Tensor
    distances: Tensor
    weights: Tensor


class MemoryHead(Head):
    """A head that decides by the k nearest of the samples it stores. Abstract.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours.
        metric: distance of the search.
        normalize: whether embeddings are scaled to unit length first, when stored and when asked.
        engine: search engine, see `nnheads.index.build_index`.
        columns: further numbers stored with each row, see `Memory`.
        dim: width of the stored keys where it is not ``in_features``.
    """

    uses_memory = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int,
        metric: Metric = "l2",
        normalize: bool = False,
        engine: Literal["auto", "torch", "faiss"] = "auto",
        columns: Mapping[str, ColumnWidth] | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        positive(self.name, "k", k, integer=True)
        one_of(self.name, "metric", metric, ("l2", "l1", "cosine"))
        self.k = k
        self.metric: Metric = metric
        self.normalize = normalize
        self.engine: Literal["auto", "torch", "faiss"] = engine
        self.memory = Memory(dim or in_features, num_classes, columns)
        self._refreshing = False
        self._index: Index | None = build_index(engine, metric)
        self._indexed: Tensor | None = None  # the key buffer the index was built on
        self._warned = False

    # ---- storing -------------------------------------------------------------------------------------------------

    def memorize(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> None:
        """Store samples as centers; an id already stored is replaced, or moved during a refresh. See `add`."""
        if self._refreshing and ids is not None and len(self.memory) and y.dim() == 1:
            rows = self.memory.rows_of(ids)
            same = (rows >= 0) & (self.memory.labels[rows.clamp_min(0)] == y.to(rows.device))
            self._move(rows[same], self._embed(self._check(z.detach())[same.to(z.device)]))
            new = ~same
            z, y, ids = z[new.to(z.device)], y[new.to(y.device)], ids[new.to(ids.device)]
        self.add(z, y, ids)

    def begin_refresh(self, *, replace: bool = False) -> None:
        self._refreshing = not replace

    def refreshed(self) -> None:
        self._refreshing = False

    def add(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Store samples without any training.

        Args:
            z: (n, d) embeddings.
            y: (n,) int64 labels, or (n, C) soft labels; an unseen class widens the head.
            ids: (n,) int64 ids; new ones by default.

        Returns:
            (n,) the ids.

        Raises:
            ShapeError: a wrong size, a NaN or a negative label; the memory is unchanged then.
        """
        z = self._check(z.detach())
        self._check_labels(y, len(z), seen=False)
        held = self.memory.add(self._embed(z), y, ids)
        self.widen(self.memory.num_classes)
        return held

    def drop(self, ids: Tensor) -> None:
        """Forget samples by id, at once and without training; an unknown id is named and nothing is changed."""
        self.memory.drop(ids)

    @torch.no_grad()
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        self.memory.widen(self.num_classes)

    # ---- asking --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def neighbors(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Neighbors:
        """The stored samples that decide for each embedding, with their weights.

        Args:
            z: (B, d) embeddings.
            ids: as in `forward`: a sample's own center is left out.
            k: number of neighbours; the head's own by default.
        """
        z = self._embed(self._check(z))
        rows = self._search(z, self._check_ids(ids, len(z)), self.k if k is None else k)
        valid = rows >= 0
        held = rows.clamp_min(0)
        if not len(self.memory):
            empty = torch.zeros(rows.shape, dtype=z.dtype, device=z.device)
            return Neighbors(rows, rows, rows, empty + math.inf, empty)
        distances = neighbor_distances(z, self.memory.keys[held].to(z.dtype), self.metric)
        return Neighbors(
            rows,
            self.memory.ids[held].where(valid, -1),
            self.memory.labels[held].where(valid, -1),
            distances.masked_fill(~valid, math.inf),
            self._log_weights(z, rows).exp() * valid,
        )

    @abstractmethod
    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        """(B, k) log share of each neighbour in the decision, for keys' space ``z`` and rows with -1 for none."""

    def _embed(self, z: Tensor) -> Tensor:
        """From embeddings to the space of the keys."""
        return F.normalize(z, dim=-1) if self.normalize else z

    def _search(self, z: Tensor, own_ids: Tensor | None, k: int) -> Tensor:
        """Rows of the k nearest centers (B, k), nearest first, -1 where there are fewer; own centers left out."""
        own = None
        if own_ids is not None and len(self.memory):
            own = self.memory.rows_of(own_ids)
            if not bool((own >= 0).any()):
                own = None
        elif own_ids is None and self.training:
            self._warn_without_ids()
        query = z.detach().to(self.memory.keys.dtype)
        if own is None:
            return self._current_index().search(query, k)
        rows = self._current_index().search(query, k + own.shape[1])
        mine = (rows.unsqueeze(-1) == own.unsqueeze(1)).any(-1) & (rows >= 0)
        # A stable sort moves the own centers behind the others and leaves those in their order of distance.
        order = mine.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
        return rows.gather(1, order).masked_fill(mine.gather(1, order), -1)

    def _move(self, rows: Tensor, keys: Tensor) -> None:
        """A stored sample was embedded anew; its center follows unless a head keeps it where it is."""
        self.memory.write(rows, keys)

    @torch.no_grad()
    def _stored_distances(self, samples: int = 1024) -> Tensor:
        """Squared distances (n, k) of some stored samples to their neighbours, leave-one-out, nearest first."""
        held = len(self.memory)
        k = min(self.k, held - 1)
        if k < 1:
            return self.memory.keys.new_zeros(0, 1)
        rows = torch.linspace(0, held - 1, min(held, samples), device=self.memory.keys.device).long()
        keys = self.memory.keys[rows]
        found = self._search(keys, self.memory.ids[rows].unsqueeze(1), k)
        return neighbor_distances(keys, self.memory.keys[found], self.metric).square()

    def _current_index(self) -> Index:
        if self._index is None:
            self._index = build_index(self.engine, self.metric)
        changed = self.memory.take_changes()
        if changed is None or self._indexed is not self.memory.keys:
            self._index.build(self.memory.keys, self.memory.active)
            self._indexed = self.memory.keys
        elif len(changed):
            self._index.update(changed)
        return self._index

    def _uniform(self, z: Tensor) -> Tensor:
        """What an empty memory answers: in evaluation all classes alike; in training it is an error."""
        if self.training and self.trains_with == "output":
            raise EmptyMemoryError(
                f"head {self.name!r} has no centers to train with: call model.memorize(loader) first"
            )
        return (z.sum(-1, keepdim=True) * 0).expand(len(z), self.num_classes) - math.log(self.num_classes)

    def _warn_without_ids(self) -> None:
        if not self._warned and self.trains_with == "output":
            self._warned = True
            warnings.warn(
                f"head {self.name!r} trains without ids: each sample counts its own center among its neighbours, which "
                "weakens the loss; pass ids (wrap the data set in nnheads.with_ids)",
                UserWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        # An index is rebuilt from the keys whenever it is needed: never copied, pickled or saved.
        return {**self.__dict__, "_index": None, "_indexed": None}


class Width(nn.Module):
    """Width sigma of a Gaussian kernel: a fixed number, learned, or chosen from the stored samples at each refresh.

    Args:
        head: name of the head, for messages.
        sigma: a positive number; ``"learned"``, a parameter in log space that starts at the automatic width; or
            ``"auto"``, see `nnheads.functional.auto_sigma`.
    """

    value: Tensor

    def __init__(self, head: str, sigma: float | Literal["auto", "learned"]) -> None:
        super().__init__()
        if isinstance(sigma, str):
            one_of(head, "sigma", sigma, ("auto", "learned"))
        else:
            positive(head, "sigma", sigma)
        self.sigma = sigma
        self._chosen_for = 0  # samples stored when it was last chosen
        self.register_buffer("value", torch.tensor(math.nan if isinstance(sigma, str) else float(sigma)))
        if sigma == "learned":
            # Times the automatic width, so that the parameter has no unit and weight decay pulls it to that width.
            self.log_factor = nn.Parameter(torch.zeros(()))

    def wanted(self, held: int) -> bool:
        """Whether to choose it now: it never was, or twice as many samples are stored as when it was."""
        return isinstance(self.sigma, str) and held >= max(2, 2 * self._chosen_for)

    def choose(self, sq_distances: Tensor, held: int) -> None:
        """Choose the width from squared distances (n, k) of stored samples to their neighbours, nearest first."""
        if isinstance(self.sigma, str) and sq_distances.numel():
            self.value.copy_(auto_sigma(sq_distances))
            self._chosen_for = held

    def get_extra_state(self) -> Tensor:
        """What keeps a loaded head from choosing the width anew at its first question."""
        return torch.tensor(self._chosen_for)

    def set_extra_state(self, state: Tensor) -> None:
        self._chosen_for = int(state)

    def follow(self, sq_distances: Tensor, valid: Tensor, momentum: float = 0.05) -> None:
        """Move towards the width that a training batch's neighbours (B, k) ask for, as batch norm follows its mean.

        Embeddings change their scale between two refreshes; a width that stays behind makes the vote too flat or too
        sharp to learn from.
        """
        full = valid.all(1)
        if isinstance(self.sigma, str) and bool(full.any()):
            wanted = auto_sigma(sq_distances[full]).to(self.value)
            self.value.copy_(torch.where(self.value.isnan(), wanted, self.value.lerp(wanted, momentum)))

    def forward(self) -> Tensor:
        """The width, a scalar in units of distance; 1 as long as nothing was stored."""
        value = torch.where(self.value.isnan(), 1.0, self.value)
        return value * self.log_factor.exp() if self.sigma == "learned" else value
