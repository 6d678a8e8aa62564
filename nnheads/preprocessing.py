"""What happens to an image before a backbone sees it: reading, resizing, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.devices import moved
from nnheads.errors import ConfigError, DataError, ShapeError, unknown_name

if TYPE_CHECKING:
    from PIL import Image

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Takes images (B, C, H, W) of any dtype and a CPU generator; gives images of the same shape, dtype and
device."""


@final
@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the backbone sees it; saved with a model so that ``predict`` repeats
    it.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: mean of each channel, on the scale 0..1.
        std: standard deviation of each channel, on the scale 0..1. These three may be given as lists; tuples are kept.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        # torchvision's weights have lists, which cannot be hashed: `_affine` is kept by mean and std
        try:
            object.__setattr__(self, "size", tuple(int(side) for side in self.size))
            object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
            object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        except (TypeError, ValueError):
            raise ConfigError(
                "preprocessing: size must be (height, width), mean and std one number a channel, "
                f"not {self.size!r}, {self.mean!r}, {self.std!r}"
            ) from None
        if self.channels not in (1, 3):
            raise ConfigError(f"preprocessing: channels must be 1 or 3, not {self.channels}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ConfigError(f"preprocessing: size must be (height, width) in pixels, not {self.size}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(
                f"preprocessing: mean and std need one number for each of {self.channels} channels, "
                f"not {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"preprocessing: std must be above 0, not {self.std}")

    def __call__(self, images: Tensor, *, channels_last: bool = False) -> Tensor:
        """Scales to 0..1 and normalises.

        Args:
            images: uint8 (B, C, H, W), of this ``size`` and these ``channels``.
            channels_last: give the result in channels-last memory format.

        Returns:
            float32 (B, C, H, W) on the same device.

        Raises:
            ShapeError: if shape or dtype differ.
        """
        expected = (self.channels, *self.size)
        if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ShapeError(
                f"preprocessing: images must be uint8 (B, {', '.join(map(str, expected))}), "
                f"not {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        scale, shift = _affine(self.mean, self.std, images.device)
        x = images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
        # reordering last is measured several times faster than normalising in channels-last order
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def open(self, path: str | Path) -> Tensor:
        """Reads one image file.

        The image is converted to grey or RGB of 8 bits (16 are scaled down), turned as its EXIF orientation says and,
        where its size differs, resized (bilinear, antialiased) to exactly ``size``: the aspect ratio is not kept.

        Returns:
            uint8 (C, H, W).

        Raises:
            DataError: if the file is missing or is not an image; the message names it.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(path) as file:
                ImageOps.exif_transpose(file, in_place=True)
                image = _eight_bits(file).convert("L" if self.channels == 1 else "RGB")
        except FileNotFoundError:
            raise DataError(f"no such image: {path}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not a known format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise DataError(f"cannot read image {path} ({reason}); replace or remove it") from None
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        array = np.array(image, dtype=np.uint8).reshape(height, width, self.channels)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` reads them back."""
        return {
            "size": list(self.size),
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: if a field is missing or has a wrong type.
        """
        try:
            height, width = (int(side) for side in fields["size"])
            mean = tuple(float(value) for value in fields["mean"])
            std = tuple(float(value) for value in fields["std"])
            return cls((height, width), int(fields["channels"]), mean, std)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"preprocessing: needs size, channels, mean and std, not {fields!r} ({error!r})"
            ) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits scaled down to 8, where Pillow would clip it; others as they are.

    Raises:
        ValueError: grey values of a range that is not known.
    """
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError("grey values of 32 bits, whose range is not known: save it with 8 or 16")
    return Image.fromarray((values / 257).round().astype(np.uint8))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as a product and a sum; kept, for each copy to a GPU would make it wait."""
    deviation = torch.tensor(std, dtype=torch.float64)
    scale = (1 / (255 * deviation)).float().view(1, -1, 1, 1)
    shift = (-torch.tensor(mean, dtype=torch.float64) / deviation).float().view(1, -1, 1, 1)
    return scale.to(device), shift.to(device)


def _shift_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    count, channels, height, width = images.shape
    pad = max(1, height // 8)
    padded = F.pad(images, (pad, pad, pad, pad))
    drawn = torch.zeros(3, count, 1, dtype=torch.int64)
    drawn[:2] = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    if flip:
        drawn[2] = torch.rand(count, 1, generator=generator) < 0.5
    # a number an image is what goes to the device, not the places of all its pixels
    top, left, mirrored = moved(drawn, images.device)
    rows = torch.arange(height, device=images.device) + top
    columns = torch.arange(width, device=images.device).expand(count, width)
    if flip:
        columns = torch.where(mirrored > 0, width - 1 - columns, columns)
    columns = columns + left
    # one flat gather does crop and flip together, the fastest form for batches of 32 as well as of 512
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(count, 1, height * width)
    pixels = pixels.expand(count, channels, height * width)
    return padded.flatten(2).gather(2, pixels).view(count, channels, height, width)


def no_augmentation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the images as they are."""
    return images


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pads each side with an eighth of the height of zeros (4 pixels for 32 x 32, 1 for 8 x 8), then cuts a
    random window of the old size out of each image."""
    return _shift_and_flip(images, generator, flip=False)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """`crop`, then mirrors each image left to right with probability one half."""
    return _shift_and_flip(images, generator, flip=True)


AUGMENTATIONS: dict[str, Augmentation] = {"none": no_augmentation, "crop": crop, "crop-flip": crop_flip}


def get_augmentation(name: str) -> Augmentation:
    """The augmentation of a batch by its name: ``none``, ``crop`` (no mirroring: digits) or ``crop-flip``.

    Raises:
        UnknownNameError: if there is none of that name.
    """
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def sample_transform(preprocessing: Preprocessing, augment: str = "none") -> Callable[[Tensor], Tensor]:
    """The same augmentation and normalisation for one image at a time, from ``torchvision.transforms.v2``.

    For loops that transform inside the data set, as Avalanche's own strategies do. Takes uint8 (C, H, W),
    gives float32 (C, H, W); random numbers come from torch's global generator.

    Raises:
        UnknownNameError: if there is no augmentation of that name.
    """
    from torchvision.transforms import v2

    get_augmentation(augment)
    steps: list[Callable[[Tensor], Tensor]] = []
    if augment != "none":
        steps.append(v2.RandomCrop(list(preprocessing.size), padding=max(1, preprocessing.size[0] // 8)))
    if augment == "crop-flip":
        steps.append(v2.RandomHorizontalFlip())
    steps.append(v2.ToDtype(torch.float32, scale=True))
    steps.append(v2.Normalize(list(preprocessing.mean), list(preprocessing.std)))
    composed: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return composed
