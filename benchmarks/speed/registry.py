"""What ``nnheads bench`` can measure, by name. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, final

from nnheads.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from nnheads.benchmarks.speed.harness import Report, Settings


@final
@dataclass(frozen=True)
class Bench:
    """A measurement.

    Attributes:
        name: what ``nnheads bench`` takes.
        module: in this package, with a function ``rows(settings, report)``.
        title: what is compared with what.
        bar: what it is to show.
        wall: whether it is wall time always, of what is no work of one thread alone.
        gpu: whether it runs on a GPU where there is one.
        whole: whether it has no cases that could be measured alone.
    """

    name: str
    module: str
    title: str
    bar: str
    wall: bool = False
    gpu: bool = False
    whole: bool = False


BENCHES: dict[str, Bench] = {
    bench.name: bench
    for bench in (
        Bench(
            "search",
            "search",
            "exact search beside FAISS flat, torch's matmul + topk, scikit-learn's brute force",
            "within 10 % or 50 microseconds of the fastest peer in every cell, faster than scikit-learn in all",
        ),
        Bench(
            "approximate",
            "approximate",
            "IVF, HNSW and PQ fast-scan on real embeddings: the recall-speed curve; needs --embeddings",
            "10 x over the fastest exact search at recall@32 of 0.95 and the same class for 99 % of queries",
        ),
        Bench(
            "classes",
            "classes",
            "from embeddings to classes, 50,000 centers, beside pytorch-metric-learning's FaissKNN and CustomKNN",
            "twice as fast as FaissKNN, batches of 128 and 1,000",
        ),
        Bench(
            "embed",
            "embedding_pass",
            "nnheads.embed over CIFAR-10 images beside the bare network on batches that were prepared before",
            "bound by the backbone alone: a ratio of at most 1.05",
            gpu=True,
        ),
        Bench(
            "updates",
            "updates",
            "adding and dropping 1,000 centers at a million",
            "below 0.2 s, no rebuild",
            wall=True,
        ),
        Bench(
            "million",
            "million",
            "10 million 64-d centers at 16 bytes, beside 100,000; needs --embeddings",
            "within 8 GB; query time at most 10 x at equal recall@10 of at least 0.7",
            wall=True,
            whole=True,
        ),
        Bench(
            "nca",
            "nca",
            "NCA loss and its gradient beside pytorch-metric-learning's; a linear map beside scikit-learn's",
            "time ratio at most 1.0 at every size; peak memory at 8,192 at most 1/8",
        ),
        Bench(
            "stream",
            "stream",
            "learning split-cifar10 beside Avalanche's Replay, its iCaRL and a plain PyTorch loop, for equal samples",
            "0.65 of Avalanche's Replay, 1.1 of a plain loop; strategy impostor: 1.0 of Avalanche's Replay",
            gpu=True,
            whole=True,
        ),
        Bench(
            "startup",
            "startup",
            "import nnheads, nnheads --help",
            "below 0.2 s and 0.5 s",
            wall=True,
            whole=True,
        ),
    )
}


def find_bench(name: str) -> Bench:
    """A measurement by name; UnknownNameError names those there are."""
    if name not in BENCHES:
        raise unknown_name("benchmark", name, [*BENCHES, "embeddings"])
    return BENCHES[name]


def measure(name: str, settings: Settings, report: Report) -> dict[str, Any]:
    """Make a measurement.

    Args:
        name: see `BENCHES`.
        settings: see there.
        report: gets a line for each case when it is done.

    Raises:
        ConfigError: some cases are asked for of what has none.

    Returns:
        What goes to JSON, see `nnheads.benchmarks.speed.harness.document`.
    """
    from nnheads.benchmarks.speed.harness import document

    bench = find_bench(name)
    if settings.only and bench.whole:
        raise ConfigError(f"--only: {name} is measured as a whole, leave it out")
    found = import_module(f"nnheads.benchmarks.speed.{bench.module}").rows(settings, report)
    if settings.only and not found:
        raise ConfigError(f"--only {settings.only}: {name} has no case whose name holds that; leave it out for all")
    return document(bench.name, bench.bar, found, settings, wall=bench.wall, gpu=bench.gpu)
