"""Exact nearest rows by matrix products: plain, with a top-k in two stages, and in bfloat16 with a proof a query.

In bfloat16 a score is off by at most ``|q^||c - c^| + |q - q^||c|`` (Cauchy-Schwarz, q^ and c^ being the rounded
vectors). That bound is added to the score inside the product, as two more columns, so that what is searched are upper
bounds; a few more candidates than asked are compared in float32. Where the k-th of these beats the upper bound of every
row that is no candidate, the answer is proved to be that of the whole search in float32; the queries where it does not
are searched so.
"""

from __future__ import annotations

import warnings
from typing import Final, final

import torch
from torch import Tensor

CHUNK_BYTES: Final = 256 * 2**20  # distances held at once
_PART_NUMBERS: Final = 2**23  # upper bounds held at once, 16 MB
_HIDDEN: Final = -1e30  # finite: its differences are no NaN
_EXTRA_COLUMNS: Final = 8
_SAMPLE: Final = 1024
_MANY: Final = 0.02
_WIDEST: Final = 8

with warnings.catch_warnings():
    # Torch says once that sparse CSR tensors are in beta; only the kernel of sampled products is used.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1))


def products_nearest(queries: Tensor, keys: Tensor, offset: Tensor, k: int, *, two_stages: bool = False) -> Tensor:
    """(B, k) rows with the smallest ``offset - 2 q.c``, nearest first."""
    part = max(1, CHUNK_BYTES // (len(keys) * keys.element_size()))
    found = []
    for some in queries.split(part):
        distances = torch.addmm(offset, some, keys.T, alpha=-2)
        found.append(
            _two_stages(distances, k) if two_stages else torch.topk(distances, k, dim=1, largest=False).indices
        )
    return found[0] if len(found) == 1 else torch.cat(found)


def l1_nearest(queries: Tensor, keys: Tensor, offset: Tensor, k: int) -> Tensor:
    """(B, k) rows with the smallest city-block distance, nearest first; those with an infinite offset last."""
    part = max(1, CHUNK_BYTES // (len(keys) * keys.element_size()))
    distances = (torch.cdist(some, keys, p=1.0).add_(offset) for some in queries.split(part))
    return torch.cat([torch.topk(some, k, dim=1, largest=False).indices for some in distances])


def products_at(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """(B, c) inner products of each query with its own candidate rows (B, c), distinct in a row; row -1 gives 0."""
    batch, count = rows.shape
    if rows.is_cuda:
        parts = zip(rows.clamp_min(0).split(256), queries.split(256), strict=True)
        return torch.cat([torch.bmm(keys[some], query.unsqueeze(2)).squeeze(2) for some, query in parts])
    # Reads each key once where it lies, in a third of the time of collecting them first.
    there = rows >= 0
    whole = bool(there.all())
    if whole:
        ends, columns = torch.arange(0, batch * count + 1, count), rows.flatten()
    else:
        ends, columns = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)), rows[there]
    zeros, shape = queries.new_zeros(len(columns)), (batch, len(keys))
    pattern = torch.sparse_csr_tensor(ends, columns, zeros, shape, check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, queries, keys.T).values()
    if whole:
        return products.view(batch, count)
    return torch.zeros_like(rows, dtype=keys.dtype).masked_scatter_(there, products)


def group_size(rows: int, k: int) -> int:
    """Rows whose best stands for all of them in the first stage; 0 where one stage is as good."""
    size = 1
    while size < 256 and 4 * size * size * k <= 2 * rows:
        size *= 2
    return size if size >= 8 else 0


def _two_stages(distances: Tensor, k: int) -> Tensor:
    """As ``topk``: the k smallest lie in the k groups with the smallest minima, and minima cost one pass."""
    batch, rows = distances.shape
    size = group_size(rows, k)
    groups = rows // size if size else 0
    if groups <= k:
        return torch.topk(distances, k, dim=1, largest=False).indices
    whole = groups * size
    best = distances[:, :whole].view(batch, size, groups).amin(1).topk(k, dim=1, largest=False).indices
    steps = torch.arange(size, device=distances.device) * groups
    rest = torch.arange(whole, rows, device=distances.device).expand(batch, -1)
    rows_of = torch.cat([(best.unsqueeze(2) + steps).flatten(1), rest], 1)
    return rows_of.gather(1, distances.gather(1, rows_of).topk(k, dim=1, largest=False).indices)


@final
class HalfKeys:
    """A bfloat16 copy of keys, with which exact float32 searches cost little more than bfloat16 ones.

    Args:
        keys: (N, d) float32, kept by reference.
        offset: (N,) squared norms for L2; zeros for inner products; infinity where a row must not be found.
        inner: whether the largest inner product is nearest (keys and queries of unit length for cosine).

    Attributes:
        refused: share of the latest queries for which there was no proof (a moving average).
    """

    def __init__(self, keys: Tensor, offset: Tensor, inner: bool) -> None:
        rows, width = keys.shape
        self._keys, self._offset, self._inner = keys, offset, inner
        seen = torch.isfinite(offset)
        count = int(seen.sum())
        self._mean = torch.where(seen[:, None], keys, 0).sum(0) / max(1, count) if count < rows else keys.mean(0)
        padded = -(-rows // 256) * 256
        self._half = keys.new_zeros(padded, width + _EXTRA_COLUMNS, dtype=torch.bfloat16)
        self._half[rows:, width] = 2 * _HIDDEN  # behind hidden rows: no candidates while there are rows at all
        self._half_offset = keys.new_zeros(rows)
        for at in torch.arange(rows, device=keys.device).split(max(1, 2**22 // width)):
            self.update(at)
        self._widening = 1  # of the margin of candidates: where rows lie densely, proofs need more
        self.refused = 0.0

    @property
    def bytes(self) -> int:
        """Bytes held beside the keys."""
        held = (self._half, self._half_offset, self._mean)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def grow(self, keys: Tensor, offset: Tensor) -> None:
        """Take longer keys that begin with those there are; the others are hidden until `update` names them."""
        before, rows = len(self._keys), len(keys)
        self._keys, self._offset = keys, offset
        half = self._half.new_zeros(-(-rows // 256) * 256, self._half.shape[1])
        half[:, keys.shape[1]] = 2 * _HIDDEN
        half[before:rows, keys.shape[1]] = _HIDDEN
        half[:before] = self._half[:before]
        self._half = half
        self._half_offset = torch.nn.functional.pad(self._half_offset, (0, rows - before), value=torch.inf)

    def update(self, rows: Tensor) -> None:
        """Take over the keys and offsets of rows (n,) that changed."""
        width = self._keys.shape[1]
        hidden = ~torch.isfinite(self._offset[rows])
        keys = (self._keys[rows] - self._mean).masked_fill_(hidden[:, None], 0)
        rounded = keys.bfloat16()
        # score = q'.c' - this, for centered q' and c'
        offset = -(keys @ self._mean) if self._inner else keys.square().sum(1) / 2
        norm = keys.norm(dim=1)
        error = (keys - rounded.float()).norm(dim=1) + (width + 8) * 2.0**-24 * norm  # and of summing in float32
        self._half_offset[rows] = offset.masked_fill(hidden, torch.inf)
        extra = torch.stack(
            [*_pieces((-offset).masked_fill(hidden, _HIDDEN)), *[torch.ones_like(norm)] * 3, _up(error), _up(norm)], 1
        )
        self._half[rows] = torch.cat([rounded, extra.bfloat16()], 1)

    def nearest(self, queries: Tensor, k: int, extent: int | None = None) -> Tensor:
        """(B, k) rows, nearest first; ``k`` is at most the number of rows that may be found, none behind ``extent``."""
        extent = len(self._keys) if extent is None else extent
        half = self._half[: -(-extent // 256) * 256]
        # Wide keys are worth reading for many queries at once, narrow ones cost less than what is written.
        numbers = _PART_NUMBERS * (2 if self._half.shape[1] > 256 else 1)
        part = min(len(queries), 512, max(64, numbers // len(half)))
        held = half.new_empty(part * len(half))
        found, proved = zip(*(self._part(some, k, extent, half, held) for some in queries.split(part)), strict=True)
        rows, sure = (found[0], proved[0]) if len(found) == 1 else (torch.cat(found), torch.cat(proved))
        unsure = (~sure).nonzero().flatten()
        self.refused += (len(unsure) / len(queries) - self.refused) * min(1.0, len(queries) / 1000)
        if self.refused > _MANY and self._widening < _WIDEST:
            self._widening, self.refused = 2 * self._widening, 0.0
        if len(unsure):
            keys, offset = self._keys[:extent], self._offset[:extent]
            rows[unsure] = products_nearest(queries[unsure], keys, offset, k, two_stages=True)
        return rows

    def _part(self, queries: Tensor, k: int, extent: int, half: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (b, k) and whether each query's are proved (b,); the upper bounds are written to ``held``."""
        batch = len(queries)
        centered = queries - self._mean
        bounds, shift = self._bounds(centered, half, held)
        want = min(k + self._widening * max(16, k // 2), extent)
        size = group_size(len(half), want) or 1
        grouped = bounds.view(-1, size, batch)
        best = grouped.amax(1).T.contiguous().topk(min(want, len(grouped)), dim=1, sorted=False).indices
        candidates = (best.unsqueeze(2) * size + torch.arange(size, device=best.device)).flatten(1)
        column = torch.arange(batch, device=best.device).unsqueeze(1)
        flat = (candidates * batch + column).flatten()
        top = bounds.view(-1).index_select(0, flat).view(batch, -1).topk(want, dim=1, sorted=False)
        rows = candidates.gather(1, top.indices)
        best_exact = (self._scores(centered, rows) + shift).topk(k, dim=1)
        last = top.values.amin(1).float()
        bound = last + last.abs() * 2.0**-8  # bounds were rounded to bfloat16 once more
        return rows.gather(1, best_exact.indices), best_exact.values[:, -1] >= bound

    def _bounds(self, centered: Tensor, half: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """(N', b) bfloat16 upper bounds of ``q'.c' - offset + shift``, and the shift (b, 1).

        A bfloat16 number is precise near zero alone, so the scores are shifted until the best are near zero.
        """
        rounded = centered.bfloat16()
        error, norm = (centered - rounded.float()).norm(dim=1), centered.norm(dim=1)
        one, zero = torch.ones_like(norm), torch.zeros_like(norm)
        sides = [_up(norm), _up(error)]
        guess = torch.cat([rounded, torch.stack([one] * 3 + [zero] * 5, 1).bfloat16()], 1)
        step = max(1, len(half) // _SAMPLE)
        shift = -(half[::step] @ guess.T).amax(0).float()
        shift = torch.where(shift < -_HIDDEN / 2, shift, zero)
        full = torch.stack([one] * 3 + [*_pieces(shift), *sides], 1)
        sides_too = torch.cat([rounded, full.bfloat16()], 1)
        out = held[: len(half) * len(centered)].view(-1, len(centered))
        return torch.mm(half, sides_too.T, out=out), shift.unsqueeze(1)

    def _scores(self, centered: Tensor, rows: Tensor) -> Tensor:
        """(b, c) float32 scores of candidate rows (b, c)."""
        products = products_at(centered, self._keys, rows)
        away = self._half_offset[rows]
        scores = products - centered @ self._mean.unsqueeze(1) - away
        return scores.masked_fill_(away == torch.inf, -torch.inf)


def _pieces(values: Tensor) -> list[Tensor]:
    """Three numbers that bfloat16 holds exactly and whose sum is the float32 value (to its last bit or two)."""
    first = values.bfloat16().float()
    second = (values - first).bfloat16().float()
    return [first, second, values - first - second]


def _up(values: Tensor) -> Tensor:
    """A little more, so that rounding to bfloat16 does not give less."""
    return values * (1 + 2.0**-7)
