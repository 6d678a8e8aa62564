"""Pictures of a study: confusion matrices, and test images beside their nearest training images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnheads.benchmarks.plots import new_figure
from nnheads.benchmarks.studies.study import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 2  # pixels between images


def as_png(images: Sequence[Tensor]) -> str:
    """Images (C, H, W) uint8 of one size side by side, the first one apart, as a PNG in base64: for a JSON file."""
    from PIL import Image

    channels, height, _ = images[0].shape
    white = torch.full((channels, height, _GAP), 255, dtype=torch.uint8)
    parts = [images[0], *[white] * 3]
    for image in images[1:]:
        parts += [image, white]
    pixels = torch.cat(parts[:-1], 2).permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def picture(what: Picture, results: Sequence[dict[str, Any]]) -> Figure | None:
    """Draws a picture of the first seed of each cell that was run; None where none was."""
    first: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["cell"] in what.cells and result["series"].get(what.kind):
            first.setdefault(result["cell"], result)
    if not first:
        return None
    figure = new_figure((5.2 if what.kind == "confusion" else 7.6) * len(first), 4.6)
    panels = figure.subplots(1, len(first), squeeze=False)[0]
    for axes, (cell, result) in zip(panels, first.items(), strict=True):
        columns = result["series"][what.kind]
        if what.kind == "confusion":
            _confusion(axes, columns)
        else:
            _nearest(axes, columns)
        axes.set_title(f"{cell}, seed {result['seed']}", fontsize=9)
    return figure


def _confusion(axes: Any, columns: dict[str, list[Any]]) -> None:
    names = columns["class"]
    counts = torch.tensor([columns[name] for name in names], dtype=torch.float64).T
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(shares.numpy(), vmin=0, vmax=100, cmap="viridis")
    if len(names) <= 12:
        for i, row in enumerate(shares.tolist()):
            for j, value in enumerate(row):
                if value >= 0.5:
                    axes.text(
                        j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="w" if value < 60 else "k"
                    )
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("answered (% of the class)", fontsize=8)
    axes.set_ylabel("true class", fontsize=8)


def _nearest(axes: Any, columns: dict[str, list[Any]]) -> None:
    from PIL import Image

    strips = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in columns["png"]]
    width, height = strips[0].size
    whole = Image.new("RGB", (width, (height + _GAP) * len(strips)), "white")
    for number, strip in enumerate(strips):
        whole.paste(strip, (0, number * (height + _GAP)))
    axes.imshow(whole, interpolation="nearest")  # sharp pixels, and a file a fraction of the size
    axes.set_yticks(
        [number * (height + _GAP) + height / 2 for number in range(len(strips))],
        [f"{own}: {', '.join(near)}" for own, near in zip(columns["class"], columns["labels"], strict=True)],
        fontsize=6,
    )
    axes.set_xticks([])
    axes.set_xlabel("test image, then its nearest training images;\ntheir classes at the left", fontsize=8)
