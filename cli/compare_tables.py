"""The tables of ``nnheads compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnheads.cli import screen

Formats = Mapping[str, tuple[str, screen.Format]]

# A measure's heading, where a "|" marks where it may break, and its form.
_DATASET: Formats = {
    "accuracy": ("accuracy|%", screen.percent),
    "log_loss": ("log-loss", screen.number),
    "ece": ("ECE|%", screen.percent),
    "ece_scaled": ("ECE|scaled %", screen.percent),
    "auroc": ("AUROC|%", screen.percent),
    "parameters": ("para-|meters", screen.count),
    "memory_bytes": ("memory", screen.size),
    "train_seconds": ("train|s", screen.tenths),
    "ms_per_sample": ("ms a|sample", screen.number),
    "skipped": ("skip|f2 %", screen.percent),
    "agreement": ("agrees with|dense %", screen.percent),
}
_STREAM: Formats = {
    "accuracy": ("accuracy|%", screen.percent),
    "forgetting": ("forgetting|%", screen.percent),
    "anytime_accuracy": ("anytime|%", screen.percent),
    "gradient_samples": ("gradient|samples", screen.count),
    "memory_bytes": ("memory", screen.size),
    "seconds": ("train + eval|s", screen.tenths),
    "time_ratio": ("time|ratio", screen.number),
}


def show_heads(summary: dict[str, Any]) -> None:
    """Heads on a data set."""
    settings = summary["settings"]
    epochs = settings["epochs"]
    facts = [
        f"backbone {settings['backbone']}",
        *(["pretrained"] if settings.get("pretrained") else []),
        *([f"weights {settings['weights']}"] if settings.get("weights") else []),
        *(["frozen"] if settings.get("freeze") else []),
        f"{epochs} epoch{'s' * (epochs > 1)}",
        _seeds(summary),
    ]
    screen.line(f"{summary['dataset']}: {', '.join(facts)}")
    rows = [(row["head"], {name: row.get(name) for name in _DATASET}) for row in summary["rows"]]
    absent = {name for name in ("auroc", "skipped") if not any(row[name] for _, row in rows)}
    shown = {name: form for name, form in _DATASET.items() if name not in absent}
    screen.table("", *_fitting("head", rows, shown), text=_TEXT)
    _explain_spread(summary)
    screen.line("ECE scaled: each half of the test images calibrated on the other half")
    if "skipped" not in absent:
        screen.line("skip f2: share of the test images whose gate lets them skip the backbone's second part")
    if settings.get("ood"):
        screen.line(f"AUROC: test images against those of {settings['ood']}, by distance or, for dense, by probability")


def show_strategies(summary: dict[str, Any]) -> None:
    """Strategies on a stream: one table for each memory."""
    settings = summary["settings"]
    facts = [
        f"backbone {settings['backbone']}" if settings["backbone"] else "",
        f"scenario {settings['scenario']}" if settings["scenario"] != "class" else "",
        f"precision {settings['precision']}" if settings["precision"] != "auto" else "",
        _seeds(summary),
    ]
    screen.line(f"{summary['stream']}: {', '.join(fact for fact in facts if fact)}")
    if told := screen.shares(settings):
        screen.line(told)
    rows: list[dict[str, Any]] = summary["rows"]
    memories = list(dict.fromkeys(row["memory"] for row in rows if row["memory"] is not None)) or [None]
    for memory in memories:
        # what keeps no exemplars stands beside each
        shown = [(_name(row, summary), row) for row in rows if row["memory"] in (memory, None)]
        title = "" if memory is None else f"memory {memory}"
        screen.table(title, *_fitting("strategy", shown, _STREAM), text=_TEXT)
    for name, rate in summary["learning_rates"].items():
        tried = summary["rates"][name]
        end = " (the end of those tried)" if rate in (min(tried), max(tried)) else ""
        screen.line(f"learning rate of {name}, chosen on held-out training images: {rate:g}{end}")
    _explain_spread(summary)
    screen.line(f"time ratio: training and evaluation over those of {summary['reference']} on the same kind of machine")
    if summary["finished"] < summary["runs"]:
        screen.line(f"{summary['finished']} of {summary['runs']} runs are finished: --resume makes the others")


_TEXT = ("head", "strategy", "measure")


def _name(row: dict[str, Any], summary: dict[str, Any]) -> str:
    done, wanted = len(row["seeds"]), len(summary["seeds"])
    return row["name"] if done == wanted else f"{row['name']} ({done} of {wanted} seeds)"


def _seeds(summary: dict[str, Any]) -> str:
    seeds = summary["seeds"]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _explain_spread(summary: dict[str, Any]) -> None:
    if len(summary["seeds"]) > 1:
        screen.line("± is the sample standard deviation over a row's seeds")


def _fitting(
    what: str, rows: Sequence[tuple[str, dict[str, Any]]], formats: Formats
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells in the first arrangement that the screen has room for."""
    room = screen.out().width
    for wide in (True, False):
        columns = [what, *(_heading(text, wide) for text, _ in formats.values())]
        cells = [
            [name, *(_cell(row[measure], form, wide) for measure, (_, form) in formats.items())] for name, row in rows
        ]
        if screen.width(columns, cells) <= room:
            return columns, cells
    # a narrow screen or long names: a column for each row, or as many measures as there is room for
    names = ["measure", *(name for name, _ in rows)]
    turned = [
        [_heading(text, True), *(_cell(row[measure], form, True) for _, row in rows)]
        for measure, (text, form) in formats.items()
    ]
    if screen.width(names, turned) <= room:
        return names, turned
    while len(columns) > 2 and screen.width(columns, cells) > room:
        columns, cells = columns[:-1], [line[:-1] for line in cells]
    return columns, cells


def _heading(text: str, wide: bool) -> str:
    return text.replace("-|", "").replace("|", " ") if wide else text.replace("|", "\n")


def _cell(value: dict[str, float | None] | None, form: screen.Format, wide: bool) -> str:
    if value is None:
        return screen.DASH
    text = form(value["mean"])
    if value["spread"] is None:
        return text
    spread = form(value["spread"])
    # What is the same whatever the seed, as the number of parameters, needs no spread.
    return text if not value["spread"] else f"{text}{' ' if wide else chr(10)}±{spread}"
