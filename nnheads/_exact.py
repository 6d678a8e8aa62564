"""Exact nearest rows by matrix products: plain, with a top-k in two stages, of one query, in bfloat16 with a proof.

In bfloat16 a product is off by at most ``|q^||c - c^| + |q - q^||c|`` (Cauchy-Schwarz, q^ and c^ being the rounded
vectors). That bound is taken off the distance inside the product, as two more columns: what is searched are lower
bounds; a few more candidates than asked are compared in float32. Where the k-th of these beats the lower bound of every
row that is no candidate, the answer is proved to be that of the whole search in float32; the queries where it does not
are searched so.

Positive bfloat16 numbers are in the order of their bits, and minima of 16-bit integers are found several times sooner.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES: Final = 256 * 2**20  # distances held at once
_PART_NUMBERS: Final = 2**24  # lower bounds held at once, 32 MB; more where 64 queries have more
_BLOCK_NUMBERS: Final = 2**21  # of these that a processor keeps near while it looks for their minima
_HIDDEN: Final = -1e30  # finite: its differences are no NaN
_EXTRA_COLUMNS: Final = 8
_SAMPLE: Final = 1024
_FEW_QUERIES: Final = 16
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
        found.append(_two_stages(distances, k) if two_stages else smallest(distances, k))
    return found[0] if len(found) == 1 else torch.cat(found)


@final
class SingleKeys:
    """Keys to compare single queries with on a CPU: numpy's product, and as few calls of torch as there can be.

    A search of ten thousand rows takes as long as a dozen of these, which find the processor's cache full of keys.

    Args:
        keys: (N, d) float32, contiguous, kept by reference.
        offset: (N,) as of `products_nearest`, kept by reference.
    """

    def __init__(self, keys: Tensor, offset: Tensor) -> None:
        self.width = keys.shape[1]
        self._keys, self._offset = keys.numpy(), offset.numpy()

    def nearest(self, query: Tensor, k: int) -> Tensor | None:
        """(1, k) rows as of `products_nearest`, for a query (1, d); None where the k-th has no finite distance."""
        with np.errstate(all="ignore"):  # hidden rows may hold anything, and the query is not checked yet
            distances = np.dot(self._keys, -2 * query.numpy()[0])
            distances += self._offset
        if k == 1:
            nearest = distances.argmin()
            if math.isnan(distances[nearest]):
                distances[np.isnan(distances)] = np.inf
                nearest = distances.argmin()
            return torch.from_numpy(np.array([[nearest]])) if math.isfinite(distances[nearest]) else None
        near = _candidates(distances, k)
        found = distances[near]
        order = found.argsort()[:k]
        return torch.from_numpy(near[order][None]) if math.isfinite(found[order[-1]]) else None


def _candidates(distances: NDArray[Any], k: int) -> NDArray[Any]:
    """Places of numbers (n,) among which the k smallest are; k at most n."""
    stride = len(distances) // 16
    if stride >= 4 * k:
        # Among the minima of groups, k are no larger than the k-th of them: nor are the k smallest of all.
        minima = distances[: 16 * stride].reshape(16, stride).min(0)
        minima.partition(k - 1)
        near: NDArray[Any] = (distances <= minima[k - 1]).nonzero()[0]
        if len(near) >= k:  # else it is NaN, of hidden rows
            return near
    first: NDArray[Any] = distances.argpartition(k - 1)[:k]
    return first


def l1_nearest(queries: Tensor, keys: Tensor, offset: Tensor, k: int) -> Tensor:
    """(B, k) rows with the smallest city-block distance, nearest first; those with an infinite offset last."""
    part = max(1, CHUNK_BYTES // (len(keys) * keys.element_size()))
    distances = (torch.cdist(some, keys, p=1.0).add_(offset) for some in queries.split(part))
    return torch.cat([smallest(some, k) for some in distances])


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


def smallest(values: Tensor, k: int) -> Tensor:
    """(B, k) places of the k smallest of each row of numbers (B, n), smallest first."""
    rows, width = values.shape
    # Measured on one thread, 96 rows of 1,000 and of 6,000, k = 128: numpy's partition takes a third of torch's time;
    # for fewer of more it takes longer.
    there = values.device.type == "cpu" and values.element_size() >= 4
    if not there or rows < 8 or not 16 <= k < width <= 256 * k:
        return values.topk(k, dim=1, largest=False).indices
    near = torch.from_numpy(values.numpy().argpartition(k - 1, axis=1)[:, :k])
    return near.gather(1, values.gather(1, near).argsort(dim=1))


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
        return smallest(distances, k)
    whole = groups * size
    minima = distances[:, :whole].view(batch, size, groups).amin(1)
    if bool(minima.isnan().any()):  # of hidden rows, which may hold anything
        distances = distances.nan_to_num(torch.inf, torch.inf, -torch.inf)
        minima = distances[:, :whole].view(batch, size, groups).amin(1)
    best = minima.topk(k, dim=1, largest=False).indices
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
        most = max(64, min(512, _PART_NUMBERS // len(half) // 32 * 32))
        parts = -(-len(queries) // most)
        part = -(-len(queries) // (32 * parts)) * 32  # tiles of the processor are filled
        held = half.new_empty(min(part, len(queries)) * len(half))
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
        """Rows (b, k) and whether each query's are proved (b,); the lower bounds are written to ``held``."""
        batch = len(queries)
        centered = queries - self._mean
        # Without a proof a single query costs three times as much; twice the candidates cost it nothing.
        widening = max(2, self._widening) if batch <= _FEW_QUERIES else self._widening
        want = min(k + widening * max(16, k // 2), extent)
        size = _side(len(half), want)
        bounds, least, shift = self._bounds(centered, half, held, size)
        column = torch.arange(batch, device=half.device).unsqueeze(1)
        # Groups of groups, then groups, then rows: each time the smallest lie in those with the smallest minima.
        least_of_groups = least.view(-1, size, batch).amin(1)
        rows, last = _smallest(least_of_groups.T, min(want, len(least_of_groups)))
        for values in (least, bounds):
            rows = (rows.unsqueeze(2) * size + torch.arange(size, device=half.device)).flatten(1)
            inside = values.view(-1).index_select(0, (rows * batch + column).flatten()).view(batch, -1)
            near, last = _smallest(inside, min(want, inside.shape[1]))
            rows = rows.gather(1, near)
        exact = (shift - self._scores(centered, rows)).topk(k, dim=1, largest=False)
        bound = _ordered(last).view(torch.bfloat16).float()
        bound -= bound.abs() * 2.0**-8  # bounds were rounded to bfloat16 once more
        sure = exact.values[:, -1] <= bound
        if batch > _FEW_QUERIES:
            sure &= last >= 0
        return rows.gather(1, exact.indices), sure

    def _bounds(self, centered: Tensor, half: Tensor, held: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The bits (N', b) of bfloat16 lower bounds of ``shift - score``, minima (N' / size, b), and the shift (b, 1).

        The order of the bits is that of the bounds where these are not negative, and everywhere for few queries. A
        bfloat16 number is precise near zero alone: the shift brings the nearest rows there, a few of them below zero.
        """
        batch, few = len(centered), len(centered) <= _FEW_QUERIES
        rounded = centered.bfloat16()
        error, norm = (centered - rounded.float()).norm(dim=1), centered.norm(dim=1)
        one, zero = torch.ones_like(norm), torch.zeros_like(norm)
        sides = [-_up(norm), -_up(error)]
        # The largest score there can be, so that distances from it are positive.
        most = (centered + self._mean).norm(dim=1) - centered @ self._mean if self._inner else norm.square() / 2

        def queries(shift: Tensor, sides: list[Tensor]) -> Tensor:
            return torch.cat([-rounded, torch.stack([-one] * 3 + [*_pieces(shift), *sides], 1).bfloat16()], 1).T

        step = max(1, len(half) // _SAMPLE)
        sample = torch.mm(half[:: step if few else min(step, 8)], queries(1.02 * most, [zero, zero])).view(torch.int16)
        least = sample.amin(0).view(torch.bfloat16).float()
        shift = 1.02 * most - 0.6 * torch.where(least < -_HIDDEN / 2, least, zero)
        sides_too = queries(shift, sides)
        bounds = held[: len(half) * batch].view(-1, batch)
        minima = torch.empty(len(half) // size, batch, dtype=torch.int16, device=half.device)
        rows = max(256, _BLOCK_NUMBERS // batch // 256 * 256)
        for at in range(0, len(half), rows):
            block = bounds[at : at + rows]
            torch.mm(half[at : at + rows], sides_too, out=block)
            bits = block.view(torch.int16)
            if few:
                bits.copy_(_ordered(bits))
            torch.amin(bits.view(-1, size, batch), 1, out=minima[at // size : (at + rows) // size])
        return bounds.view(torch.int16), minima, shift.unsqueeze(1)

    def _scores(self, centered: Tensor, rows: Tensor) -> Tensor:
        """(b, c) float32 scores of candidate rows (b, c)."""
        products = products_at(centered, self._keys, rows)
        away = self._half_offset[rows]
        scores = products - centered @ self._mean.unsqueeze(1) - away
        return scores.masked_fill_(away == torch.inf, -torch.inf)


def _side(rows: int, want: int) -> int:
    """Rows in a group, and groups in a group of groups."""
    size = 1
    while size < 16 and 12 * size**3 * want <= rows:
        size *= 2
    return size


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of int16 values (b, n): places of the ``count`` smallest (b, count), in no order, and the last of these (b,)."""
    width = values.shape[1]
    dtype, bits = (torch.int32, 16) if width <= 2**16 else (torch.int64, 32)
    packed = values.to(dtype, memory_format=torch.contiguous_format) << bits  # in front of the place
    packed |= torch.arange(width, dtype=dtype, device=values.device)
    if count < width and packed.is_cuda:
        packed = packed.topk(count, dim=1, largest=False).values
    elif count < width:
        packed.numpy().partition(count - 1, axis=1)
        packed = packed[:, :count]
    return (packed & (2**bits - 1)).long(), (packed.amax(1) >> bits).to(torch.int16)


def _ordered(bits: Tensor) -> Tensor:
    """The bits of bfloat16 numbers as int16 in the order of the numbers, and back."""
    return bits ^ ((bits >> 15) & 0x7FFF)


def _pieces(values: Tensor) -> list[Tensor]:
    """Three numbers that bfloat16 holds exactly and whose sum is the float32 value (to its last bit or two)."""
    first = values.bfloat16().float()
    second = (values - first).bfloat16().float()
    return [first, second, values - first - second]


def _up(values: Tensor) -> Tensor:
    """A little more, so that rounding to bfloat16 does not give less."""
    return values * (1 + 2.0**-7)
