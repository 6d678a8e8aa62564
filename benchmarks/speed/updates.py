"""Adding and dropping a thousand centers at a million: memory and index together, up to the next search."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nnheads.benchmarks.speed.harness import Report, Row, Settings
from nnheads.heads import MemoryHead, build_head

_WIDTH, _CHANGED, _CLASSES = 64, 1000, 100
_BAR_SECONDS = 0.2


def rows(settings: Settings, report: Report) -> list[Row]:
    """Seconds for adding and for dropping, each with the search that follows beside it."""
    count = 20_000 if settings.quick else 1_000_000
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1000, _WIDTH, generator=generator)

    def draw(n: int) -> Tensor:
        chosen = torch.randint(0, 1000, (n,), generator=generator)
        return centers[chosen] + 0.5 * torch.randn(n, _WIDTH, generator=generator)

    keys, queries = draw(count), draw(128)
    found = []
    for engine in ("auto", "pq"):
        if not settings.wants(engine):
            continue
        head = build_head("knn", _WIDTH, _CLASSES, k=32, engine=engine)
        assert isinstance(head, MemoryHead)
        head.memorize(keys, torch.arange(count) % _CLASSES)
        head.eval()
        started = time.perf_counter()
        head(queries)
        report(f"{engine}: first search of {count:,}, index built: {time.perf_counter() - started:.1f} s")
        head(queries)
        seconds: dict[str, list[float]] = {"add": [], "drop": [], "search after": []}
        for number in range(settings.rounds + 1):  # the first is the warm-up: buffers double
            new, labels = draw(_CHANGED), torch.arange(_CHANGED) % _CLASSES
            gone = head.memory.ids[torch.randperm(len(head.memory), generator=generator)[:_CHANGED]]
            steps: dict[str, Callable[[], object]] = {
                "add": partial(head.add, new, labels),
                "drop": partial(head.drop, gone),
            }
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                head.update_index()
                between = time.perf_counter()
                head(queries)
                after = time.perf_counter()
                report(f"{engine}: {name} {between - started:.3f} s, search of 128 after {after - between:.3f} s")
                if number:
                    seconds[name].append(between - started)
                    seconds["search after"].append(after - between)
        row: Row = {"case": f"{engine}, {count:,} x {_WIDTH}, {_CHANGED:,} changed"}
        row |= {f"{name}_seconds": sorted(times)[len(times) // 2] for name, times in seconds.items()}
        row["met"] = max(row["add_seconds"], row["drop_seconds"]) < _BAR_SECONDS
        found.append(row)
    return found
