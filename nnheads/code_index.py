"""Which rows are near where rows are kept as codes: search without ever holding all of them decoded."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from nnheads._exact import smallest
from nnheads._fast_scan import FastScan, can_scan, fetched
from nnheads.errors import ConfigError, EmptyMemoryError, ShapeError
from nnheads.index import Metric, unit_rows
from nnheads.quantize import ProductQuantizer

_CHUNK_NUMBERS = 2**22  # numbers of decoded rows held at once, 16 MB
_FEW = 4  # queries up to which looking distances up in tables is faster than decoding
_SCANNED = 8, 100  # rows to a candidate from which FAISS's scan pays: for a few queries, and for more


@final
class CodeIndex:
    """The rows whose decoded codes are nearest to a query; exact in that sense, on any device, but for one case.

    With L2 distances the codes are compared in the rotated space of their codebooks, which is as good and, where the
    rotation reduces dimensions, cheaper than comparing the rows. A part of the codes is decoded at a time, so that no
    copy of the rows is held or can grow stale; a few queries are answered from tables of distances to the codewords.

    The case: 4-bit codes on a CPU, 4,096 or more, L2, with FAISS at hand. There FAISS scans them (`FastScan`), and
    4k + 32 rows it finds are ranked by their exact distances. All of the nearest rows were found at 4,096 and 50,000
    clustered rows of 16 bytes, k = 1 to 100. Measured on one thread, 50,000 x 256, k = 32, ``pca``: 36 ms a query
    become 0.5 where it comes alone, and 0.41 become 0.15 in batches of 128. For batches the scan pays, and is done,
    from 100 rows to a candidate.

    Args:
        metric: ``"l2"`` (default), ``"l1"`` or ``"cosine"``.
        scan: whether FAISS may scan the codes where it can; False leaves all to torch.
    """

    def __init__(self, metric: Metric = "l2", *, scan: bool = True) -> None:
        self.metric: Metric = metric
        self.scan = scan
        self._codes: Tensor | None = None
        self._quantizer: ProductQuantizer | None = None
        self._scan: FastScan | None = None

    def build(self, codes: Tensor, quantizer: ProductQuantizer) -> None:
        """Take (N, bytes) uint8 codes to search, by reference: changed in place, they are found as they are then."""
        self._codes, self._quantizer = codes, quantizer
        if self._scan is not None and not self._scan.holds(codes, quantizer):
            self._scan = None

    def search(self, queries: Tensor, k: int) -> Tensor:
        """The ``k`` nearest rows of each query, nearest first; see `nnheads.index.Index.search`.

        Args:
            queries: (B, d) of any floating dtype.
            k: neighbours to return, at least 1.

        Returns:
            (B, k) int64 rows on the queries' device; -1 in the slots beyond the number of rows.

        Raises:
            ConfigError: ``k`` below 1.
            EmptyMemoryError: the index is not built.
            ShapeError: queries of another width, or not finite.
        """
        if self._codes is None or self._quantizer is None:
            raise EmptyMemoryError("the index holds no codes: call build(codes, quantizer) first")
        codes, quantizer = self._codes, self._quantizer
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        if queries.ndim != 2 or queries.shape[1] != quantizer.width or not queries.is_floating_point():
            raise ShapeError(
                f"queries must be a (B, {quantizer.width}) floating tensor as the rows are {quantizer.width} wide, "
                f"got {tuple(queries.shape)} {queries.dtype}"
            )
        wanted = queries.detach().to(device=codes.device, dtype=torch.float32)
        if not bool(torch.isfinite(wanted).all()):
            raise ShapeError("queries hold NaN or infinity: check the embeddings (and the learning rate)")
        rows = torch.full((len(wanted), k), -1, dtype=torch.int64, device=codes.device)
        found = min(k, len(codes))
        if found and len(wanted):
            with torch.autocast(codes.device.type, enabled=False):
                rows[:, :found] = self._nearest(wanted, codes, quantizer, found)
        return rows.to(queries.device)

    def _nearest(self, queries: Tensor, codes: Tensor, quantizer: ProductQuantizer, k: int) -> Tensor:
        scanned = _SCANNED[len(queries) > _FEW] * fetched(k)
        if self.scan and self.metric == "l2" and len(codes) >= scanned and can_scan(codes, quantizer):
            if self._scan is None or not self._scan.holds(codes, quantizer):
                self._scan = FastScan(codes, quantizer)
            return self._scan.nearest(quantizer.turn(queries), k)
        if self.metric == "l2" and len(queries) <= _FEW:
            return quantizer.adc_distances(queries, codes).topk(k, dim=1, largest=False).indices
        if self.metric == "l2":
            queries = quantizer.turn(queries)
        elif self.metric == "cosine":
            queries = unit_rows(queries)
        best = rows = None
        width = max(queries.shape[1], len(queries))
        first = 0
        for part in codes.split(max(k, _CHUNK_NUMBERS // width)):
            distances = self._distances(queries, part, quantizer)
            places = smallest(distances, min(k, len(part)))
            values, places = distances.gather(1, places), places + first
            if best is not None and rows is not None:
                values, places = torch.cat([best, values], 1), torch.cat([rows, places], 1)
                near = values.topk(min(k, values.shape[1]), dim=1, largest=False)
                values, places = near.values, places.gather(1, near.indices)
            best, rows = values, places
            first += len(part)
        assert rows is not None
        return rows

    def _distances(self, queries: Tensor, codes: Tensor, quantizer: ProductQuantizer) -> Tensor:
        """(B, n) numbers in the order of the distances."""
        if self.metric == "l2":
            decoded = quantizer.decode_turned(codes)
            return torch.addmm(decoded.square().sum(1), queries, decoded.T, alpha=-2)
        decoded = quantizer.decode(codes)
        if self.metric == "l1":
            return torch.cdist(queries, decoded, p=1.0)
        return -queries @ unit_rows(decoded).T
