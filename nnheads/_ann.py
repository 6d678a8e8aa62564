"""FAISS's approximate indexes behind one small face: build, append, and the candidates of a query."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from nnheads._faiss import load_faiss
from nnheads.errors import ConfigError

KINDS: Final = ("ivf", "hnsw", "pq")
_TRAINING_ROWS: Final = 65_536
_FARTHEST: Final = 1e38  # what FAISS gives for no distance is more
_LISTS_FROM: Final = 10_000  # rows from which codes are kept in lists


@final
class Candidates:
    """An approximate index of rows, known by the slots in which they were added.

    Args:
        kind: ``"ivf"`` inverted lists of raw vectors, ``"hnsw"`` a graph, ``"pq"`` 4-bit product quantization scanned
            in registers, in inverted lists where rows are many.
        keys: (n, d) float32, contiguous, on the CPU: the first rows, and what is trained on.
    """

    def __init__(self, kind: str, keys: Tensor) -> None:
        faiss = load_faiss()
        count, width = keys.shape
        self.kind = kind
        self.count = 0
        self.width = width
        self._pointer = faiss.swig_ptr
        step = max(1, count // _TRAINING_ROWS)
        sample = keys[::step].contiguous()
        lists = max(1, min(round(2 * math.sqrt(count)), len(sample) // 16))
        quantizer = faiss.IndexFlatL2(width)
        self._quantizer = quantizer  # FAISS does not own it
        if kind == "ivf":
            self._index: Any = faiss.IndexIVFFlat(quantizer, width, lists)
        elif kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(width, 32)
            self._index.hnsw.efConstruction = 80
        elif count >= _LISTS_FROM and len(sample) >= 256:
            self._index = faiss.IndexIVFPQFastScan(quantizer, width, lists, _parts(width), 4)
            self._index.by_residual = False  # one table a query, not one a list
        else:
            self._index = faiss.IndexPQFastScan(width, _parts(width), 4)
        with _wrapped(faiss):
            if kind != "hnsw":
                for trained in (self._index.cp if hasattr(self._index, "cp") else None, _book(self._index)):
                    if trained is not None:
                        trained.min_points_per_centroid, trained.seed = 1, 0
                self._index.train(sample.numpy())
        self.append(keys)

    @property
    def efforts(self) -> list[int]:
        """What `search` takes as effort, from fast to thorough."""
        if self.kind == "hnsw":
            return [16, 32, 64, 128, 256, 512]
        lists = int(getattr(self._index, "nlist", 1))
        return [1 << p for p in range(lists.bit_length()) if 1 << p <= max(1, lists // 2)]

    def append(self, keys: Tensor) -> None:
        """Add rows (n, d); their slots follow those there are."""
        with _wrapped(load_faiss()):
            self._index.add(keys.numpy())
        self.count += len(keys)

    def search(self, queries: Tensor, count: int, effort: int) -> Tensor:
        """(B, count) slots, likely the nearest; -1 where fewer were found."""
        self._aim(effort, count)
        with _wrapped(load_faiss()):
            _, slots = self._index.search(queries.numpy(), count)
        return torch.from_numpy(slots)

    def nearest(self, query: Tensor, count: int, effort: int) -> Tensor | None:
        """(1, count) slots for a query (1, d), with less around it; None where fewer were found, or infinitely far."""
        self._aim(effort, count)
        given = np.ascontiguousarray(query.numpy())
        distances, slots = np.empty((1, count), np.float32), np.empty((1, count), np.int64)
        pointer = self._pointer
        with _wrapped(load_faiss()):
            self._index.search_c(1, pointer(given), count, pointer(distances), pointer(slots))
        return torch.from_numpy(slots) if slots[0, -1] >= 0 and distances[0, -1] < _FARTHEST else None

    def _aim(self, effort: int, count: int) -> None:
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(effort, count)
        elif hasattr(self._index, "nprobe"):
            self._index.nprobe = effort


def _parts(width: int) -> int:
    """Parts of a code: as many as divide the width, two dimensions each where that is at most 64 parts."""
    return next(parts for parts in range(min(64, max(1, width // 2)), 0, -1) if width % parts == 0)


def _book(index: Any) -> Any:
    return index.pq.cp if hasattr(index, "pq") else None


@contextlib.contextmanager
def _wrapped(faiss: Any) -> Iterator[None]:
    try:
        yield
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(f"FAISS {faiss.__version__} failed ({error}): search exactly, with engine='auto'") from error
