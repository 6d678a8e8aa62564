"""``nnheads add``, ``forget`` and ``calibrate``: what a saved model learns and unlearns without training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nnheads.cli import options, screen
from nnheads.cli.inference import Checkpoint, held_out_images, model_folder, open_model
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
    screen.line(f"undo with: nnheads forget {shlex.quote(str(checkpoint))} {' '.join(map(str, ids))}")


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


def calibrate(
    checkpoint: Checkpoint,
    data_dir: options.DataDir = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Its test images; see nnheads list datasets.")
    ] = None,
    accepted: Annotated[
        float,
        typer.Option("--accepted", metavar="SHARE", help="Share of these that counts as like the training images."),
    ] = 0.95,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Fit how certain a saved model is, and from where on an image is unlike its training samples, on held-out images.

    Give images that the model was neither trained on nor is to be tested on: val/<class>/*, test/<class>/* or
    <class>/* of --data-dir. No answer changes.
    """
    from nnheads.calibration import calibrate_saved
    from nnheads.data import BatchLoader

    if data_dir is None and dataset is None:
        raise ConfigError("calibrate needs --data-dir DIR with <class>/*, or --dataset NAME")
    options.share("--accepted", accepted)
    folder = model_folder(checkpoint)
    with screen.interruptible(lambda: f"{folder} as it was"):
        _, preprocessing, names = open_model(checkpoint, device)
        data = held_out_images(preprocessing, names, data_dir, dataset, ("val", "test"))
        found = calibrate_saved(folder, BatchLoader(data, preprocessing, 256), accepted=accepted, device=device)
    told = {
        "checkpoint": str(folder),
        "images": found.samples,
        "temperature": found.temperature,
        "uniform_share": found.uniform_share,
        "outlier_threshold": found.outlier_threshold,
        "before": {"ece": found.before.ece, "log_loss": found.before.log_loss},
        "after": {"ece": found.after.ece, "log_loss": found.after.log_loss},
    }
    if as_json:
        screen.print_json(told)
        return
    shared = f"{screen.percent(found.uniform_share)} % shared equally over all classes"
    screen.line(f"temperature {found.temperature:.3f}, {shared}, from {_count(found.samples, 'held-out image')}")
    screen.line(
        f"expected calibration error {screen.percent(found.before.ece)} % -> {screen.percent(found.after.ece)} %, "
        f"log-loss {screen.number(found.before.log_loss)} -> {screen.number(found.after.log_loss)} "
        "(each half calibrated on the other)"
    )
    screen.line(f"unlike the training samples: beyond a score of {found.outlier_threshold:.4g}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _ids(ids: list[int]) -> str:
    if len(ids) > 2 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"ids {ids[0]} to {ids[-1]}"
    return f"id{'s' * (len(ids) != 1)} {', '.join(map(str, ids))}"
