"""Images in memory: decoded once, kept as uint8, cut into batches, augmented and normalised a batch at a
time.

Decoding and transforming images one by one is what usually bounds a small training run; here an epoch over
50,000 CIFAR images costs about a second of one core beside the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from nnheads.devices import moved
from nnheads.errors import ConfigError, DataError, ShapeError
from nnheads.preprocessing import (
    AUGMENTATIONS,
    Augmentation,
    Preprocessing,
    crop,
    crop_flip,
    get_augmentation,
    no_augmentation,
    sample_transform,
)

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "BatchLoader",
    "ImageSet",
    "Preprocessing",
    "Sample",
    "WithIds",
    "crop",
    "crop_flip",
    "get_augmentation",
    "materialize",
    "no_augmentation",
    "sample_transform",
    "stratified_split",
    "with_ids",
]

Sample = tuple[Tensor, int, int]
"""An image, its label and its id."""


@final
@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[Sample]):
    """A labelled set of images in memory. Item ``i`` is ``(uint8 image (C, H, W), label, id)``.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), indices into ``class_names``.
        ids: int64 (N,), what a head's memory knows the samples by; default 0..N-1. -1 stands for "not a
            training sample", which test sets use so that no training sample is ever taken for the test sample
            itself.
        class_names: one name a class; classes need not all occur. Default: the numbers up to the
            largest label.
        tasks: optional int64 (N,), the samples' task labels.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor = None  # type: ignore[assignment]  # filled in below, as are class_names
    class_names: tuple[str, ...] = ()
    tasks: Tensor | None = None

    def __repr__(self) -> str:
        shape = " x ".join(str(size) for size in self.images.shape[1:])
        return f"ImageSet({len(self.labels)} images of {shape}, {len(self.class_names)} classes)"

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ShapeError(
                f"image set: images must be uint8 (N, C, H, W), "
                f"not {str(self.images.dtype).removeprefix('torch.')} {tuple(self.images.shape)}"
            )
        count = len(self.images)
        if self.ids is None:
            object.__setattr__(self, "ids", torch.arange(count))
        if not self.class_names and count:
            object.__setattr__(self, "class_names", tuple(map(str, range(int(self.labels.max()) + 1))))
        for name, vector in (("labels", self.labels), ("ids", self.ids), ("tasks", self.tasks)):
            if vector is not None and (vector.dtype != torch.int64 or tuple(vector.shape) != (count,)):
                raise ShapeError(
                    f"image set: {name} must be int64 ({count},), "
                    f"not {str(vector.dtype).removeprefix('torch.')} {tuple(vector.shape)}"
                )
        if count and (int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.class_names)):
            low, high = int(self.labels.min()), int(self.labels.max())
            raise ShapeError(
                f"image set: labels must be 0..{len(self.class_names) - 1} "
                f"({len(self.class_names)} class names), not {low}..{high}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], self.targets[index], self._id_list[index]

    @cached_property
    def targets(self) -> list[int]:
        """The labels as a list, under the name that torchvision and Avalanche expect."""
        labels: list[int] = self.labels.tolist()
        return labels

    @cached_property
    def _id_list(self) -> list[int]:
        ids: list[int] = self.ids.tolist()
        return ids

    @property
    def num_classes(self) -> int:
        """How many class names there are, whether or not every class occurs."""
        return len(self.class_names)

    def relabeled(self, class_names: Sequence[str]) -> ImageSet:
        """The same images with their classes numbered as ``class_names`` does, as a model's ``class_names``.

        Raises:
            DataError: a class that occurs is not among them.
        """
        known = {name: label for label, name in enumerate(class_names)}
        occurring = [self.class_names[label] for label in self.labels.unique().tolist()]
        if unknown := [name for name in occurring if name not in known]:
            raise DataError(f"relabeled: there is no class {', '.join(unknown[:5])} among the {len(known)} given")
        order = torch.tensor([known.get(name, -1) for name in self.class_names], dtype=torch.int64)
        return replace(self, labels=order[self.labels], class_names=tuple(class_names))

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The samples at these positions, in this order, with their ids (a copy of the images).

        ``indices`` may also be a mask, (N,) bool.
        """
        index = torch.as_tensor(indices)
        if index.dtype == torch.bool:
            if index.shape != (len(self),):
                raise ShapeError(f"subset: a mask must be ({len(self)},), got {tuple(index.shape)}")
            index = index.nonzero().squeeze(1)
        index = index.long()
        tasks = None if self.tasks is None else self.tasks[index]
        return ImageSet(
            self.images.index_select(0, index), self.labels[index], self.ids[index], self.class_names, tasks
        )


@final
class BatchLoader:
    """Batches ``(x, y, ids)`` of an `ImageSet`, ready for a network.

    ``x`` is float32 (B, C, H, W), preprocessed and, where ``augment`` is given, augmented; ``y`` and ``ids``
    are int64 (B,). Order and augmentation depend only on ``seed`` and the epoch: every ``iter()`` takes the
    next epoch, and `set_epoch` or `load_state_dict` go back to any.

    Args:
        data: the samples.
        preprocessing: see `Preprocessing`.
        batch_size: samples a batch, at least 1; the last batch may be smaller.
        shuffle: a new order every epoch.
        augment: what is done to the uint8 images of a batch, see `get_augmentation`; None for nothing.
        seed: of order and augmentation.
        drop_last: leave out a smaller last batch.
        device: where the batches are wanted; augmentation and normalisation run there.
        channels_last: memory format of ``x``.

    Raises:
        ConfigError: if ``batch_size`` is below 1.
    """

    def __init__(
        self,
        data: ImageSet,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch size must be at least 1, not {batch_size}")
        self.data = data
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.drop_last = drop_last
        self.device = torch.device(device)
        self.channels_last = channels_last
        self.epoch = 0
        """The epoch that the next ``iter()`` will take."""
        self.rows = torch.zeros(0, dtype=torch.int64)
        """Positions in ``data`` of the samples of the batch given last, on the CPU wherever the batches are."""

    def __len__(self) -> int:
        whole, rest = divmod(len(self.data), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Makes ``epoch`` (from 0) the one that the next ``iter()`` takes."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Seed and next epoch: enough to go on with the same batches."""
        return {"seed": self.seed, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The inverse of `state_dict`."""
        self.seed, self.epoch = state["seed"], state["epoch"]

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator()
        # SeedSequence mixes the two, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common
        mixed = np.random.SeedSequence([abs(self.seed), epoch]).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(mixed) >> 1)
        count = len(self.data)
        order = torch.randperm(count, generator=generator) if self.shuffle else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            stop = min(start + self.batch_size, count)
            if order is None:
                images, y, ids = (v[start:stop] for v in (self.data.images, self.data.labels, self.data.ids))
            else:
                rows = order[start:stop]
                images, y, ids = (v.index_select(0, rows) for v in (self.data.images, self.data.labels, self.data.ids))
            self.rows = torch.arange(start, stop) if order is None else rows
            images = moved(images, self.device)
            if self.augment is not None:
                images = self.augment(images, generator)
            x = self.preprocessing(images, channels_last=self.channels_last)
            yield x, moved(y, self.device), moved(ids, self.device)


def leaves_one(count: int, batch_size: int) -> bool:
    """Whether batches of so many samples end with one of a single sample, on which batch normalisation cannot train."""
    return count > batch_size and count % batch_size == 1


@runtime_checkable
class _HasTargets(Protocol):
    targets: Any


@final
class WithIds(Dataset[tuple[Any, Any, int]]):
    """See `with_ids`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style data sets have a length

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        item = self.dataset[index]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise DataError(f"{type(self.dataset).__name__} yields {type(item).__name__}, not (x, y)")
        return item[0], item[1], int(index)

    @property
    def targets(self) -> Any:
        """The wrapped data set's ``targets``."""
        if not isinstance(self.dataset, _HasTargets):
            raise AttributeError(f"{type(self.dataset).__name__} has no targets")
        return self.dataset.targets


def with_ids(dataset: Dataset[Any]) -> Dataset[Any]:
    """Wraps a map-style data set of ``(x, y)`` so that it yields ``(x, y, id)``, the id being the position.

    An `ImageSet`, an already wrapped data set, and a ``Subset`` of either, come back as they are.
    """
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if isinstance(whole, ImageSet | WithIds):
        return dataset
    return WithIds(dataset)


def materialize(dataset: Dataset[Any], class_names: Sequence[str] = ()) -> ImageSet:
    """Puts a map-style data set of raw images into memory, for instance the data set of an Avalanche
    experience.

    Args:
        dataset: yields ``(x, y)``, ``(x, y, id)`` or ``(x, y, id, t)``, ``x`` uint8 (C, H, W), all of one
            size, and ``t`` a task label, which becomes ``tasks``. Without ids the positions are taken.
        class_names: default: the numbers up to the largest label.

    Raises:
        DataError: if the data set is empty.
        ShapeError: if an item has another form.
    """
    if isinstance(dataset, ImageSet):
        return dataset
    if len(dataset) == 0:  # type: ignore[arg-type]  # map-style data sets have a length
        raise DataError("cannot load an empty data set into memory")
    # the default collate is much slower on many small integers than one torch.tensor at the end
    batches = list(DataLoader(dataset, batch_size=512, collate_fn=_columns))
    images = torch.cat([batch[0] for batch in batches])
    numbers = [torch.cat(column) for column in zip(*(batch[1:] for batch in batches), strict=True)]
    if not 1 <= len(numbers) <= 3:
        raise ShapeError(
            f"materialize: items must be (x, y), (x, y, id) or (x, y, id, t), not {len(numbers) + 1} values"
        )
    labels, *rest = numbers
    ids = rest[0] if rest else torch.arange(len(labels))
    return ImageSet(images, labels, ids, tuple(class_names), rest[1] if len(rest) > 1 else None)


def _columns(items: list[Sequence[Any]]) -> list[Tensor]:
    images, *numbers = zip(*items, strict=True)
    if not isinstance(images[0], Tensor):
        raise ShapeError(
            f"materialize: images must be uint8 tensors, not {type(images[0]).__name__}: give the data set "
            "transform=torchvision.transforms.PILToTensor()"
        )
    return [torch.stack(images), *(torch.tensor([int(v) for v in column]) for column in numbers)]


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits positions into two parts with the same share of every class in both.

    Args:
        labels: int64 (N,).
        fraction: of each class that goes to the second part, between 0 and 1; rounded, at least one sample
            and at most all but one.
        seed: of the choice.

    Returns:
        The positions of the first and of the second part, int64, each ascending.

    Raises:
        ConfigError: if the fraction is not between 0 and 1.
        DataError: if a class has a single sample.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction to hold out must be between 0 and 1, not {fraction}")
    rng = np.random.default_rng(seed)
    first, second = [], []
    for label in np.unique(labels.numpy()):
        rows = np.flatnonzero(labels.numpy() == label)
        if len(rows) < 2:
            raise DataError(f"class {label} has a single sample; a split needs at least two of every class")
        rows = rng.permutation(rows)
        held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        first.append(rows[held:])
        second.append(rows[:held])
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in (first, second))  # type: ignore[return-value]
