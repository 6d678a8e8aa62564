"""``nnheads study``: the papers' experiments, rerun, beside the published numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnheads.cli import options, screen
from nnheads.cli.folders import newest, results_folder
from nnheads.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nnheads.benchmarks.studies.running import StudyRun


def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a study, or list.")],
    table: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="ID", help="This table or figure alone; may be given several times."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            "--scale", metavar="NAME", help="smoke (seconds), cpu (half an hour on 2 cores) or paper (a GPU)."
        ),
    ] = "cpu",
    data_dir: options.DataDir = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,...", help="Run every cell once with each seed.")] = "0",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what is finished in --out, or in the newest runs/study-NAME-SCALE-NNN."),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing: make the tables and figures from what is finished.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="CELL", help="These cells alone, as 'mnist-*'; may be given several times."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the results (by default runs/study-NAME-SCALE-NNN)."),
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Rerun the experiments of a paper: every table and figure, beside the published numbers.

    Several processes with the same --out and --resume share the work, as do those that torchrun starts.
    """
    given = options.seeds(seeds)
    if name == "list":
        _list(as_json)
        return
    options.set_threads(threads)
    from nnheads.benchmarks.studies.registry import get_study
    from nnheads.benchmarks.studies.running import StudyRun, read_cells

    chosen = get_study(name)
    data_dir = None if data_dir is None else data_dir.expanduser()
    chosen.scale(scale)  # a name that is wrong is told before anything is made
    plan = StudyRun(chosen, scale, tuple(table or ()), given, tuple(only or ()), data_dir, device)
    stem = f"study-{chosen.name}-{scale}"
    if out is None and (resume or report):
        out = newest(stem)
        if out is None:
            raise ConfigError(f"no {stem}-NNN in runs/: name the folder with --out, or leave --resume and --report out")
    if report:
        assert out is not None
        _report(plan, out, read_cells(out, chosen), as_json, quiet)
        return
    plan.study.chosen(scale, plan.tables, plan.only)
    with screen.interruptible(lambda: "nothing"), results_folder(out, stem, resume=resume) as folder:
        if "RANK" in os.environ:
            _together(plan, out, resume, as_json, quiet)
            return
        results = _run(plan, folder, resume, quiet or as_json)
        _report(plan, folder, results, as_json, quiet)


def _together(plan: StudyRun, out: Path | None, resume: bool, as_json: bool, quiet: bool) -> None:
    """Cells are shared out among the processes that torchrun started, each on a device of its own; the first reports.

    Nothing is sent between them, so that a cell may take as long as it likes.
    """
    from nnheads import distributed
    from nnheads.benchmarks.studies.running import check_fresh

    if out is None:
        raise ConfigError("processes of torchrun need the same folder: name it with --out")
    folder, main = out.expanduser(), distributed.launched_rank() == 0
    distributed.join()
    if main and not resume:
        check_fresh(folder)
    distributed.wait()
    with distributed.alone():
        try:
            results = _run(plan, folder, True, quiet or as_json or not main, wait=main)
        except DataError:
            if main:  # one that found no images for its cells leaves the others at work
                raise
        if main:
            _report(plan, folder, results, as_json, quiet)
    distributed.leave()


def _run(plan: StudyRun, folder: Path, resume: bool, quiet: bool, *, wait: bool = False) -> list[dict[str, Any]]:
    from nnheads.benchmarks.studies.running import run_study
    from nnheads.cli.progress import Bar

    files = [path for _, _, path in plan.files(folder)]

    def kept() -> str:
        done = sum(path.is_file() for path in files)
        return f"{done} of {len(files)} cells in {folder}; go on with --resume --out {folder}" if done else "nothing"

    with screen.interruptible(kept), Bar(shown=not quiet) as bar:

        def finished(result: dict[str, Any], done: int, total: int) -> None:
            spent = screen.duration(result["seconds"])
            bar.line(f"{done} of {total}: {result['cell']}, seed {result['seed']}: {spent}")

        def skipped(cell: str, reason: str) -> None:
            bar.line(f"skipped {cell}: {reason}")

        return run_study(plan, folder, resume=resume, wait=wait, progress=bar, finished=finished, skipped=skipped)


def _report(plan: StudyRun, folder: Path, results: list[dict[str, Any]], as_json: bool, quiet: bool) -> None:
    from nnheads.benchmarks.studies.report import entry_text, write_report
    from nnheads.benchmarks.studies.study import UNITS

    if not results:
        raise ConfigError(f"no results of study {plan.study.name!r} in {folder}: another process may be at them")
    path = write_report(plan.study, folder, plan.tables)
    if as_json:
        screen.print_json({"study": plan.study.name, "results": results, "report": str(path)})
        return
    ran = {result["cell"] for result in results}
    wanted = {plan.study.table(table_id).id for table_id in plan.tables}
    if not quiet:
        screen.line(f"scale {plan.scale}: {plan.study.scale(plan.scale).describes}\n")
    for table in plan.study.tables:
        entries = [entry for entry in table.entries if entry.cell in ran]
        if quiet or not entries or (wanted and table.id not in wanted):
            continue
        rows = [[entry.row, entry.column, entry_text(entry, results), UNITS[entry.form]] for entry in entries]
        heads = ["", " ", "measured (published)", "unit"]
        screen.table(f"{table.id}: {table.title}", heads, rows, text=["", " ", "unit"])
        screen.line("")
    screen.line(f"report: {path}")


def _list(as_json: bool) -> None:
    from nnheads.benchmarks.studies.registry import get_study, list_studies

    studies = [get_study(name) for name in list_studies()]
    if as_json:
        found = [
            {
                "name": each.name,
                "title": each.title,
                "source": each.source,
                "tables": {table.id: table.title for table in each.tables},
                "cells": {scale: [cell.name for cell in each.chosen(scale)] for scale in each.scales},
            }
            for each in studies
        ]
        screen.print_json(found)
        return
    rows = [
        [each.name, *(str(len(each.chosen(scale))) for scale in each.scales), ", ".join(t.id for t in each.tables)]
        for each in studies
    ]
    heads = ["study", "smoke", "cpu", "paper", "tables (--table)"]
    screen.table("cells at each scale (--scale)", heads, rows, text=["study", "tables (--table)"], wrapped=[heads[-1]])
