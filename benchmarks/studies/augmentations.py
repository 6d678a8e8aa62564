"""Augmentations of training practice: geometric, photometric, mixup; each image gets a transform of its own."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.preprocessing import AUGMENTATIONS, Augmentation

ROTATION: Final = 12.0  # degrees
SHIFT: Final = 0.08  # of the side
ZOOM: Final = 0.1
CONTRAST: Final = 0.3
BRIGHTNESS: Final = 0.15  # of the whole range


def geometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates, shifts and zooms each image, bilinear, with zeros outside."""
    count = len(images)
    draw = torch.rand(4, count, generator=generator) * 2 - 1
    angle, zoom = draw[0] * math.radians(ROTATION), 1 + ZOOM * draw[1]
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [torch.stack([cos, -sin, 2 * SHIFT * draw[2]], 1), torch.stack([sin, cos, 2 * SHIFT * draw[3]], 1)]
    matrix = torch.stack(rows, 1).to(images.device)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)
    return moved.round().clamp(0, 255).to(images.dtype)


def geometric_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """`geometric`, then mirrors each image left to right with probability one half."""
    moved = geometric(images, generator)
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).view(-1, 1, 1, 1).to(images.device)
    return torch.where(mirrored, moved.flip(3), moved)


def photometric(images: Tensor, generator: torch.Generator) -> Tensor:
    """Changes contrast and brightness of each image."""
    draw = (torch.rand(2, len(images), 1, 1, 1, generator=generator) * 2 - 1).to(images.device)
    values = images.float()
    mean = values.mean((1, 2, 3), keepdim=True)
    changed = (values - mean) * (1 + CONTRAST * draw[0]) + mean + 255 * BRIGHTNESS * draw[1]
    return changed.round().clamp(0, 255).to(images.dtype)


BY_NAME: Final[dict[str, Augmentation]] = {
    **AUGMENTATIONS,
    "geometric": geometric,
    "geometric-flip": geometric_flip,
    "photometric": photometric,
}


def mixed_up(x: Tensor, y: Tensor, num_classes: int, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Convex combinations of pairs of a batch and of their labels (Zhang et al. 2018).

    Args:
        x: (B, ...) inputs.
        y: (B,) int64.
        num_classes: C.
        alpha: of the Beta distribution that the share of each pair is drawn from, by torch's global generator.

    Returns:
        Mixed inputs and (B, C) soft labels.
    """
    share = torch.distributions.Beta(alpha, alpha).sample((len(x),)).to(x.device)
    other = torch.randperm(len(x), device=x.device)
    wide = share.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    soft = F.one_hot(y, num_classes).to(torch.float32)
    return wide * x + (1 - wide) * x[other], share[:, None] * soft + (1 - share[:, None]) * soft[other]
