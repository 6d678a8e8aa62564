"""What every index does: the contract, the checks, and who is hidden.

An index returns rows only. Distances are recomputed by the caller from the stored keys, so that gradients, quantization
and staleness have one home. Every engine reads the caller's keys in place and keeps one number a row beside them (its
squared norm, infinity where the row must not be found), so changing a few rows costs a few rows and no copy can grow
stale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nnheads._exact import l1_nearest, products_nearest
from nnheads._faiss import faiss_nearest
from nnheads._lasting import lasting
from nnheads.errors import ConfigError, EmptyMemoryError, ShapeError, unknown_name

Metric = Literal["l2", "l1", "cosine"]
METRICS: tuple[Metric, ...] = ("l2", "l1", "cosine")


class Index(ABC):
    """Exact nearest rows of a key matrix.

    Ties are broken arbitrarily, and two engines may break them differently; so are rows whose distances differ by less
    than the rounding of ``|q|^2 + |c|^2`` in the keys' dtype. A copy or a pickle of an index is an unbuilt one: its
    owner builds it again.

    Args:
        metric: ``"l2"`` (default), ``"l1"`` or ``"cosine"``.

    Raises:
        UnknownNameError: a metric that is none of these.
    """

    def __init__(self, metric: Metric = "l2") -> None:
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
        self.metric: Metric = metric
        self._source: Tensor | None = None  # the caller's keys
        self._active: Tensor | None = None
        self._keys: Tensor = torch.empty(0, 0)  # what is searched: the caller's keys, or unit vectors for cosine
        self._offset: Tensor = torch.empty(0)  # (N,) added to the products; infinity hides a row
        self._findable = 0
        self._extent = 0
        self._view: tuple[Tensor, Tensor] | None = None
        self._packed: tuple[Tensor, Tensor, Tensor] | None = None  # active rows, their keys and offsets, for FAISS

    @property
    def built(self) -> bool:
        """Whether ``build`` was called (a copy or a pickle of a built index is not built)."""
        return self._source is not None

    @lasting
    def build(self, keys: Tensor, active: Tensor | None = None) -> None:
        """Take the keys to search, by reference.

        The tensors are read again at each search: after changing them in place, call ``update`` with the rows changed.
        With ``metric="cosine"`` a normalized copy of the keys is kept.

        Args:
            keys: (N, d) float32 or float64; float64 keys are searched in float64.
            active: (N,) bool, the rows that may be found; all of them by default.

        Raises:
            ShapeError: wrong shape or dtype, or an active row that is not finite.
        """
        if keys.ndim != 2 or keys.dtype not in (torch.float32, torch.float64):
            raise ShapeError(f"keys must be a (N, d) float32 or float64 tensor, got {tuple(keys.shape)} {keys.dtype}")
        if active is not None and (active.shape != keys.shape[:1] or active.dtype != torch.bool):
            raise ShapeError(f"active must be a ({len(keys)},) bool tensor, got {tuple(active.shape)} {active.dtype}")
        source = keys.detach()
        offset = self._offsets(source, active, None)
        self._source, self._active, self._offset = source, active, offset
        self._keys = unit_rows(source) if self.metric == "cosine" else source
        self._changed(None)

    @lasting
    def update(self, rows: Tensor) -> None:
        """Tell the index that these rows, or their active flags, were changed in place.

        Args:
            rows: (R,) int64 rows of the keys; repeats are harmless.

        Raises:
            EmptyMemoryError: the index is not built.
            ShapeError: a row out of range, or an active row that is not finite.
        """
        source = self._built_source()
        if rows.numel() == 0:
            return
        if rows.dtype != torch.int64 or int(rows.min()) < 0 or int(rows.max()) >= len(source):
            raise ShapeError(f"rows must be int64 in 0..{len(source) - 1}, got {rows.dtype} {_span(rows)}")
        rows = rows.to(source.device).flatten()
        self._offset[rows] = self._offsets(source, self._active, rows)
        if self.metric == "cosine":
            self._keys[rows] = unit_rows(source[rows])
        self._changed(rows)

    @lasting
    def grow(self, keys: Tensor, active: Tensor | None = None) -> None:
        """Take longer tensors that begin with the rows there are; the others are hidden until ``update`` names them.

        Args:
            keys: (N', d) of the same dtype, on the same device.
            active: as in ``build``.

        Raises:
            EmptyMemoryError: the index is not built.
            ShapeError: keys that are no continuation of those there are.
        """
        source = self._built_source()
        more = len(keys) - len(source)
        if more < 0 or keys.shape[1:] != source.shape[1:] or keys.dtype != source.dtype or keys.device != source.device:
            raise ShapeError(f"keys must continue {tuple(source.shape)} {source.dtype}, got {tuple(keys.shape)}")
        self._source, self._active = keys.detach(), active
        self._offset = torch.nn.functional.pad(self._offset, (0, more), value=torch.inf)
        if self.metric == "cosine":
            self._keys = torch.nn.functional.pad(self._keys, (0, 0, 0, more))
        else:
            self._keys = self._source
        self._packed = self._view = None
        self._grown()

    def _grown(self) -> None:  # noqa: B027 - most engines keep nothing that would have to follow
        """After the tensors were exchanged for longer ones."""

    def search(self, queries: Tensor, k: int) -> Tensor:
        """The ``k`` nearest active rows of each query, nearest first.

        Args:
            queries: (B, d) of any floating dtype; compared in the keys' dtype, also under autocast.
            k: neighbours to return, at least 1.

        Returns:
            (B, k) int64 rows on the queries' device; -1 in the slots beyond the number of active rows.

        Raises:
            ConfigError: ``k`` below 1.
            EmptyMemoryError: the index is not built.
            ShapeError: queries of another width, or not finite.
        """
        keys = self._built_source()
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        if queries.ndim != 2 or queries.shape[1] != keys.shape[1] or not queries.is_floating_point():
            raise ShapeError(
                f"queries must be a (B, {keys.shape[1]}) floating tensor as the keys are {keys.shape[1]} wide, "
                f"got {tuple(queries.shape)} {queries.dtype}"
            )
        wanted = queries.detach()
        if wanted.dtype != keys.dtype or wanted.device != keys.device:
            wanted = wanted.to(device=keys.device, dtype=keys.dtype)
        if not _sum_is_finite(wanted) and not bool(torch.isfinite(wanted).all()):
            raise ShapeError("queries hold NaN or infinity: check the embeddings (and the learning rate)")
        found = min(k, self._findable)
        if not found or not wanted.shape[0]:
            return torch.full((wanted.shape[0], k), -1, dtype=torch.int64, device=queries.device)
        if torch.is_autocast_enabled(keys.device.type):
            with torch.autocast(keys.device.type, enabled=False):
                rows = self._nearest(unit_rows(wanted) if self.metric == "cosine" else wanted, found)
        else:
            rows = self._nearest(unit_rows(wanted) if self.metric == "cosine" else wanted, found)
        if found < k:
            rows = torch.nn.functional.pad(rows, (0, k - found), value=-1)
        return rows if rows.device == queries.device else rows.to(queries.device)

    @abstractmethod
    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        """(B, k) rows for checked queries on the keys' device; ``k`` is at most the number of findable rows."""

    def _by_torch(self, queries: Tensor, k: int, *, two_stages: bool = False) -> Tensor:
        keys, offset = self._visible()
        if self.metric == "l1":
            return l1_nearest(queries, keys, offset, k)
        return products_nearest(queries, keys, offset, k, two_stages=two_stages)

    def _by_faiss(self, queries: Tensor, k: int) -> Tensor:
        # FAISS's own way to leave rows out, a selector, gives up its matrix products; on a GPU it has none.
        if self._findable == self._extent:
            rows = faiss_nearest(queries, *self._visible(), k, self.metric)
        else:
            if self._packed is None:
                active = torch.isfinite(self._offset).nonzero().flatten()
                self._packed = active, self._keys[active], self._offset[active]
            active, keys, offset = self._packed
            rows = faiss_nearest(queries, keys, offset, k, self.metric)
            rows = torch.where(rows < 0, -1, active[rows])
        # FAISS finds no row where the square of the distance is more than float32 holds.
        return self._by_torch(queries, k) if rows.is_cpu and rows.numpy().min() < 0 else rows

    def _visible(self) -> tuple[Tensor, Tensor]:
        """Keys and offsets up to the last row that may be found."""
        if self._view is None:
            self._view = self._keys[: self._extent], self._offset[: self._extent]
        return self._view

    def _changed(self, rows: Tensor | None) -> None:
        """After rows (n,), or all of them, were changed."""
        seen = torch.isfinite(self._offset)
        self._findable = int(seen.sum())
        # Rows behind the last one that may be found, such as a memory's spare ones, are not looked at.
        packed = bool(seen[: self._findable].all())
        self._extent = self._findable if packed else int(seen.nonzero()[-1]) + 1
        self._packed = self._view = None

    def _offsets(self, source: Tensor, active: Tensor | None, rows: Tensor | None) -> Tensor:
        """What is added to the products of these rows (all by default), after checking the rows."""
        part = source if rows is None else source[rows]
        norms = torch.linalg.vector_norm(part, dim=1).square()
        hidden = torch.zeros_like(norms, dtype=torch.bool)
        if active is not None:
            hidden = ~(active if rows is None else active[rows])
        wrong = ~(torch.isfinite(norms) | hidden)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            row = first if rows is None else int(rows[first])
            raise ShapeError(f"row {row} of the keys holds NaN, infinity or a norm beyond {source.dtype}")
        offset = norms if self.metric == "l2" else torch.zeros_like(norms)
        return offset.masked_fill(hidden, torch.inf)

    def _built_source(self) -> Tensor:
        if self._source is None:
            raise EmptyMemoryError("the index holds no keys: call build(keys) first (a copied index is unbuilt)")
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {"metric": self.metric}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["metric"])  # type: ignore[misc]


def _sum_is_finite(values: Tensor) -> bool:
    """Whether the sum, or that of the squares, is finite: then all values are, and it is one step."""
    if values.is_cpu and values.numel() <= 2**12:
        few = values.numpy().ravel()
        with np.errstate(all="ignore"):  # not finite is an answer
            return math.isfinite(few.dot(few))  # numpy begins sooner than torch, and its dot sooner than its sum
    return math.isfinite(float(values.sum()))


def is_single(queries: Tensor, width: int) -> bool:
    """Whether it is one query that needs no preparing: float32, on the CPU, without a gradient."""
    one = queries.shape == (1, width) and queries.dtype == torch.float32
    return one and queries.is_cpu and not queries.requires_grad


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows scaled to unit length."""
    return torch.nn.functional.normalize(vectors, dim=1)  # a vector of zeros stays one: cosine 0, as scikit-learn


def _span(rows: Tensor) -> str:
    return f"{rows.min().item()}..{rows.max().item()}"
