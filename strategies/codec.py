"""How exemplar images are stored: as they are, or compressed into rows of a fixed size.

Replay from compressed exemplars holds several images in the bytes of one (Wang et al. 2022, "Memory replay with data
compression for continual learning"). A row of a fixed size keeps the budget exact: a buffer of n rows never holds more
bytes than n rows, whatever the images look like.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, final

import numpy as np
import torch
from torch import Tensor

from nnheads.errors import ConfigError

MIN_ROW_BYTES: Final = 128
"""WebP cannot describe a small photograph in much less."""

_QUALITIES: Final = (95, 88, 75, 60, 45, 30, 15, 5, 0)
"""From nearly the image to hardly it; the first whose code fits is taken."""

_BEST: Final = ((5.0, 95), (3.5, 88), (2.5, 75), (0.0, 60))
"""With so many bits a pixel or more, the quality that is tried first. A better one would fit few images, and every
attempt costs time."""


class ImageCodec(Protocol):
    """Images (n, C, H, W) uint8 to rows (n, ...) uint8 of a fixed shape, and back."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row."""

    def encode(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 -> (n, *row_shape) uint8."""

    def decode(self, rows: Tensor) -> Tensor:
        """(n, *row_shape) uint8 -> (n, C, H, W) uint8."""


@final
class RawCodec:
    """Images as they are."""

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.row_shape: tuple[int, ...] = image_shape

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, rows: Tensor) -> Tensor:
        return rows


@final
class WebPCodec:
    """Each image as lossy WebP, in the best quality whose code fits a row; the rest of the row is zero.

    As many threads as torch uses share the work. The rows do not depend on their number or on what was encoded before.

    Args:
        image_shape: (C, H, W) with 1 or 3 channels.
        row_bytes: bytes of a row.

    Raises:
        ConfigError: rows too small for anything, or not smaller than the image; another number of channels.
    """

    def __init__(self, image_shape: tuple[int, int, int], row_bytes: int) -> None:
        channels, height, width = image_shape
        if channels not in (1, 3):
            raise ConfigError(f"exemplar_bytes: only images of 1 or 3 channels can be compressed, not {channels}")
        if channels * height * width <= MIN_ROW_BYTES:
            raise ConfigError(
                f"exemplar_bytes: images of {channels * height * width} bytes are too small to be compressed"
            )
        if not MIN_ROW_BYTES <= row_bytes < channels * height * width:
            raise ConfigError(
                f"exemplar_bytes must be {MIN_ROW_BYTES} or more and below the {channels * height * width} bytes of "
                f"an uncompressed image, not {row_bytes}"
            )
        self.image_shape = image_shape
        self.row_shape: tuple[int, ...] = (row_bytes,)
        bits = 8 * row_bytes / (height * width)
        self._tried = [quality for quality in _QUALITIES if quality <= next(q for at, q in _BEST if bits >= at)]

    def encode(self, images: Tensor) -> Tensor:
        """See `ImageCodec`; a ConfigError where an image does not fit even in the lowest quality."""
        rows = torch.zeros(len(images), *self.row_shape, dtype=torch.uint8)
        pictures = images.cpu().movedim(1, -1).contiguous().numpy()
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # Pillow compresses without the interpreter's lock
            for row, code in zip(rows, threads.map(self._fitting, pictures), strict=True):
                row[: len(code)] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        return rows

    def decode(self, rows: Tensor) -> Tensor:
        images = torch.empty(len(rows), *self.image_shape, dtype=torch.uint8)
        for image, row in zip(images, rows, strict=True):
            image.copy_(torch.from_numpy(_open(row.numpy().tobytes(), self.image_shape[0])))
        return images

    def _fitting(self, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
        limit = self.row_shape[0]
        for quality in self._tried:
            code = _compressed(image, quality)
            if len(code) <= limit:
                return code
        raise ConfigError(
            f"an image does not fit {limit} bytes in WebP's lowest quality: give exemplar_bytes above {len(code)}"
        )


def _compressed(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int) -> bytes:
    from PIL import Image

    code = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.convert("RGB").save(code, "WEBP", quality=quality, method=4)
    return code.getvalue()


def _open(code: bytes, channels: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    from PIL import Image

    with Image.open(io.BytesIO(code), formats=("WEBP",)) as picture:  # to ask every format takes as long again
        values = np.array(picture.convert("RGB" if channels == 3 else "L"))
    return values[None] if channels == 1 else values.transpose(2, 0, 1)
