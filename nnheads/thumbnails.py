"""Small pictures of the samples a head stores, so that its evidence can be looked at."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self, final

import torch
from torch import Tensor

from nnheads.data import ImageSet
from nnheads.errors import CheckpointError, DataError, ShapeError

_LARGEST = 96
"""Pixels of a thumbnail's longer side, at most."""

_QUALITY = 85


@final
class Thumbnails:
    """Pictures by sample id, each a WebP of 96 pixels a side at most: about 0.8 KB for a CIFAR image.

    Args:
        pictures: WebP by id.
    """

    def __init__(self, pictures: Mapping[int, bytes] | None = None) -> None:
        self._pictures: dict[int, bytes] = dict(pictures or {})

    def __len__(self) -> int:
        return len(self._pictures)

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._pictures

    def get(self, sample_id: int) -> bytes | None:
        """The WebP of a sample; None where there is none."""
        return self._pictures.get(sample_id)

    def add(self, images: Tensor, ids: Tensor) -> Self:
        """Makes pictures of images; one that is there under an id is replaced.

        Args:
            images: (n, C, H, W) uint8 with 1 or 3 channels.
            ids: (n,) int64.

        Raises:
            ShapeError: images or ids have another form; nothing is changed then.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ShapeError(
                f"thumbnails: images must be uint8 (n, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if ids.shape != (len(images),):
            raise ShapeError(f"thumbnails: ids must be ({len(images)},), got {tuple(ids.shape)}")
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # Pillow compresses without the interpreter's lock
            made = list(threads.map(to_webp, images.cpu()))
        self._pictures.update(zip(ids.tolist(), made, strict=True))
        return self

    @classmethod
    def of_images(cls, images: ImageSet, ids: Tensor) -> Self:
        """Pictures of those images of a set that have these ids (n,); DataError where it is no `ImageSet`."""
        if not isinstance(images, ImageSet):
            raise DataError(
                f"thumbnails are made of an ImageSet, as load_dataset(...).train is, not of {type(images).__name__}"
            )
        part = images.subset(torch.isin(images.ids, ids.cpu().long()))
        return cls().add(part.images, part.ids)

    def renew(self, images: ImageSet) -> None:
        """Makes those pictures anew whose samples are among these images, which may be others under the same ids."""
        had = torch.tensor([i in self._pictures for i in images.ids.tolist()], dtype=torch.bool)
        part = images.subset(had)
        self.add(part.images, part.ids)

    def drop(self, ids: Iterable[int]) -> None:
        """Removes pictures; an id that has none is passed over."""
        for sample_id in ids:
            self._pictures.pop(sample_id, None)

    def of(self, ids: Iterable[int]) -> Self:
        """Those of these samples alone."""
        return type(self)({i: self._pictures[i] for i in ids if i in self._pictures})

    def state(self) -> dict[str, Tensor]:
        """``ids`` (n,) int64, ``ends`` (n,) int64 and ``data`` uint8, the pictures one behind the other."""
        sizes = torch.tensor([len(code) for code in self._pictures.values()], dtype=torch.int64)
        data = b"".join(self._pictures.values())
        return {
            "ids": torch.tensor(list(self._pictures), dtype=torch.int64),
            "ends": sizes.cumsum(0),
            "data": torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Thumbnails:
        """The inverse of `state`.

        Raises:
            CheckpointError: the tensors are others, or do not fit together.
        """
        if {name: (tensor.dtype, tensor.dim()) for name, tensor in state.items()} != {
            "ids": (torch.int64, 1),
            "ends": (torch.int64, 1),
            "data": (torch.uint8, 1),
        }:
            raise CheckpointError("thumbnails: the file holds something else: save the model again")
        ids, ends, data = state["ids"].tolist(), state["ends"].tolist(), state["data"].numpy().tobytes()
        starts = [0, *ends][: len(ends)]
        if len(ids) != len(ends) or (ends and ends[-1] != len(data)) or starts != sorted(starts):
            raise CheckpointError("thumbnails: ids and pictures do not fit together: save the model again")
        return cls({i: data[start:end] for i, start, end in zip(ids, starts, ends, strict=True)})


def to_webp(image: Tensor, largest: int = _LARGEST) -> bytes:
    """An image (C, H, W), uint8 with 1 or 3 channels, as WebP, shrunk where it has a side above ``largest`` pixels."""
    from PIL import Image

    values = image.movedim(0, -1).contiguous().numpy()
    picture = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).convert("RGB")
    picture.thumbnail((largest, largest))
    code = io.BytesIO()
    picture.save(code, "WEBP", quality=_QUALITY, method=4)
    return code.getvalue()
