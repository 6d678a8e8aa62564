"""How soon the package answers: fresh processes, the interpreter's own start included and shown beside."""

from __future__ import annotations

import subprocess
import sys
import time

from nnheads.benchmarks.speed.harness import Report, Row, Settings, in_turn

_CALLS = {
    "python alone": [sys.executable, "-c", "pass"],
    "import nnheads": [sys.executable, "-c", "import nnheads"],
    "nnheads --help": [sys.executable, "-m", "nnheads", "--help"],
}
_BARS = {"import nnheads": 0.2, "nnheads --help": 0.5}


def rows(settings: Settings, report: Report) -> list[Row]:
    """Wall time of each."""
    calls = {name: (lambda command=command: _call(command)) for name, command in _CALLS.items()}
    timings = in_turn(calls, settings.rounds, clock=time.perf_counter)
    found = []
    for name in _CALLS:
        seconds = timings.median(name)
        row: Row = {"case": name, "seconds": seconds}
        if name in _BARS:
            row["met"] = seconds < _BARS[name]
        found.append(row)
        report(f"{name}: {seconds:.3f} s")
    return found


def _call(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
