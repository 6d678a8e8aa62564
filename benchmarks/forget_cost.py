"""What forgetting costs a head that decides by stored samples; ``python -m nnheads.benchmarks.forget_cost``.

Centers are dropped and the head asks its memory again: nothing is trained and nothing is embedded anew. What is asked
has been embedded already, as that is the backbone's cost and the same for any head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnheads.benchmarks.comparison import head_variant
from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.scripts import check_whole, run_script
from nnheads.devices import resolve_device
from nnheads.errors import ConfigError
from nnheads.heads import MemoryHead, build_head, head_class, list_heads

CLASSES = 10


def measure(
    heads: Sequence[str] | None = None,
    *,
    centers: int = 50_000,
    width: int = 512,
    dropped: int = 1000,
    queries: int = 1,
    rounds: int = 7,
    device: str = "auto",
) -> dict[str, Any]:
    """Time dropping random centers and the first answers after it.

    Args:
        heads: see `nnheads.benchmarks.comparison.head_variant`; by default every head with a memory.
        centers: held before each round.
        width: of the embeddings.
        dropped: centers dropped at once.
        queries: embeddings asked about behind it, at once.
        rounds: medians over them are reported.
        device: see `nnheads.devices.resolve_device`.

    Returns:
        For each head seconds to drop, to answer then, both together (median and largest), and to answer without having
        dropped anything.
    """
    where = resolve_device(device)
    chosen = heads or _with_memory()
    return {
        "centers": centers,
        "width": width,
        "dropped": dropped,
        "queries": queries,
        "rounds": rounds,
        "heads": {text: _times(text, centers, width, dropped, queries, rounds, where) for text in chosen},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "device": device_name(where),
    }


def _with_memory() -> list[str]:
    return [name for name in list_heads() if head_class(name).uses_memory]


@torch.no_grad()
def _times(
    text: str, centers: int, width: int, dropped: int, queries: int, rounds: int, device: torch.device
) -> dict[str, float]:
    torch.manual_seed(0)
    name, options = head_variant(text)
    head = build_head(name, width, CLASSES, **options).to(device).eval()
    if not isinstance(head, MemoryHead):
        raise ConfigError(f"head {name!r} has no memory to forget from; heads that have: {', '.join(_with_memory())}")
    y = torch.arange(centers, device=device) % CLASSES
    z = torch.randn(centers, width, device=device) + 2 * torch.randn(CLASSES, width, device=device)[y]
    ids = torch.arange(centers, device=device)
    asked = z[:queries] + 0.1
    head.add(z, y, ids)
    drops, answers, plain = [], [], []
    for number in range(rounds + 1):
        head(asked)
        plain.append(_timed(lambda: head(asked), device))
        gone = ids[torch.randperm(centers, device=device)[:dropped]]
        drops.append(_timed(lambda gone=gone: head.drop(gone), device))
        answers.append(_timed(lambda: head(asked), device))
        head.add(z[gone], y[gone], gone)
        if not number:  # the first is the warm-up
            drops, answers, plain = [], [], []
    both = [drop + answer for drop, answer in zip(drops, answers, strict=True)]
    return {
        "drop_seconds": statistics.median(drops),
        "answer_seconds": statistics.median(answers),
        "both_seconds": statistics.median(both),
        "both_seconds_largest": max(both),
        "answer_seconds_before": statistics.median(plain),
    }


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":  # what was asked for before may be under way
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print JSON, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", help="with commas between them; by default all with a memory")
    parser.add_argument("--centers", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dropped", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for name in ("rounds", "centers", "dropped", "queries"):
        check_whole(f"--{name}", getattr(given, name))
    found = measure(
        given.heads.split(",") if given.heads else None,
        centers=given.centers,
        width=given.width,
        dropped=given.dropped,
        queries=given.queries,
        rounds=given.rounds,
        device=given.device,
    )
    print(json.dumps(found, indent=2))
    if given.out is not None:
        write_json(given.out, found)


if __name__ == "__main__":
    run_script(main)
