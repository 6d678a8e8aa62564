"""The second view of an image that contrastive learning compares it with."""

from __future__ import annotations

from typing import Final, final

import torch
from torch import Tensor
from torchvision.transforms import v2

from nnheads.data import Preprocessing

SMALLEST: Final = 0.2
"""Share of the image that a view shows at least."""


@final
class ContrastiveViews:
    """Views as SCR has them (Mai et al. 2021; SimCLR's): a part of the image at its size, flipped, with its colours
    changed or taken away. Each image is changed by itself; the choices are torch's global generator's.

    Args:
        preprocessing: of the images that are given.
        flip: whether images may be mirrored, which digits must not be.
    """

    def __init__(self, preprocessing: Preprocessing, flip: bool) -> None:
        self._mean = torch.tensor(preprocessing.mean)[:, None, None]
        self._std = torch.tensor(preprocessing.std)[:, None, None]
        self._change = v2.Compose(
            [
                v2.RandomResizedCrop(list(preprocessing.size), scale=(SMALLEST, 1.0), antialias=True),
                v2.RandomHorizontalFlip(0.5 if flip else 0.0),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
            ]
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) preprocessed images -> (B, C, H, W) their views, preprocessed."""
        mean, std = self._mean.to(x), self._std.to(x)
        # Colours are changed on the scale from 0 to 1, to which images that were augmented already come back.
        images = (x * std + mean).clamp(0, 1)
        return (torch.stack([self._change(image) for image in images]) - mean) / std
