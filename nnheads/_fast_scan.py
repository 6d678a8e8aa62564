"""Search among 4-bit codes by FAISS's fast scan, ranked by the distances to the decoded rows."""

from __future__ import annotations

from typing import Any, Final, final

import torch
from torch import Tensor

from nnheads._faiss import faiss_available, load_faiss
from nnheads.quantize import ProductQuantizer

FROM_ROWS: Final = 4096
"""With fewer rows no search takes long."""

_CHUNK_NUMBERS = 2**22  # numbers of decoded candidates held at once, 16 MB


def fetched(k: int) -> int:
    """Candidates ranked for ``k`` rows: tables of 8 bits confuse near ones, and this many make up for it."""
    return 4 * k + 32


def can_scan(codes: Tensor, quantizer: ProductQuantizer) -> bool:
    """Whether these codes can be scanned and it pays."""
    scannable = quantizer.bits == 4 and codes.device.type == "cpu" and len(codes) >= FROM_ROWS
    # A tensor of inference mode does not say when it was changed.
    return scannable and not codes.is_inference() and faiss_available()


@final
class FastScan:
    """The codes as FAISS scans them: distances by tables of 8 bits, held in registers (André et al. 2015).

    Holds a copy of the codes, in blocks of 32 rows; made in about a millisecond for 50,000 rows of 16 bytes.

    Args:
        codes: (N, bytes) uint8 of 4-bit codebooks, on the CPU.
        quantizer: the codebooks.
    """

    def __init__(self, codes: Tensor, quantizer: ProductQuantizer) -> None:
        faiss = load_faiss()
        books = quantizer.codebooks.float().contiguous()
        packed: Any = faiss.IndexPQ(books.shape[0] * books.shape[2], quantizer.parts, 4)
        faiss.copy_array_to_vector(books.numpy().ravel(), packed.pq.centroids)
        packed.is_trained = True
        packed.add_sa_codes(codes.contiguous().numpy())
        self._index: Any = faiss.IndexPQFastScan(packed)
        self._codes, self._version, self._quantizer = codes, codes._version, quantizer

    def holds(self, codes: Tensor, quantizer: ProductQuantizer) -> bool:
        """Whether these are the codes scanned, not changed in place since."""
        own = self._codes  # kept, so that no other tensor takes its address
        same = codes.data_ptr() == own.data_ptr() and codes.shape == own.shape and codes.stride() == own.stride()
        return same and codes._version == self._version and quantizer is self._quantizer

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """The rows (B, k) nearest to queries (B, M * p) in the space of the codebooks (L2), nearest first.

        ``fetched(k)`` must be at most the number of rows.
        """
        count = fetched(k)
        found = []
        for part in queries.split(max(1, _CHUNK_NUMBERS // (count * queries.shape[1]))):
            rows = torch.from_numpy(self._index.search(part.contiguous().numpy(), count)[1])
            decoded = self._quantizer.decode_turned(self._codes[rows.flatten()]).unflatten(0, rows.shape)
            distances = torch.baddbmm(
                decoded.square().sum(2, keepdim=True), decoded, part.unsqueeze(2), alpha=-2
            ).squeeze(2)
            found.append(rows.gather(1, distances.topk(k, dim=1, largest=False).indices))
        return torch.cat(found)
