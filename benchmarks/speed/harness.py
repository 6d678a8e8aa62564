"""How everything in this package is timed: contenders in turn in one process, medians and ratios over rounds."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

from nnheads.benchmarks.results import device_name, versions
from nnheads.devices import resolve_device
from nnheads.errors import ConfigError

OURS = "nnheads"
_ROUND_SECONDS = 0.005  # a shorter call is repeated within a round: clocks and caches are coarser than it
_HOPELESS = 4
_PEERS = {"scikit-learn": "scikit-learn", "pytorch-metric-learning": "pytorch-metric-learning"}

Row = dict[str, Any]
Report = Callable[[str], None]
Clock = Callable[[], float]


@final
@dataclass(frozen=True)
class Settings:
    """What a measurement is told.

    Attributes:
        rounds: after the warm-up.
        quick: smaller sizes, to see that everything works; the figures mean nothing.
        data_dir: where data sets are.
        embeddings: file that ``nnheads bench embeddings`` wrote.
        only: part of the name of the cases to measure; all by default.
    """

    rounds: int = 5
    quick: bool = False
    data_dir: Path | None = None
    embeddings: Path | None = None
    only: str = ""

    def wants(self, case: str) -> bool:
        return self.only in case


@final
@dataclass(frozen=True)
class Timings:
    """Seconds of each contender in each round.

    Attributes:
        seconds: by contender, a number a round.
    """

    seconds: Mapping[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of one contender's time over another's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=False))

    def fastest(self, names: list[str]) -> str:
        return min(names, key=self.median)

    def row(self, case: str) -> Row:
        """The case, milliseconds of everyone, the fastest of the others and our ratio to it."""
        peers = [name for name in self.seconds if not name.startswith(OURS)]
        row: Row = {"case": case, "ms": {name: round(1e3 * self.median(name), 4) for name in self.seconds}}
        if peers and OURS in self.seconds:
            row["fastest_peer"] = self.fastest(peers)
            row["ratio"] = self.ratio(OURS, row["fastest_peer"])
        return row


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Clock | None = None,
    *,
    patient: bool = False,
) -> Timings:
    """Time calls in turn: each once a round, so that whatever else the machine does meets all of them alike.

    Calls shorter than 5 ms are repeated within a round and their mean is taken. Who takes more than four times as long
    as the fastest in the warm-up is timed in the first round alone, unless we are ``patient``. Where torch has a CUDA
    device, it is waited for.
    ``clock`` gives seconds; by default `own_clock`.

    Raises:
        ConfigError: no round.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be 1 or more, got {rounds}")
    clock = clock or own_clock()
    first: dict[str, float] = {}
    for name, call in contenders.items():
        first[name] = min(_seconds(call, 1, clock) for _ in range(warm_up))
        if first[name] < 1:
            first[name] = min(first[name], _seconds(call, 1, clock))
    repeats = {name: max(1, min(1000, math.ceil(_ROUND_SECONDS / max(once, 1e-7)))) for name, once in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    least = math.inf if patient else _HOPELESS * min(first.values())
    hopeless = {name for name, once in first.items() if once > least}
    enabled = gc.isenabled()
    gc.disable()  # collections fall on whoever is running
    try:
        for number in range(rounds):
            for name, call in contenders.items():
                if number and name in hopeless:
                    continue
                seconds[name].append(_seconds(call, repeats[name], clock) / repeats[name])
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return Timings(seconds)


def own_clock(device: torch.device | None = None) -> Clock:
    """Processor time where one thread of a CPU does all the work, so that what else runs on the core does not count;
    wall time elsewhere. ``device`` does it, by default the one that is taken by default."""
    alone = (device or resolve_device()).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def document(
    name: str, bar: str, rows: list[Row], settings: Settings, *, wall: bool = False, gpu: bool = False
) -> dict[str, Any]:
    """A measurement as JSON: rows, how they were made, and on what.

    Args:
        name, bar: of the measurement.
        rows: what was found.
        settings: how.
        wall: whether by wall time, not `own_clock`.
        gpu: whether on a GPU where there is one.
    """
    judged = [row["met"] for row in rows if "met" in row]
    return {
        "benchmark": name,
        "bar": bar,
        "met": f"{sum(judged)} of {len(judged)}" if judged else "nothing to judge",
        "rows": rows,
        "rounds": settings.rounds,
        "quick": settings.quick,
        "threads": torch.get_num_threads(),
        "clock": "processor time" if not wall and own_clock() is time.process_time else "wall",
        "device": device_name(resolve_device() if gpu else torch.device("cpu")),
        "processor": _processor(),
        "versions": {**versions(), **peer_versions()},
    }


def resident_bytes(*, reset: bool = False) -> tuple[int, int]:
    """Resident memory of this process, now and at its highest since the last ``reset``; Linux alone."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5): forgets the highest
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return 1024 * kilobytes["VmRSS"], 1024 * kilobytes["VmHWM"]


def peer_versions() -> dict[str, str]:
    """Versions of the packages we are compared with; ``none`` where one is not installed."""
    found = {}
    for name, package in _PEERS.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def needs(package: str) -> None:
    """ConfigError where a peer is not installed."""
    if peer_versions()[package] == "none":
        raise ConfigError(f"this compares with {package}: pip install 'nnheads[test]'")


def _seconds(call: Callable[[], object], times: int, clock: Clock) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    started = clock()
    for _ in range(times):
        call()
    if cuda:
        torch.cuda.synchronize()
    return clock() - started


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if any(kind in line for line in lines)]
    return f"{names[0] if names else platform.machine()} ({', '.join(kinds)})"
