"""Runs the cells of a study: a JSON file a cell and seed, written whole when it is done, never made twice."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from nnheads.benchmarks.locks import exclusive, tidy
from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.studies.study import Cell, Job, Outcome, Study
from nnheads.errors import CheckpointError, ConfigError, DataError

CELLS = "cells"
"""The folder with the results, in that of the study."""

Progress = Callable[[str, int, int], None]

_LOOK_AGAIN = 0.5  # seconds


@final
@dataclass(frozen=True)
class StudyRun:
    """What is to be run.

    Attributes:
        study: see `nnheads.benchmarks.studies.registry`.
        scale: ``"smoke"``, ``"cpu"`` or ``"paper"``.
        tables: ids; all where there are none.
        seeds: each cell is run once with each.
        only: patterns of cell names; all where there are none.
        data_dir: where images are; None for the usual places.
        device: see `nnheads.training.resolve_device`.
    """

    study: Study
    scale: str = "cpu"
    tables: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] = ()
    data_dir: Path | None = None
    device: str = "auto"

    def files(self, out: Path) -> list[tuple[Cell, int, Path]]:
        """Each cell and seed with the file of its results."""
        cells = self.study.chosen(self.scale, self.tables, self.only)
        return [(cell, seed, cell_file(out, cell.name, seed)) for seed in self.seeds for cell in cells]


def cell_file(out: Path, cell: str, seed: int) -> Path:
    """Where the results of a cell are, in the folder of a study."""
    return out / CELLS / f"{cell}-seed{seed}.json"


def run_study(
    plan: StudyRun,
    out: Path,
    *,
    resume: bool = False,
    wait: bool = False,
    progress: Progress | None = None,
    finished: Callable[[dict[str, Any], int, int], None] | None = None,
    skipped: Callable[[str, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells that have not been run, and returns the results of all that have.

    Several processes with the same ``out`` and ``resume`` share the work.

    Args:
        plan: what to run.
        out: folder of the study.
        resume: keep the cells that ``out`` holds already; without it, such a folder is refused.
        wait: until cells that other processes are at are finished, too, and take over those that they leave.
        progress: called as the work goes on.
        finished: called with each new result, how many of all are done, and how many there are.
        skipped: called with the cell's name and the reason where a cell's images are missing.

    Raises:
        ConfigError: ``out`` holds results and ``resume`` is False, or they were made with other settings.
        DataError: no cell could be run for want of its images.
        CheckpointError: a file in ``out`` cannot be read or written.
    """
    files = plan.files(out)
    if not resume:
        check_fresh(out)
    _check_same_study(plan, out)
    found = {path: _held(plan, cell, seed, path) for cell, seed, path in files}
    for path, result in found.items():
        if result is not None:
            tidy(_lock(path))
    missing: DataError | None = None
    pending = deque(entry for entry in files if found[entry[2]] is None)
    while pending:
        cell, seed, path = pending.popleft()
        with exclusive(_lock(path)) as mine:
            # another process is at it, or has finished it since we looked
            found[path] = _held(plan, cell, seed, path) if mine else None
            if not mine and wait:
                pending.append((cell, seed, path))
                time.sleep(_LOOK_AGAIN / len(pending))
            if not mine or found[path] is not None:
                continue
            done = sum(result is not None for result in found.values())
            what = f"{cell.name}, seed {seed}"
            try:
                found[path] = result = _run(plan, cell, seed, _report(progress, what))
            except DataError as error:
                missing = error
                if skipped is not None:
                    skipped(cell.name, str(error))
                continue
            write_json(path, result)
            if finished is not None:
                finished(result, done + 1, len(files))
    results = [result for result in found.values() if result is not None]
    if not results and missing is not None:
        raise missing
    return results


def _lock(results: Path) -> Path:
    return results.parent / f".{results.stem}.lock"


def check_fresh(out: Path) -> None:
    """ConfigError where a folder holds results."""
    if any((out / CELLS).glob("*.json")):
        raise ConfigError(f"{out} holds results already: give another --out, or --resume to finish what is there")


def _check_same_study(plan: StudyRun, out: Path) -> None:
    """ConfigError where a folder holds cells of another study or scale, with which no report could be made."""
    for path in sorted((out / CELLS).glob("*.json")):
        held = _read(path)
        if (held["study"], held["scale"]) != (plan.study.name, plan.scale):
            raise ConfigError(
                f"{out} holds study {held['study']} at scale {held['scale']}, not {plan.study.name} at scale "
                f"{plan.scale}: give another --out"
            )


def read_cells(out: Path, study: Study) -> list[dict[str, Any]]:
    """The results in a study's folder, of the cells that the study has.

    Raises:
        CheckpointError: a file is damaged, or of another study.
    """
    names = {cell.name for cell in study.cells}
    results = []
    for path in sorted((out / CELLS).glob("*.json")):
        result = _read(path)
        if result["study"] != study.name:
            raise CheckpointError(f"{path} is of study {result['study']!r}, not {study.name!r}: name its own folder")
        if result["cell"] in names:
            results.append(result)
    return results


def _run(plan: StudyRun, cell: Cell, seed: int, report: Progress) -> dict[str, Any]:
    from nnheads.training import resolve_device

    settings = plan.study.settings(cell, plan.scale)
    started = time.perf_counter()
    outcome = plan.study.run(Job(settings, seed, plan.data_dir, plan.device, report))
    seconds = time.perf_counter() - started
    return {
        **_identity(plan, cell, seed),
        "measures": {name: _finite(value) for name, value in outcome.measures.items()},
        "series": _series(outcome),
        "seconds": seconds,
        "device": device_name(resolve_device(plan.device)),
        "versions": versions(),
    }


def _identity(plan: StudyRun, cell: Cell, seed: int) -> dict[str, Any]:
    settings = plan.study.settings(cell, plan.scale)
    plain = json.loads(json.dumps(settings))  # tuples are lists, as in what is read back
    return {"study": plan.study.name, "cell": cell.name, "scale": plan.scale, "seed": seed, "config": plain}


def _held(plan: StudyRun, cell: Cell, seed: int, path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    result = _read(path)
    wanted = _identity(plan, cell, seed)
    for key, value in wanted.items():
        if result[key] != value:
            raise ConfigError(
                f"{path} was made with other settings ({_difference(key, result[key], value)}): give another --out"
            )
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}): remove it and run again with --resume") from error
    if not isinstance(content, dict) or not {"study", "cell", "scale", "seed", "config", "measures"} <= set(content):
        raise CheckpointError(f"{path} was not written by nnheads study: remove it, or give another --out")
    return content


def _difference(key: str, held: Any, wanted: Any) -> str:
    if isinstance(held, dict) and isinstance(wanted, dict):
        for inner in sorted({*held, *wanted}):
            if held.get(inner) != wanted.get(inner):
                return f"{inner} {held.get(inner)!r}, not {wanted.get(inner)!r}"
    return f"{key} {held!r}, not {wanted!r}"


def _report(progress: Progress | None, prefix: str) -> Progress:
    def report(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{prefix}: {what}", done, total)

    report("starting", 0, 0)
    return report


def _series(outcome: Outcome) -> dict[str, dict[str, list[Any]]]:
    return {
        name: {key: [_finite(value) for value in values] for key, values in columns.items()}
        for name, columns in outcome.series.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_scale(results: Sequence[dict[str, Any]]) -> str | None:
    """The scale that all results share; None where there are none.

    Raises:
        ConfigError: they are of several.
    """
    scales = sorted({result["scale"] for result in results})
    if len(scales) > 1:
        raise ConfigError(f"the results are of several scales ({', '.join(scales)}): keep each in a folder of its own")
    return scales[0] if scales else None
