"""Search among millions: codes of a few bytes in memory, keys on disk, rows added in chunks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, final

import torch
from torch import Tensor

from nnheads._exact import products_at
from nnheads._faiss import load_faiss
from nnheads.devices import multiplies_bfloat16
from nnheads.errors import ConfigError, EmptyMemoryError, ShapeError

_ROWS_A_LIST: Final = 2_500
_POINTS_A_LIST: Final = 50  # that k-means is trained on
_CHUNK: Final = 4_096


@final
class LargeIndex:
    """Rows as product-quantization codes in inverted lists (IVF-PQ), found approximately and ranked by their keys.

    Args:
        width: d of the keys, even.
        rows: about how many will be held; decides the number of lists.
        bytes_per_row: of a code, half of ``width`` at most; beside it a row costs 8 bytes for its number.
        seed: of the k-means.

    Raises:
        ConfigError: sizes that do not fit, or FAISS cannot be imported.

    Attributes:
        seconds: spent on training and adding.
    """

    def __init__(self, width: int, rows: int, bytes_per_row: int = 16, seed: int = 0) -> None:
        if bytes_per_row < 1 or width % (2 * bytes_per_row):
            raise ConfigError(f"bytes_per_row must divide half the width {width}, got {bytes_per_row}")
        faiss = load_faiss()
        self.width, self.bytes_per_row = width, bytes_per_row
        self.lists = max(1, min(rows // _ROWS_A_LIST, round(4 * math.sqrt(rows))))
        self.seconds = 0.0
        self._quantizer = faiss.IndexFlatL2(width)
        self._index: Any = faiss.IndexIVFPQ(self._quantizer, width, self.lists, 2 * bytes_per_row, 4)
        self._index.by_residual = False  # one table of distances a query, not one a list
        for book in (self._index.cp, self._index.pq.cp):
            book.seed, book.min_points_per_centroid, book.niter = seed, 1, 12
        self._scan: Any = None
        self._half: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """Bytes of codes, row numbers and codebooks."""
        books = (self.lists + 16) * self.width * 4
        return self._count * (self.bytes_per_row + 8) + books

    def train(self, sample: Tensor) -> None:
        """Find lists and codebooks from (n, d) float32 keys drawn at random: 50 for each list are plenty."""
        started = time.perf_counter()
        self._check(sample)
        if len(sample) < max(16, self.lists):
            raise ShapeError(f"training {self.lists} lists needs as many keys, got {len(sample)}")
        self._index.train(sample[: _POINTS_A_LIST * self.lists].contiguous().numpy())
        if multiplies_bfloat16(torch.device("cpu")):
            # an array, or a tensor where faiss.contrib.torch_utils was imported
            centers = torch.as_tensor(self._quantizer.reconstruct_n(0, self.lists))
            self._half = centers.bfloat16(), centers.square().sum(1) / 2
        self.seconds += time.perf_counter() - started

    def add(self, keys: Tensor) -> None:
        """Append rows: (n, d) float32, numbered on from those there are.

        Raises:
            EmptyMemoryError: the index is not trained.
        """
        started = time.perf_counter()
        self._check(keys)
        if not self._index.is_trained:
            raise EmptyMemoryError("the index is not trained: call train(sample) first")
        faiss = load_faiss()
        keys = keys.contiguous()
        ids = torch.arange(self._count, self._count + len(keys))
        if self._scan is None:
            lists = self._lists_of(keys)
            pointer = faiss.swig_ptr
            arguments = (pointer(keys.numpy()), pointer(ids.numpy()), pointer(lists.numpy()))
            self._index.add_core(len(keys), *arguments)
            self._index.ntotal = self._count + len(keys)
        else:
            self._scan.add_with_ids(keys.numpy(), ids.numpy())
        self._count += len(keys)
        self.seconds += time.perf_counter() - started

    def add_all(self, chunks: Iterable[Tensor], report: Callable[[str], None] = print) -> None:
        """Append chunks (n, d), with a line of rows, bytes and time after each tenth million."""
        told = 0
        for chunk in chunks:
            self.add(chunk)
            if len(self) - told >= 1_000_000:
                told = len(self)
                report(f"{len(self):,} rows, {self.bytes / 2**20:,.0f} MB, {self.seconds:.1f} s")

    def search(
        self, queries: Tensor, k: int, *, visits: int = 16, candidates: int = 0, keys: Tensor | None = None
    ) -> Tensor:
        """Likely the nearest rows of each query.

        Args:
            queries: (B, d) float32.
            k: neighbours to return.
            visits: lists looked into.
            candidates: rows whose keys are compared; needs ``keys``.
            keys: (N, d) of any floating dtype, the keys in the order in which they were added; memory-mapped
                (``torch.from_file``) where they are many. Without them, rows are in the order of their codes.

        Returns:
            (B, k) int64 rows, -1 in slots for which nothing was found.
        """
        self._check(queries)
        faiss = load_faiss()
        if self._scan is None:
            self._scan = faiss.IndexIVFPQFastScan(self._index)
            self._index.reset()  # the codes live on in the order in which they are scanned
        self._scan.nprobe = min(visits, self.lists)
        wanted = k if keys is None else max(k, candidates)
        _, found = self._scan.search(queries.contiguous().numpy(), wanted)
        rows = torch.from_numpy(found)
        if keys is None or wanted == k == 1:
            return rows
        near, place = rows.clamp_min(0).unique(return_inverse=True)  # each key is read once, in the order of the file
        held = keys[near].float()
        place = torch.where(rows >= 0, place, -1)
        scores = held.square().sum(1)[place.clamp_min(0)] - 2 * products_at(queries, held, place)
        best = scores.masked_fill(rows < 0, torch.inf).topk(k, dim=1, largest=False).indices
        return rows.gather(1, best)

    def _lists_of(self, keys: Tensor) -> Tensor:
        """(n,) int64 list of each key."""
        if self._half is None:
            _, lists = self._quantizer.search(keys.numpy(), 1)
            return torch.from_numpy(lists).flatten()
        # In bfloat16 a key between two lists may go to either.
        centers, norms = self._half
        parts = [(part.bfloat16() @ centers.T).sub_(norms.bfloat16()).argmax(1) for part in keys.split(_CHUNK)]
        return torch.cat(parts)

    def _check(self, keys: Tensor) -> None:
        if keys.ndim != 2 or keys.shape[1] != self.width or keys.dtype != torch.float32 or keys.device.type != "cpu":
            raise ShapeError(
                f"the index takes (n, {self.width}) float32 on the CPU, got {tuple(keys.shape)} {keys.dtype}"
            )
