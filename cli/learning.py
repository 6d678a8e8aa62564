"""``nnheads add`` and ``nnheads forget``: a saved model learns and unlearns samples, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnheads.cli import options, screen
from nnheads.cli.inference import Checkpoint, model_folder
from nnheads.errors import ConfigError


def add(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    label: Annotated[
        str, typer.Option("--label", metavar="NAME", help="Their class; one the model does not know is new.")
    ],
    as_json: options.AsJson = False,
) -> None:
    """Teach a saved model more images of a class, or a new class, at once and without training."""
    from nnheads.editing import add as add_images

    if not label.strip():
        raise ConfigError("--label needs the name of a class")
    folder = model_folder(checkpoint)
    with screen.interruptible(lambda: f"{folder} as it was"):
        ids = add_images(folder, images, [label] * len(images)).tolist()
    if as_json:
        screen.print_json({"checkpoint": str(folder), "label": label, "ids": ids})
        return
    screen.line(f"added {_count(len(ids), 'image')} of {label!r} to {folder}, {_ids(ids)}")
    screen.line(f"undo with: nnheads forget {checkpoint} {' '.join(map(str, ids))}")


def forget(
    checkpoint: Checkpoint,
    ids: Annotated[list[int], typer.Argument(metavar="ID...", help="Ids of training samples, as predict names them.")],
    as_json: options.AsJson = False,
) -> None:
    """Make a saved model forget training samples, at once and without training.

    Nothing of them stays in what it decides by, nor do their thumbnails. The weights of its backbone still saw them.
    """
    from nnheads.editing import forget as forget_samples

    folder = model_folder(checkpoint)
    with screen.interruptible(lambda: f"{folder} as it was"):
        left = forget_samples(folder, ids)
    gone = sorted(set(ids))
    if as_json:
        screen.print_json({"checkpoint": str(folder), "forgotten": gone, "left": left})
        return
    screen.line(f"forgot {_count(len(gone), 'sample')} of {folder}; {left:,} left")
    screen.line("the weights of its backbone, and codebooks if it has any, were trained with what is forgotten")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _ids(ids: list[int]) -> str:
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"ids {ids[0]} to {ids[-1]}"
    return f"id{'s' * (len(ids) != 1)} {', '.join(map(str, ids))}"
