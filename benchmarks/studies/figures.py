"""Figures of a study: curves where the paper has curves, else measured against published numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnheads.benchmarks.measures import mean_and_spread
from nnheads.benchmarks.plots import new_figure, save_figure, wrapped_title
from nnheads.benchmarks.studies.pictures import picture
from nnheads.benchmarks.studies.study import Curves, Entry, Study, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AXES = {
    "points": "difference (percentage points)",
    "share": "share (0 to 1)",
    "seconds": "time (s)",
    "bytes": "size (bytes)",
    "nats": "nats",
    "ms": "time (ms)",
}
"""What the axis of a form is called; of per cent and whole numbers it is the table's quantity."""


def draw(study: Study, table: Table, results: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Draws the figure of a table from the cells' results.

    Returns:
        The file; None where nothing of it was run.
    """
    own = [result for result in results if result["cell"] in table.cells]
    if not own:
        return None
    if table.curves is not None:
        made = _curves(table.curves, own)
    elif table.picture is not None:
        made = picture(table.picture, own)
    else:
        made = _points(table, own)
    if made is None:
        return None
    shown = _seeds(own) + (" (mean ± standard deviation)" if len({result["seed"] for result in own}) > 1 else "")
    title = f"{study.name}, {table.id}: {table.title}. Scale {own[0]['scale']}, {shown}; after {study.source}"
    made.suptitle(wrapped_title(title, made.get_figwidth()), fontsize=9)
    return save_figure(made, path)


def _curves(curves: Curves, results: Sequence[dict[str, Any]]) -> Figure | None:
    shown = [name for name in curves.cells if any(_columns(curves, r) for r in results if r["cell"] == name)]
    if not shown:
        return None
    across = 2 if len(shown) == 4 else min(3, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(max(6.0, 4.2 * across), 3.6 * down + 0.5)
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    scale = 100.0 if curves.percent else 1.0
    for axes, name in zip(panels.flat, shown, strict=False):
        runs = [result for result in results if result["cell"] == name and _columns(curves, result)]
        # seeds may end at different times; the curve goes as far as all of them do
        xs = max((_columns(curves, run)[curves.x] for run in runs), key=len)
        named = any(isinstance(x, str) for x in xs)
        places = list(range(len(xs))) if named else xs
        for number, (key, label) in enumerate(curves.lines):
            columns = [_columns(curves, run).get(key) for run in runs]
            means = [mean_and_spread(list(values)) for values in zip_longest(*(c for c in columns if c))]
            values = [math.nan if m is None or m["mean"] is None else scale * m["mean"] for m in means]
            spreads = [0.0 if m is None or m["spread"] is None else scale * m["spread"] for m in means]
            if values:
                style = ("-", "--", ":", "-.")[(number // 5) % 4]
                drawn = axes.plot(places, values, style, marker="osD^v"[number % 5], ms=3, lw=1.3, label=label)
                low, high = ([v + sign * s for v, s in zip(values, spreads, strict=True)] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=drawn[0].get_color(), alpha=0.2, lw=0)
        if curves.mark is not None:
            at = mean_and_spread([run["measures"].get(curves.mark[0]) for run in runs])
            if at is not None and at["mean"] is not None:
                axes.axvline(at["mean"], color="0.4", ls="--", lw=1, label=curves.mark[1])
        if named:
            axes.set_xticks(places, xs, rotation=40, ha="right", fontsize=7)
        if curves.log_x and not named:
            axes.set_xscale("symlog")
            axes.set_xlim(-0.5, 1.5 * max(xs))  # left to itself, the axis goes on below 0
        if curves.log_y:
            axes.set_yscale("log")
        axes.set_title(f"{name}, {_seeds(runs)}", fontsize=9)
        axes.set_xlabel(curves.x_label, fontsize=8)
        axes.set_ylabel(curves.y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _seeds(results: Sequence[dict[str, Any]]) -> str:
    seeds = sorted({result["seed"] for result in results})
    shown = ", ".join(map(str, seeds))
    return f"seed {shown}" if len(seeds) == 1 else f"seeds {shown}"


def _columns(curves: Curves, result: dict[str, Any]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = result["series"].get(curves.series, {})
    return columns


def _points(table: Table, results: Sequence[dict[str, Any]]) -> Figure | None:
    drawn: list[tuple[Entry, float, float]] = []
    for entry in table.entries:
        found = mean_and_spread([r["measures"].get(entry.measure) for r in results if r["cell"] == entry.cell])
        if found is not None and found["mean"] is not None:
            factor = 100.0 if entry.form in ("percent", "points") else 1.0
            drawn.append((entry, factor * found["mean"], factor * (found["spread"] or 0.0)))
    if not drawn:
        return None
    forms = list(dict.fromkeys(entry.form for entry, _, _ in drawn))  # a panel for each unit
    groups = [[point for point in drawn if point[0].form == form] for form in forms]
    figure = new_figure(8.0, 1.6 + 0.22 * sum(map(len, groups)) + 0.6 * len(groups))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(group) + 1 for group in groups])
    for axes, form, group in zip(panels.flat, forms, groups, strict=True):
        places = list(range(len(group), 0, -1))
        axes.errorbar(
            [mean for _, mean, _ in group],
            places,
            xerr=[spread for _, _, spread in group],
            fmt="o",
            ms=5,
            label="measured",
        )
        known = [(e.published, y) for (e, _, _), y in zip(group, places, strict=True) if e.published is not None]
        if known:
            axes.plot([x for x, _ in known], [y for _, y in known], "kx", ms=6, label="published")
        labels = [" · ".join(part for part in (entry.row, entry.column) if part) for entry, _, _ in group]
        axes.set_yticks(places, labels, fontsize=7)
        quantity = f"{table.quantity} (%)" if form == "percent" else table.quantity
        axes.set_xlabel(_AXES.get(form, quantity), fontsize=8)
        if form in ("bytes", "count"):
            sizes = [abs(mean) for _, mean, _ in group if mean]
            if sizes and max(sizes) > 50 * min(sizes):
                axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure
