"""Which stored rows are nearest to a query: exact search in torch and in FAISS behind one contract.

An index returns rows only. Distances are recomputed by the caller from the stored keys, so that gradients, quantization
and staleness have one home. Every engine reads the caller's keys in place and keeps one number a row beside them (its
squared norm, infinity where the row must not be found), so changing a few rows costs a few rows and no engine holds a
copy that can grow stale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, final

import torch
from torch import Tensor

from nnheads._faiss import faiss_available, faiss_nearest, load_faiss
from nnheads.errors import ConfigError, EmptyMemoryError, ShapeError, unknown_name

Metric = Literal["l2", "l1", "cosine"]
Engine = Literal["auto", "torch", "faiss"]
METRICS: tuple[Metric, ...] = ("l2", "l1", "cosine")
ENGINES: tuple[Engine, ...] = ("auto", "torch", "faiss")

_CHUNK_BYTES = 256 * 2**20  # distances held at once

_FAISS_PRODUCTS = 128_000  # numbers in a batch from which FAISS 1.15 multiplies matrices


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
        self._packed: tuple[Tensor, Tensor, Tensor] | None = None  # active rows, their keys and offsets, for FAISS

    @property
    def built(self) -> bool:
        """Whether ``build`` was called (a copy or a pickle of a built index is not built)."""
        return self._source is not None

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
        self._changed()

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
        self._changed()

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
        wanted = queries.detach().to(device=keys.device, dtype=keys.dtype)
        if not bool(torch.isfinite(wanted).all()):
            raise ShapeError("queries hold NaN or infinity: check the embeddings (and the learning rate)")
        rows = torch.full((len(wanted), k), -1, dtype=torch.int64, device=keys.device)
        found = min(k, self._findable)
        if found and len(wanted):
            with torch.autocast(keys.device.type, enabled=False):
                if self.metric == "cosine":
                    wanted = unit_rows(wanted)
                rows[:, :found] = self._nearest(wanted, found)
        return rows.to(queries.device)

    @abstractmethod
    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        """(B, k) rows for checked queries on the keys' device; ``k`` is at most the number of findable rows."""

    def _by_torch(self, queries: Tensor, k: int) -> Tensor:
        keys, offset = self._keys, self._offset
        found = []
        for part in queries.split(max(1, _CHUNK_BYTES // (len(keys) * keys.element_size()))):
            if self.metric == "l1":
                distances = torch.cdist(part, keys, p=1.0).add_(offset)
            else:
                distances = torch.addmm(offset, part, keys.T, alpha=-2)
            found.append(torch.topk(distances, k, dim=1, largest=False).indices)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _by_faiss(self, queries: Tensor, k: int) -> Tensor:
        # FAISS's own way to leave rows out, a selector, gives up its matrix products; on a GPU it has none.
        if self._findable == len(self._keys):
            return faiss_nearest(queries, self._keys, self._offset, k, self.metric)
        if self._packed is None:
            rows = torch.isfinite(self._offset).nonzero().flatten()
            self._packed = rows, self._keys[rows], self._offset[rows]
        rows, keys, offset = self._packed
        return rows[faiss_nearest(queries, keys, offset, k, self.metric)]

    def _changed(self) -> None:
        self._findable = int(torch.isfinite(self._offset).sum())
        self._packed = None

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


@final
class TorchIndex(Index):
    """Exact search by chunked matrix products and top-k; any device, float32 and float64.

    Equation: ``argmin_c |c|^2 - 2 q.c`` (L2; ``argmax_c q.c`` of unit vectors for cosine); L1 by ``torch.cdist``. Where
    the user allows reduced precision in float32 products (``torch.set_float32_matmul_precision``), the ranking has that
    precision.
    """

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        return self._by_torch(queries, k)


@final
class FaissIndex(Index):
    """Exact search by FAISS's brute force, reading the keys in place; float32.

    Where some rows are hidden, the active ones are copied together, lazily after each change. On a GPU (keys on CUDA)
    FAISS runs on torch's current stream and k is at most 2,048.

    Raises:
        ConfigError: FAISS cannot be imported.
    """

    def __init__(self, metric: Metric = "l2") -> None:
        super().__init__(metric)
        load_faiss()

    def build(self, keys: Tensor, active: Tensor | None = None) -> None:
        """As :meth:`Index.build`; float32 keys only."""
        if keys.dtype != torch.float32:
            raise ShapeError(f"FAISS searches float32 keys, got {keys.dtype}: use engine='torch'")
        super().build(keys, active)

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        return self._by_faiss(queries, k)


@final
class AutoIndex(Index):
    """Exact search by whichever engine is the faster for the call.

    FAISS is taken for contiguous float32 keys on the CPU when the metric is L1 (2 to 7 times faster at every size
    measured), or when it will multiply matrices (``batch * d >= 128,000``) and no row is hidden (0.5 to 0.9 of torch's
    time). Torch is taken otherwise: below that size FAISS compares pair by pair and takes 1.2 to 15 times as long, a
    single query costs both the same, and on a GPU a matrix product with top-k is the faster. Measured with FAISS 1.15,
    one thread, 1,000 to 50,000 keys of 64 to 512 dimensions, batches of 1 to 1,000.
    """

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        if self._prefers_faiss(queries.numel()) and faiss_available():
            return self._by_faiss(queries, k)
        return self._by_torch(queries, k)

    def _prefers_faiss(self, query_numbers: int) -> bool:
        keys = self._keys
        if keys.device.type != "cpu" or keys.dtype != torch.float32 or not keys.is_contiguous():
            return False
        return self.metric == "l1" or (query_numbers >= _FAISS_PRODUCTS and self._findable == len(keys))


def build_index(engine: Engine = "auto", metric: Metric = "l2") -> Index:
    """An unbuilt index.

    Args:
        engine: ``"torch"``, ``"faiss"``, or ``"auto"`` (default), which decides for each search.
        metric: ``"l2"`` (default), ``"l1"`` or ``"cosine"``.

    Raises:
        UnknownNameError: an engine or a metric that is none of these.
        ConfigError: ``engine="faiss"`` where FAISS cannot be imported.
    """
    engines: dict[str, type[Index]] = {"auto": AutoIndex, "torch": TorchIndex, "faiss": FaissIndex}
    if engine not in engines:
        raise unknown_name("search engine", engine, engines)
    return engines[engine](metric)


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows scaled to unit length."""
    return torch.nn.functional.normalize(vectors, dim=1)  # a vector of zeros stays one: cosine 0, as scikit-learn


def _span(rows: Tensor) -> str:
    return f"{rows.min().item()}..{rows.max().item()}"
