"""``nnheads list``: what there is, by name."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from nnheads.cli import options, screen

ROOMY = 100
SPARE = ("backbone",)
"""Columns left out where a terminal has fewer columns than `ROOMY`."""


class What(StrEnum):
    """What can be listed."""

    heads = "heads"
    strategies = "strategies"
    streams = "streams"
    backbones = "backbones"
    datasets = "datasets"


def show(
    what: Annotated[What, typer.Argument(metavar="WHAT", help="heads, strategies, streams, backbones or datasets.")],
    as_json: options.AsJson = False,
) -> None:
    """List the heads, strategies, streams, backbones or data sets that can be named."""
    makers = {
        What.heads: _heads,
        What.strategies: _strategies,
        What.streams: _streams,
        What.backbones: _backbones,
        What.datasets: _datasets,
    }
    rows = makers[what]()
    if as_json:
        screen.print_json(rows)
        return
    columns = list(rows[0])
    if screen.out().width < ROOMY:
        columns = [column for column in columns if column not in SPARE]
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    words = [column for column in columns if any(isinstance(row[column], str) for row in rows)]
    screen.table("", columns, cells, text=words, wrapped=["description"])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return screen.DASH if value is None else str(value)


def _first_line(documentation: str | None) -> str:
    """The first sentence as one line, without marks of code and where the equation stands."""
    paragraph = " ".join((documentation or "").strip().split("\n\n")[0].split()).replace("``", "")
    return re.sub(r" \(review[^)]*\)", "", paragraph.split(". ")[0].rstrip("."))


def _heads() -> list[dict[str, Any]]:
    from nnheads.heads import head_class, list_heads

    return [
        {
            "name": name,
            "memory": head_class(name).uses_memory,
            "trained by": "its output" if head_class(name).trains_with == "output" else "model.loss",
            "description": _first_line(head_class(name).__doc__),
        }
        for name in list_heads()
    ]


def _strategies() -> list[dict[str, Any]]:
    from nnheads.strategies.registry import list_strategies

    return [
        {
            "name": spec.name,
            "classifier": "any head" if spec.classifier == "any" else spec.classifier,
            "memory": spec.uses_memory,
            "description": spec.description,
        }
        for spec in list_strategies()
    ]


def _streams() -> list[dict[str, Any]]:
    from nnheads.benchmarks.specs import list_streams

    named = [
        {
            "name": spec.name,
            "experiences": spec.experiences,
            "memory": spec.memory,
            "backbone": spec.backbone,
            "description": spec.description,
        }
        for spec in list_streams()
    ]
    patterns = {
        "images:DIR": "any folder of class folders, split by class",
        "new-instances:STREAM": "the same data, all classes in every experience",
    }
    rest = {"experiences": None, "memory": None, "backbone": None}
    return named + [{"name": name, **rest, "description": text} for name, text in patterns.items()]


def _backbones() -> list[dict[str, Any]]:
    from nnheads.backbones import build_backbone, list_backbones
    from nnheads.classifier_layer import find_classifiers

    rows: list[dict[str, Any]] = []
    for name in list_backbones():
        model = build_backbone(name)
        rows.append(
            {
                "name": name,
                "embedding": find_classifiers(model)[0].in_features,
                "parameters": sum(p.numel() for p in model.parameters()),
                "description": _first_line(type(model).__doc__),
            }
        )
    for source in ("torchvision", "timm"):
        text = f"any classification model of {source}, as {source}:resnet18"
        rows.append({"name": f"{source}:NAME", "embedding": None, "parameters": None, "description": text})
    return rows


def _datasets() -> list[dict[str, Any]]:
    from nnheads.benchmarks.datasets import DATASETS

    rows: list[dict[str, Any]] = []
    for facts in DATASETS.values():
        height, width = facts.preprocessing.size
        colour = "grey" if facts.preprocessing.channels == 1 else "RGB"
        source = "read from --data-dir" if facts.name in ("core50", "svhn") else "downloaded on first use"
        if facts.name == "digits":
            source = "bundled with scikit-learn"
        form = f"{height} x {width} {colour}"
        title = "handwritten digits" if facts.name == "digits" else facts.title
        rows.append({"name": facts.name, "classes": facts.classes, "images": form, "description": f"{title}, {source}"})
    rows.append({"name": "images:DIR", "classes": None, "images": "any", "description": "any folder of class folders"})
    return rows
