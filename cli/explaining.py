"""``nnheads explain``: a page that shows which training samples decided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnheads.cli import options, screen
from nnheads.cli.inference import UNLIKE, Checkpoint, open_model, outliers
from nnheads.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nnheads.data import ImageSet, Preprocessing


def explain(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes, as page.html.")
    ] = None,
    data_dir: options.DataDir = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="What the model was trained on, if not a folder of your own."),
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option("--what-if", metavar="drop:ID,...", help="Also tell the answers without these training samples."),
    ] = None,
    neighbors: Annotated[
        int, typer.Option("--neighbors", min=1, metavar="N", help="Training samples shown for each image, at most.")
    ] = 12,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Show why a saved model answers images as it does: the training samples that decided, their weights and pictures.

    Pictures are the thumbnails saved with the model; others come from --data-dir or --dataset, the data it
    was trained on.
    """
    from nnheads.explain import Pictures, gather_evidence

    if out is None and not as_json:
        raise ConfigError("explain needs --out page.html, or --json")
    if out is not None:
        options.writable("--out", out, ".html", ".htm", what="a page")
    gone = _dropped(what_if)
    with screen.interruptible(lambda: "nothing"):
        import torch

        model, preprocessing, names = open_model(checkpoint, device)
        known = _training_images(preprocessing, names, data_dir, dataset)
        pictures = Pictures(model.thumbnails, known)
        opened = torch.stack([preprocessing.open(path) for path in images])
        called = [str(path) for path in images]
        found = gather_evidence(model, opened, called, pictures=pictures, listed=neighbors, leave_out=gone)
        # What is asked about is shown as it is, not as small as the network sees it.
        found = [replace(image, picture=_picture(path)) for image, path in zip(found, images, strict=True)]
        unlike = outliers(model, preprocessing(opened).to(model.device))
        remark = (f"{UNLIKE[0].upper()}{UNLIKE[1:]}.",)
        found = [replace(image, remarks=remark if far else ()) for image, far in zip(found, unlike, strict=True)]
        if out is not None:
            from nnheads.page import render_page
            from nnheads.storage import replace_text

            replace_text(out, render_page(model, found, left_out=gone))
    if as_json:
        told = [{} if far is None else {"unlike_training_samples": far} for far in unlike]
        screen.print_json([image.to_dict() | more for image, more in zip(found, told, strict=True)])
        return
    for image in found:
        near = ", ".join(f"{n.id} ({n.label}, {screen.percent(n.weight, 1)} %)" for n in image.neighbors[:3])
        screen.line(
            f"{image.name}: {image.predicted} {screen.percent(image.classes[0][1], 1)} %, by {near or 'nothing'}"
        )
        if image.what_if is not None and image.predicted_without is not None:
            share = screen.percent(image.what_if[image.predicted_without], 1)
            screen.line(f"  without {', '.join(map(str, gone))}: {image.predicted_without} {share} %")
    if not any(near.picture for image in found for near in image.neighbors):
        screen.note("note: no pictures of training samples: give --data-dir, or save the model with thumbnails")
    screen.line(f"page: {out}")


def _dropped(text: str | None) -> list[int]:
    if text is None:
        return []
    kind, _, listed = text.partition(":")
    ids = [part.strip() for part in listed.split(",") if part.strip()]
    if kind != "drop" or not ids or not all(part.isascii() and part.isdigit() for part in ids):
        raise ConfigError(f"--what-if must be drop:ID,..., as in drop:17,204, not {text!r}")
    if too_large := [part for part in ids if int(part) >= 2**63]:
        raise ConfigError(f"--what-if: an id is below 2 ** 63, not {too_large[0]}")
    return list(dict.fromkeys(int(part) for part in ids))


def _training_images(
    preprocessing: Preprocessing, names: tuple[str, ...], data_dir: Path | None, dataset: str | None
) -> ImageSet | None:
    """What the model was trained on, with the ids that its head knows the samples by; None where not given."""
    from nnheads.benchmarks.datasets import load_dataset, load_images

    if dataset is None and data_dir is None:
        return None
    if dataset is not None:
        found = load_images(dataset, data_dir, train=True)
    else:
        found = load_dataset(f"images:{data_dir}", size=preprocessing.size[0]).train
    unknown = [name for name in found.class_names if name not in names]
    if unknown:
        raise DataError(
            f"the images given have classes that the model does not know: {', '.join(unknown[:5])}; "
            "give those it was trained on"
        )
    return found


def _picture(path: Path) -> bytes:
    """An image file as a small picture, in its own proportions."""
    import io

    from PIL import Image, ImageOps

    with Image.open(path) as file:
        ImageOps.exif_transpose(file, in_place=True)
        picture = file.convert("RGB")
        picture.thumbnail((320, 320))
        code = io.BytesIO()
        picture.save(code, "WEBP", quality=90, method=4)
    return code.getvalue()
