"""Strategies side by side on a stream: one JSON file a run, and means and spreads over the seeds.

Finished runs are never made again, and several processes may work on the same folder: a run is locked while it is made.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from nnheads.benchmarks.locks import exclusive, tidy
from nnheads.benchmarks.measures import mean_and_spread, seen_accuracy
from nnheads.benchmarks.results import SUMMARY, check_same_comparison, write_json
from nnheads.benchmarks.stream_cell import StreamCell
from nnheads.benchmarks.stream_comparison import REFERENCE, StreamComparison, stream_cells
from nnheads.errors import ConfigError, DivergedError
from nnheads.strategies.registry import strategy_spec

__all__ = [
    "MEASURES",
    "StreamCell",
    "StreamComparison",
    "all_cells",
    "compare_streams",
    "stream_cells",
    "summarize_streams",
]

Group = tuple[int | None, str]
"""The runs of a row: with which memory (None: one of its own, or none), and its name."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is (0: not known)."""

MEASURES: Final = (
    "accuracy",
    "forgetting",
    "anytime_accuracy",
    "gradient_samples",
    "memory_bytes",
    "seconds",
    "time_ratio",
)
"""What is measured: ``seconds`` of training and evaluation, ``time_ratio`` over those of the reference with the same
memory and seed, where both were made on one kind of machine."""

VALIDATION: Final = "validation"
"""Folder of the runs by which learning rates are chosen."""

_POLL_SECONDS: Final = 1.0


def compare_streams(
    plan: StreamComparison,
    out: Path,
    *,
    resume: bool = False,
    only: Sequence[str] = (),
    progress: Progress | None = None,
    finished: Callable[[dict[str, Any], int, int], None] | None = None,
) -> dict[str, Any]:
    """Runs every variant with every memory and seed, as far as that is not done yet and not being done elsewhere.

    Args:
        plan: what to compare.
        out: folder of the results, made where it is missing: a file for each run, ``summary.json``, and
            ``validation/`` with the same for the choice of learning rates.
        resume: keep the runs that ``out`` holds already, go on with interrupted ones, and leave out those that another
            process is making; without it, a folder with results, or with a run that was begun, is refused.
        only: see `stream_cells`. Learning rates are tried for the rows of these runs alone; the other rows are in the
            summary as far as theirs are chosen already.
        progress: called as the work goes on.
        finished: called with the results of each run once they are written, and how many of how many runs are done.

    Returns:
        The summary, as `summarize_streams` makes it, of all runs that are finished, and ``learning_rates`` by row as
        they were chosen among its ``rates``.

    Raises:
        ConfigError: see `StreamComparison.check` and `stream_cells`; or ``out`` holds results and ``resume`` is False,
            or they were made with other settings or of another stream. Where they were made with a learning rate that
            is no longer the one chosen, they are set aside, see `StreamCell.set_aside`, and made anew.
        DataError: the images are missing or damaged.
        CheckpointError: a file in ``out`` cannot be read.
    """
    plan.check()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    begun = out.is_dir() and (any(out.glob("*.json")) or any(out.glob(".*.checkpoint")) or (out / VALIDATION).exists())
    if begun and not resume:
        raise ConfigError(f"{out} holds results already: give another --out, or --resume to finish what is there")
    check_same_comparison(out, "stream", plan.base.stream)
    wanted = stream_cells(plan, out, only)
    names, rows = {cell.name for cell in wanted}, {cell.variant.name for cell in wanted}
    tried: dict[str, tuple[float, ...]] = {}
    chosen: dict[str, float] = {}
    waiting: set[str] = set()  # rows whose learning rate nobody has asked for yet
    if plan.rates:
        tried, chosen = _pick_rates(plan, rows, out / VALIDATION, progress, finished)
        waiting = {variant.name for variant in plan.free_variants} - set(chosen)
        plan = plan.with_rates(chosen)
    every = stream_cells(plan, out)
    cells = [cell for cell in every if cell.variant.name not in waiting]
    for cell in cells:
        if cell.variant.name in chosen:
            with exclusive(cell.lock) as mine:
                if mine:
                    cell.set_aside()
    _check(cells)
    diverged: dict[str, DivergedError] = {}
    _make([cell for cell in cells if cell.name in names], diverged, progress, finished)
    summary = summarize_streams(plan, cells)
    summary |= {
        "runs": len(every),
        "learning_rates": chosen,
        "rates": {name: list(tried[name]) for name in chosen},
    }
    write_json(out / SUMMARY, summary)
    if diverged:
        raise DivergedError("; ".join(f"{name}: {error}" for name, error in diverged.items()))
    return summary


def all_cells(plan: StreamComparison, out: Path, only: Sequence[str] = ()) -> list[StreamCell]:
    """All runs that `compare_streams` will want, those by which learning rates are chosen included."""
    wanted = stream_cells(plan, out, only)
    rows = {cell.variant.name for cell in wanted}
    mine = replace(plan, variants=tuple(variant for variant in plan.variants if variant.name in rows))
    trials = stream_cells(mine.trials(), out / VALIDATION) if plan.rates else []
    return trials + wanted


def summarize_streams(plan: StreamComparison, cells: Sequence[StreamCell]) -> dict[str, Any]:
    """One row for each variant and memory: the mean of each measure over the seeds and its spread.

    Args:
        plan: what was compared.
        cells: its runs.

    Returns:
        ``kind``, ``stream``, ``seeds``, ``runs`` and ``finished`` (how many), ``reference`` (whose time ``time_ratio``
        is over), ``settings`` and ``rows``. A row has ``name``, ``strategy``, ``head``, ``memory`` (None where it does
        not matter), ``seeds`` (those that are finished), ``curve`` (accuracy on all classes seen after each experience:
        ``mean`` and ``spread``, lists) and for each of the `MEASURES` ``mean`` and ``spread`` (sample standard
        deviation, None for one seed), or None where there is nothing to measure.
    """
    names = [variant.name for variant in plan.variants]
    reference = REFERENCE if REFERENCE in names else names[0]
    groups: dict[Group, dict[int, dict[str, Any]]] = {}
    allowed: dict[Group, int | None] = {}  # how many exemplars; None where there are none
    for cell in cells:
        result = cell.finished()
        if result is not None:
            group = cell.memory, cell.variant.name
            groups.setdefault(group, {})[cell.seed] = result
            allowed[group] = cell.config.memory if strategy_spec(cell.variant.strategy).uses_memory else None
    return {
        "kind": "stream",
        "stream": plan.base.stream,
        "seeds": list(plan.seeds),
        "runs": len(cells),
        "finished": sum(map(len, groups.values())),
        "reference": reference,
        "settings": _shared(plan),
        "rows": [
            _row(name, memory, groups[memory, name], _reference(groups, allowed, reference, (memory, name)))
            for memory, name in sorted(groups, key=lambda group: names.index(group[1]))
        ],
    }


def _reference(
    groups: dict[Group, dict[int, dict[str, Any]]], allowed: dict[Group, int | None], name: str, row: Group
) -> dict[int, dict[str, Any]]:
    """By seed, the runs of the row ``name`` that were allowed as many exemplars as those of ``row``.

    Runs with any number do where it does not matter to one of the two, or where the row ``name`` has a memory of its
    own.
    """
    for other, runs in groups.items():
        memory, found = other
        if found == name and (memory is None or allowed[row] is None or allowed[other] == allowed[row]):
            return runs
    return {}


def _row(
    name: str, memory: int | None, runs: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    one = next(iter(runs.values()))
    measured: dict[str, list[float | None]] = {
        measure: [run[measure] for run in runs.values()] for measure in MEASURES if measure in one
    }
    measured["seconds"] = [_seconds(run) for run in runs.values()]
    measured["time_ratio"] = [_time_ratio(run, reference.get(seed)) for seed, run in runs.items()]
    curves = [
        [seen_accuracy(run["accuracy_matrix"], run["test_counts"], i) for i in range(len(run["accuracy_matrix"]))]
        for run in runs.values()
    ]
    points = [mean_and_spread(values) for values in zip(*curves, strict=True)]
    return {
        "name": name,
        "strategy": one["strategy"],
        "head": one["head"],
        "memory": memory,
        "seeds": list(runs),
        **{measure: mean_and_spread(measured[measure]) for measure in MEASURES},
        "curve": {
            "mean": [point["mean"] for point in points if point],
            "spread": [point["spread"] for point in points if point],
        },
    }


def _time_ratio(run: dict[str, Any], reference: dict[str, Any] | None) -> float | None:
    """None where there is no reference, or it is not known to be of the same machine and the same torch."""
    if reference is None or _made_on(run) != _made_on(reference) or run.get("processor") is None:
        return None
    return _seconds(run) / _seconds(reference)


def _made_on(run: dict[str, Any]) -> tuple[Any, ...]:
    return run.get("processor"), run.get("device"), run.get("versions", {}).get("torch")


def _seconds(run: dict[str, Any]) -> float:
    return float(run["train_seconds"]) + float(run["eval_seconds"])


def _shared(plan: StreamComparison) -> dict[str, Any]:
    """What all runs have in common."""
    given = plan.base.to_dict()
    return {name: value for name, value in given.items() if name not in ("strategy", "head", "memory", "seed")}


def _pick_rates(
    plan: StreamComparison,
    rows: set[str],
    folder: Path,
    progress: Progress | None,
    finished: Callable[[dict[str, Any], int, int], None] | None,
) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    """By row, the rates tried and the one with the best accuracy on held-out images; the lower of two as good.

    What is missing is tried for ``rows`` alone; others are chosen for where all that it takes is there.
    """
    tried = {variant.name: tuple(sorted(plan.rates)) for variant in plan.free_variants}
    diverged: dict[str, DivergedError] = {}
    while True:
        trials = plan.trials(tried)
        names = {
            variant.name: {rate: variant.with_setting("lr", rate).name for rate in tried[variant.name]}
            for variant in plan.free_variants
        }
        cells = stream_cells(trials, folder)
        _check(cells)
        wanted = {name for row in rows & names.keys() for name in names[row].values()}
        gone = _diverged(cells)
        _make([cell for cell in cells if cell.variant.name in wanted], gone, progress, finished, wait=True)
        diverged |= {cell.variant.name: gone[cell.name] for cell in cells if cell.name in gone}
        found = summarize_streams(trials, cells)
        write_json(folder / SUMMARY, found)
        accuracy = {row["name"]: row["accuracy"]["mean"] for row in found["rows"]}
        chosen = {
            row: max(trial, key=lambda rate: accuracy.get(trial[rate], -1.0))
            for row, trial in names.items()
            if accuracy.keys() | diverged.keys() >= set(trial.values())
        }
        for row, rate in list(chosen.items()):
            if names[row][rate] not in accuracy:  # so did all others
                if row in rows:
                    raise diverged[names[row][rate]]
                del chosen[row]
        further = {row: plan.rate_beyond(tried[row], rate) for row, rate in chosen.items()}
        if not plan.extend_rates or not any(further.values()):
            return tried, chosen
        tried |= {row: tuple(sorted({*tried[row], rate})) for row, rate in further.items() if rate is not None}


# ---- the work ----------------------------------------------------------------------------------------------------


def _check(cells: Sequence[StreamCell]) -> None:
    """Raise what is wrong with any finished run, before hours are spent on others."""
    for cell in cells:
        cell.finished()


def _diverged(cells: Sequence[StreamCell]) -> dict[str, DivergedError]:
    """The runs that diverged before, by name."""
    found = {cell.name: cell.diverged() for cell in cells if not cell.results.is_file()}
    return {name: error for name, error in found.items() if error is not None}


def _make(
    cells: Sequence[StreamCell],
    diverged: dict[str, DivergedError],
    progress: Progress | None,
    finished: Callable[[dict[str, Any], int, int], None] | None,
    *,
    wait: bool = False,
) -> None:
    """Makes the runs that are missing; those that another process makes are left to it, or waited for.

    ``diverged`` gets the runs that diverge, or did before, by name; they have no results then.
    """
    for cell in cells:
        if cell.results.is_file():
            _tidy(cell)
    missing = [cell for cell in cells if not cell.results.is_file() and cell.name not in diverged]
    while missing:
        left = []
        for cell in missing:
            with exclusive(cell.lock) as mine:
                if not mine:
                    left.append(cell)
                elif (before := cell.diverged()) is not None:
                    diverged[cell.name] = before
                elif cell.finished() is None:
                    try:
                        result = _run(cell, progress)
                    except DivergedError as error:
                        cell.record_divergence(error)
                        diverged[cell.name] = error
                        if progress is not None:
                            progress(f"{cell.name} diverged", 0, 0)
                        continue
                    write_json(cell.results, result)
                    cell.divergence.unlink(missing_ok=True)  # one of other settings
                    shutil.rmtree(cell.checkpoint, ignore_errors=True)
                    if finished is not None:
                        finished(result, sum(c.results.is_file() for c in cells), len(cells))
        missing = left if wait else []
        if missing:
            if progress is not None:
                progress(f"waiting for another process: {missing[0].name}", 0, 0)
            time.sleep(_POLL_SECONDS)


def _tidy(cell: StreamCell) -> None:
    """Removes what a process left beside a finished run that was killed just then."""
    tidy(cell.lock)
    shutil.rmtree(cell.checkpoint, ignore_errors=True)


def _run(cell: StreamCell, progress: Progress | None) -> dict[str, Any]:
    from nnheads.benchmarks.checkpoint import is_checkpoint
    from nnheads.benchmarks.runner import run

    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{cell.name}: {what}", done, total)

    resumable = strategy_spec(cell.variant.strategy).ours
    found = run(
        cell.config,
        None,
        progress=tell,
        save_model=False,
        checkpoint=cell.checkpoint if resumable else None,
        resume=resumable and is_checkpoint(cell.checkpoint),
    )
    return {"variant": cell.variant.name, "memory": cell.memory, "asked": cell.asked(), **found}
