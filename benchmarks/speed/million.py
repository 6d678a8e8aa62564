"""Ten million centers of 16 bytes: what building and searching them takes, beside a hundred thousand of the same kind.

The centers are views of CIFAR images: the last feature map of the image, of its mirror image and of a crop, pooled
over each rectangle of at least 2 x 2 of its 4 x 4 places (what a crop of the image pools, but for the border), 108 an
image.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nnheads.benchmarks.speed.approximate import recall
from nnheads.benchmarks.speed.embeddings import VIEW_WIDTH, read_embeddings, views
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn, resident_bytes
from nnheads.errors import ConfigError, NNHeadsError
from nnheads.index import build_index
from nnheads.large import LargeIndex

_K, _QUERIES, _TARGET = 10, 1000, 0.8
_BAR_BYTES = 8 * 2**30


def rows(settings: Settings, report: Report) -> list[Row]:
    """Bytes, seconds and peak memory of each size, and the time of a search at recall@10 of 0.8."""
    sizes = (20_000, 100_000) if settings.quick else (100_000, 10_000_000)
    kept, facts = read_embeddings(settings.embeddings, "queries")
    queries = kept["queries"][:_QUERIES].contiguous()
    resident_bytes(reset=True)
    found = [_measure(size, queries, settings, report) for size in sizes]
    small, large = found
    ratio = large["ms"][OURS] / small["ms"][OURS]
    large |= {
        "times_the_small": ratio,
        "embeddings": facts,
        "met": ratio <= 10 and large["recall@10"] >= 0.7 and large["peak_bytes"] <= _BAR_BYTES,
    }
    report(f"{sizes[1]:,} over {sizes[0]:,}: {ratio:.2f} x the time")
    return found


def _measure(size: int, queries: Tensor, settings: Settings, report: Report) -> Row:
    kept, _ = read_embeddings(settings.embeddings, "maps")
    maps = kept["maps"]
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        keys = torch.from_file(str(file), shared=True, size=size * VIEW_WIDTH, dtype=torch.float16).view(size, -1)
        per_map = len(views(maps[:1]))
        used = order[: -(-size // per_map)]
        if len(maps) * per_map < size:
            raise ConfigError(
                f"{size:,} views are needed and {len(maps) * per_map:,} can be made of {settings.embeddings}: make it "
                "with nnheads bench embeddings, without --quick"
            )

        def chunks() -> Iterator[Tensor]:
            at = 0
            for part in used.split(2500):
                chunk = views(maps[part])[: size - at]
                keys[at : at + len(chunk)] = chunk.half()
                at += len(chunk)
                yield chunk

        index = LargeIndex(VIEW_WIDTH, size)
        picked = used[torch.linspace(0, len(used) - 1, min(len(used), 60 * index.lists // 4 + 100)).long().unique()]
        sample = views(maps[picked])
        index.train(sample[torch.randperm(len(sample), generator=torch.Generator().manual_seed(1))])
        report(f"{size:,}: {index.lists:,} lists trained in {index.seconds:.1f} s")
        started = time.perf_counter()
        index.add_all(chunks(), report)
        wall = time.perf_counter() - started
        exact = _exact(keys, queries)
        row: Row = {"case": f"{size:,} x {VIEW_WIDTH}, {index.bytes_per_row} bytes each", "lists": index.lists}
        row |= {"bytes": index.bytes, "build_seconds": index.seconds, "build_seconds_with_views": wall}
        best = None
        for visits in (1, 2, 4, 8, 16, 32, 64, 128):
            for candidates in (20, 50, 100, 200, 400):
                search = partial(index.search, queries, _K, visits=visits, candidates=candidates, keys=keys)
                begun = time.perf_counter()
                reached = recall(search(), exact)
                seconds = time.perf_counter() - begun
                if reached >= _TARGET and (best is None or seconds < best[0]):
                    best = seconds, visits, candidates, reached, search
            if best is not None and best[1] * 2 < visits:
                break
        if best is None:
            raise NNHeadsError(f"recall {_TARGET} was not reached among {row['case']}: there is nothing to compare")
        _, visits, candidates, reached, search = best
        row |= in_turn({OURS: search}, settings.rounds, clock=time.perf_counter).row(row["case"])
        row |= {"recall@10": reached, "visits": visits, "candidates": candidates, "peak_bytes": resident_bytes()[1]}
        report(
            f"{row['case']}: {row['bytes'] / 2**20:,.0f} MB, built in {index.seconds:.1f} s; 1,000 queries "
            f"{row['ms'][OURS]:.1f} ms at recall@10 {reached:.3f} ({visits} lists, {candidates} candidates); "
            f"peak {row['peak_bytes'] / 2**30:.2f} GB"
        )
        return row


def _exact(keys: Tensor, queries: Tensor) -> Tensor:
    """(B, 10) the nearest rows, from exact searches of parts."""
    rows, distances = [], []
    for start in range(0, len(keys), 500_000):
        part = keys[start : start + 500_000].float()
        index = build_index("auto")
        index.build(part)
        found = index.search(queries, _K)
        rows.append(found + start)
        distances.append((part[found] - queries.unsqueeze(1)).square().sum(2))
    best = torch.cat(distances, 1).topk(_K, dim=1, largest=False).indices
    return torch.cat(rows, 1).gather(1, best)
