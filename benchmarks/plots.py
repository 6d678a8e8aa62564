"""Figures of runs and comparisons. Importing this module does not import matplotlib; drawing does, without a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX: Final = "matrix.png"
CENTERS: Final = "centers.png"
CURVES: Final = "curves.png"
DOTS_PER_INCH: Final = 130
_NUMBERS_UP_TO: Final = 12
"""Experiences up to which each cell of a matrix has its number written in it."""


def plot_run(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws ``matrix.png``, and ``centers.png`` where the strategy recorded its centers.

    Args:
        results: what a run returned.
        folder: where the figures go.

    Returns:
        The files.
    """
    made = [save_figure(matrix_figure(results), folder / MATRIX)]
    if results["centers"]:
        made.append(save_figure(centers_figure(results), folder / CENTERS))
    return made


def plot_comparison(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Draws ``curves.png`` from the summary of a comparison on a stream; nothing where no run is finished."""
    return [save_figure(curves_figure(summary), folder / CURVES)] if summary["rows"] else []


def matrix_figure(results: dict[str, Any]) -> Figure:
    """The accuracy matrix as a heat map: a row after each training, a column for each experience's test images."""
    import numpy as np

    matrix = np.array([[np.nan if v is None else 100 * v for v in row] for row in results["accuracy_matrix"]])
    size = len(matrix)
    side = min(9.0, 3.0 + 0.55 * size)
    figure, axes = _figure(side + 1.8, side)
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
    figure.colorbar(image, ax=axes, label="accuracy (%)", fraction=0.046)
    if size <= _NUMBERS_UP_TO:
        for (i, j), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                colour = "white" if value < 60 else "black"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
    ticks = range(0, size, max(1, size // 12))
    apart = len({tuple(names) for names in results["classes"]}) == size  # new instances have all classes every time
    names = [_short(names) for names in results["classes"]] if apart and size <= _NUMBERS_UP_TO else None
    numbers = [str(i + 1) for i in ticks]
    axes.set_xticks(ticks, numbers if names is None else names, rotation=0 if names is None else 40, ha="center")
    if names is not None:
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
    axes.set_yticks(ticks, numbers)
    axes.set_xlabel("tested on experience" if names is None else "tested on the classes of experience")
    axes.set_ylabel("trained up to experience")
    final = f"final accuracy {100 * results['accuracy']:.1f} %, forgetting {100 * results['forgetting']:.1f} %"
    axes.set_title(_title(_described(results), final, side), fontsize=10)
    return figure


def centers_figure(results: dict[str, Any]) -> Figure:
    """Centers of each class after every experience, stacked: how the budget is shared out over time."""
    import matplotlib as mpl

    ends = [event for event in results["centers"] if event["moment"] == "end"]
    order = [name for names in results["classes"] for name in names]
    order = list(dict.fromkeys(order))
    figure, axes = _figure(7.5, 4.5)
    steps = [event["experience"] + 1 for event in ends]
    colours = mpl.colormaps["tab20" if len(order) <= 20 else "turbo"].resampled(max(len(order), 2))
    below = [0.0] * len(ends)
    for number, name in enumerate(order):
        held = [float(event["centers"].get(name, 0)) for event in ends]
        label = name if len(order) <= 20 else None
        axes.bar(steps, held, bottom=below, label=label, color=colours(number), width=0.8, edgecolor="white", lw=0.3)
        below = [a + b for a, b in zip(below, held, strict=True)]
    axes.set_xticks(steps)
    axes.set_xlabel("after experience")
    axes.set_ylabel("centers kept")
    axes.set_title(_title(_described(results), f"centers of each of {len(order)} classes", 6.0), fontsize=10)
    if len(order) <= 20:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], title="class", loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8
        )
    return figure


def curves_figure(summary: dict[str, Any]) -> Figure:
    """Accuracy on all classes seen after each experience: a line for each row, mean and spread over the seeds; a panel
    for each memory."""
    import matplotlib as mpl

    rows: list[dict[str, Any]] = summary["rows"]
    memories: list[int | None] = sorted({row["memory"] for row in rows if row["memory"] is not None}) or [None]
    names = list(dict.fromkeys(row["name"] for row in rows))
    styles = _styles(len(names), mpl.colormaps["tab10"])
    figure, panels = _panels(len(memories))
    for axes, memory in zip(panels, memories, strict=True):
        for row in rows:
            if row["memory"] not in (memory, None):
                continue
            mean = [100 * value for value in row["curve"]["mean"]]
            steps = range(1, len(mean) + 1)
            colour, dashes, marker = styles[names.index(row["name"])]
            axes.plot(steps, mean, color=colour, ls=dashes, marker=marker, ms=4, lw=1.5, label=row["name"])
            spread = [100 * (value or 0.0) for value in row["curve"]["spread"]]
            if any(spread):
                low = [a - b for a, b in zip(mean, spread, strict=True)]
                high = [a + b for a, b in zip(mean, spread, strict=True)]
                axes.fill_between(steps, low, high, color=colour, alpha=0.13, lw=0)
        axes.set_xlabel("experiences learned")
        axes.set_title("" if memory is None else f"memory of {memory:,} images", fontsize=10)
        axes.set_xticks(range(1, len(mean) + 1, max(1, len(mean) // 10)))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on all classes seen (%)")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    titles = [name + _seeds_alone([row for row in rows if row["name"] == name], summary["seeds"]) for name in names]
    fitting = int(13 * figure.get_figwidth()) // (max(map(len, titles)) + 6)  # letters an inch, a line and its marker
    columns = max(1, min(3, len(names), fitting))
    figure.legend([handles[name] for name in names], titles, loc="outside lower center", ncols=columns, fontsize=8)
    seeds = ",\N{NO-BREAK SPACE}".join(map(str, summary["seeds"]))
    shown = f"mean and standard deviation over seeds {seeds}" if len(summary["seeds"]) > 1 else f"seed {seeds}"
    held = _part(summary["settings"])
    title = f"{summary['stream']}, {summary['settings']['scenario']}-incremental: {shown}{held}"
    figure.suptitle(wrapped_title(title, figure.get_figwidth()), fontsize=11)
    return figure


def _seeds_alone(rows: list[dict[str, Any]], seeds: list[int]) -> str:
    """What is to be said of a strategy some of whose seeds are not finished, with which memory where that differs."""
    fewer = {row["memory"]: ", ".join(map(str, row["seeds"])) for row in rows if len(row["seeds"]) < len(seeds)}
    if not fewer:
        return ""
    if len(fewer) == len(rows) and len(set(fewer.values())) == 1:
        return f" (seed {next(iter(fewer.values()))} alone)"
    return f" ({'; '.join(f'with {memory} seed {found} alone' for memory, found in fewer.items())})"


def _styles(count: int, colours: Any) -> list[tuple[Any, str, str]]:
    """Lines that can be told apart, in print too: ten colours, then other dashes, and markers in turn."""
    dashes, markers = ("-", "--", ":", "-."), "osD^vPX<>*"
    return [(colours(i % 10), dashes[(i // 10) % 4], markers[i % len(markers)]) for i in range(count)]


def _described(results: dict[str, Any]) -> str:
    config = results["config"]
    parts = [results["stream"], f"strategy {results['strategy']}", f"head {results['head']}"]
    if config["ema"]:
        parts.append(f"averaged {config['ema']:g}")
    parts += [f"memory {config['memory']}", f"seed {results['seed']}"]
    if results["scenario"] != "class":
        parts.append(f"scenario {results['scenario']}")
    return ", ".join(parts) + _part(config)


def _title(described: str, second: str, width: float) -> str:
    return f"{wrapped_title(described, width)}\n{second}"


def wrapped_title(text: str, width: float) -> str:
    """A title in as many lines as a width in inches asks for."""
    return "\n".join(textwrap.wrap(text, int(12 * width)))


def _part(config: dict[str, Any]) -> str:
    """What part of the images was used, where not all."""
    learned = "" if config["share"] is None else f", {config['share']:.0%} of the training images"
    return learned if config["validation"] is None else f"{learned}, tested on held-out training images"


def _short(names: Sequence[str], most: int = 2) -> str:
    """The names of a few classes, or how many there are."""
    return ", ".join(names) if len(names) <= most else f"{names[0]} and {len(names) - 1} more"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def _panels(count: int) -> tuple[Figure, list[Any]]:
    figure = new_figure(max(6.5, 5.0 * count), 5.2)
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure beside its place and moves it there when it is complete.

    Raises:
        CheckpointError: the disk does not take it.
    """
    from nnheads.storage import replacing_file  # torch

    with replacing_file(path) as made:
        figure.savefig(made, format="png", dpi=DOTS_PER_INCH)
    return path
