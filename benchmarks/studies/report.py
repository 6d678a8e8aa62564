"""The report of a study, made from the files of its cells alone: published numbers beside measured ones, a dash for
what was not run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from nnheads.benchmarks.measures import mean_and_spread
from nnheads.benchmarks.studies.figures import draw
from nnheads.benchmarks.studies.running import read_cells, read_scale
from nnheads.benchmarks.studies.study import UNITS, Entry, Form, Study, Table
from nnheads.errors import ConfigError
from nnheads.storage import replace_text

REPORT: Final = "report.md"
DASH: Final = "-"


def write_report(study: Study, out: Path, tables: Sequence[str] = ()) -> Path:
    """Writes ``report.md`` and a figure for each table of which something was run.

    Args:
        study: the study.
        out: its folder, with the cells' files.
        tables: ids of those to show; by default those of which something was run.

    Returns:
        The report.

    Raises:
        ConfigError: there are no results, or they are of several scales.
        CheckpointError: a file cannot be read or written.
    """
    results = read_cells(out, study)
    scale = read_scale(results)
    if scale is None:
        raise ConfigError(f"no results of study {study.name!r} in {out}: run it first, or name its folder with --out")
    ran = {result["cell"] for result in results}
    shown = [study.table(table_id) for table_id in tables] or [t for t in study.tables if ran & set(t.cells)]
    parts = [_head(study, scale, results)]
    for table in shown:
        figure = draw(study, table, results, out / f"{_stem(table)}.png")
        parts.append(table_markdown(table, results, figure))
    text = "\n\n".join(parts) + "\n"
    replace_text(out / REPORT, text)
    return out / REPORT


def table_markdown(table: Table, results: Sequence[dict[str, Any]], figure: Path | None = None) -> str:
    """One table as Markdown: measured numbers, and in brackets the published ones."""
    lines = [f"## {table.id}: {table.title}"]
    if table.note:
        lines += ["", table.note]
    if table.entries:
        lines += ["", *_grid(table, results)]
    if figure is not None:
        lines += ["", f"![{table.title}]({figure.name})"]
    return "\n".join(lines)


def measured(entry: Entry, results: Sequence[dict[str, Any]]) -> dict[str, float | None] | None:
    """Mean and spread over the seeds of the number of an entry; None where it was not measured."""
    values = [result["measures"].get(entry.measure) for result in results if result["cell"] == entry.cell]
    return mean_and_spread(values)


def shown_number(value: float, form: Form) -> str:
    """A measured number in the form of its column."""
    if form in ("percent", "points"):
        return f"{100 * value:.2f}"
    if form == "share":
        return f"{value:.4f}"
    if form in ("count", "bytes"):
        return f"{value:,.0f}"
    return f"{value:.3g}" if form in ("ms", "nats") else f"{value:.1f}"


def entry_text(entry: Entry, results: Sequence[dict[str, Any]]) -> str:
    """What stands in a table: ``99.41 ± 0.05 (99.44)``, measured, spread over the seeds, and published."""
    found = measured(entry, results)
    text = DASH
    if found is not None and found["mean"] is not None:
        text = shown_number(found["mean"], entry.form)
        if found["spread"] is not None:
            text += f" ± {shown_number(found['spread'], entry.form)}"
    if entry.published is not None:
        number = f"{entry.published:,.0f}" if entry.form in ("count", "bytes") else f"{entry.published:g}"
        text += f" ({number})"
    return text


def _grid(table: Table, results: Sequence[dict[str, Any]]) -> list[str]:
    rows = list(dict.fromkeys(entry.row for entry in table.entries))
    columns = list(dict.fromkeys(entry.column for entry in table.entries))
    at = {(entry.row, entry.column): entry for entry in table.entries}
    forms = {column: {e.form for e in table.entries if e.column == column} for column in columns}
    units = {c: "" if "%" in c or len(f) > 1 or f & {"share", "count"} else UNITS[min(f)] for c, f in forms.items()}
    heads = [f"{column} {units[column]}".strip() for column in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        texts = [entry_text(at[row, column], results) if (row, column) in at else "" for column in columns]
        for place, column in enumerate(columns):  # a column of several units has them beside its numbers
            form = at[row, column].form if (row, column) in at and len(forms[column]) > 1 else "share"
            if form not in ("share", "count") and texts[place] != DASH:
                texts[place] += f" {UNITS[form]}"
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return lines


def _head(study: Study, scale: str, results: Sequence[dict[str, Any]]) -> str:
    seeds = sorted({result["seed"] for result in results})
    devices = sorted({result["device"] for result in results})
    torches = sorted({result["versions"]["torch"] for result in results})
    seconds = sum(result["seconds"] for result in results)
    lines = [
        f"# {study.name}: {study.title}",
        "",
        f"Source: {study.source}. In brackets the published numbers; {DASH} was not run.",
        "",
        f"Scale {scale}: {study.scale(scale).describes} Seeds {', '.join(map(str, seeds))}"
        + ("; ± is the sample standard deviation over them" if len(seeds) > 1 else "")
        + f". {len(results)} cells in {seconds:,.0f} s on {', '.join(devices)}, torch {', '.join(torches)}.",
    ]
    if study.note:
        lines += ["", study.note]
    return "\n".join(lines)


def _stem(table: Table) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in table.id)
