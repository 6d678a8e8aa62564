"""Heads that look for the nearest of the samples they store: the memory, its index, and what both are asked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..code_index import CodeIndex
from ..coding import Coding
from ..errors import ConfigError
from ..functional import Metric, neighbor_distances
from ..index import Engine, Index, build_index
from ..memory import ColumnWidth, Memory
from .base import Head, one_of, positive

CODE_ENGINES: Final = ("auto", "torch")
"""Engines of a head whose centers are compressed; ``"torch"`` keeps FAISS out of the search among codes."""

SAMPLED: Final = 1024  # stored samples that a width is chosen from


class SearchingHead(Head):
    """A head with a memory, and the search for the k nearest of its samples. Abstract.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours.
        metric: distance of the search.
        normalize: whether embeddings are scaled to unit length first, when stored and when asked.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
        columns: further numbers stored with each row, see `Memory`.
        dim: width of the stored keys where it is not ``in_features``.
        coding: how keys are compressed, None for not at all; see `coding_of`.
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
        engine: Engine = "auto",
        columns: Mapping[str, ColumnWidth] | None = None,
        dim: int | None = None,
        coding: Coding | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        positive(self.name, "k", k, integer=True)
        one_of(self.name, "metric", metric, ("l2", "l1", "cosine"))
        if coding is not None and engine not in CODE_ENGINES:
            raise ConfigError(
                f"head {self.name!r}: engine {engine!r} searches raw centers, and compressed ones are searched among "
                "their codes: leave out engine or bytes_per_center"
            )
        self.k = k
        self.metric: Metric = metric
        self.normalize = normalize
        self.engine: Engine = engine
        self.memory = Memory(dim or in_features, num_classes, columns, coding)
        self._index: Index | CodeIndex | None = build_index(engine, metric)
        self._indexed: Tensor | None = None  # the key buffer the index was built on
        self._warned = False
        self._sampled: tuple[Tensor, Tensor] | None = None  # ids and keys as they came before they were compressed

    def _embed(self, z: Tensor) -> Tensor:
        """From embeddings to the space of the keys."""
        return F.normalize(z, dim=-1) if self.normalize else z

    def _search(self, z: Tensor, own_ids: Tensor | None, k: int) -> Tensor:
        """Rows of the k nearest centers (B, k), nearest first, -1 where there are fewer; own centers left out."""
        own = None
        if own_ids is not None and len(self.memory):
            own = self.memory.rows_of(own_ids)
            # without own centers the search is a little less; a GPU would have to be waited for to know
            if own.device.type == "cpu" and not bool((own >= 0).any()):
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

    @torch.no_grad()
    def _stored_distances(self, k: int | None = None) -> Tensor:
        """Squared distances (n, k) of some stored samples to their neighbours, leave-one-out, nearest first."""
        k = min(self.k if k is None else k, len(self.memory) - 1)
        if k < 1:
            return self.memory.keys.new_zeros(0, 1)
        if self._sampled is not None:
            # What is asked later is no code either, and lies farther from decoded centers than they do.
            (ids, keys), self._sampled = self._sampled, None
        else:
            held = len(self.memory)
            rows = torch.linspace(0, held - 1, min(held, SAMPLED), device=self.memory.ids.device).long()
            ids, keys = self.memory.ids[rows], self.memory.keys_at(rows)
        found = self._search(keys, ids.unsqueeze(1), k)
        return neighbor_distances(keys, self.memory.keys_at(found), self.metric).square()

    def update_index(self) -> None:
        """Bring the search index up to date now, rather than at the next search."""
        self._current_index()

    def _current_index(self) -> Index | CodeIndex:
        memory = self.memory
        if memory.coder is not None and memory.coder.quantizer is not None and memory.coded:
            if not isinstance(self._index, CodeIndex):
                self._index = CodeIndex(self.metric, scan=self.engine != "torch")
            self._index.build(memory.codes[: len(memory)], memory.coder.quantizer)
            return self._index
        if self._index is None or isinstance(self._index, CodeIndex):
            self._index, self._indexed = build_index(self.engine, self.metric), None
        try:
            self._follow(self._index)
        except BaseException:
            self._indexed = None  # what has changed is known no more: the next search builds it anew
            raise
        return self._index

    def _follow(self, index: Index) -> None:
        """Have the index follow what changed in the memory."""
        memory = self.memory
        grown_from = memory.grown_from
        changed = memory.take_changes()
        if changed is not None and self._indexed is not None and grown_from == id(self._indexed):
            index.grow(memory.keys, memory.active)
            self._indexed = memory.keys
        if changed is None or self._indexed is not memory.keys:
            index.build(memory.keys, memory.active)
            self._indexed = memory.keys
        elif len(changed):
            index.update(changed)

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
        return {**self.__dict__, "_index": None, "_indexed": None, "_sampled": None}
