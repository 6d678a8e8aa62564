"""Whatever a user trains on, an `ImageSet`, a data set or a loader, as batches (x, y, ids) ready for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    default_collate,
)

from nnheads import distributed
from nnheads.batches import label_tensor
from nnheads.data import Augmentation, BatchLoader, ImageSet, WithIds, get_augmentation, leaves_one, with_ids
from nnheads.errors import ConfigError, DataError, ShapeError
from nnheads.preprocessing import Preprocessing

Data = ImageSet | BatchLoader | Dataset[Any] | Iterable[Any]
"""An `ImageSet`; a map-style data set of (x, y) or (x, y, id); or batches of these, from a loader."""


@dataclass(frozen=True)
class Target:
    """What batches are made for.

    Attributes:
        device: where they go.
        dtype: of floating-point inputs.
        preprocessing: what uint8 images go through.
        num_classes: labels must be below; None for no such bound.
        needs_ids: whether samples without an id are an error.
        channels_last: memory format of images.
        class_names: of the model; an `ImageSet` that numbers its classes otherwise is an error. None for no such names.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    preprocessing: Preprocessing | None = None
    num_classes: int | None = None
    needs_ids: bool = False
    channels_last: bool = False
    class_names: tuple[str, ...] | None = None


@final
class _LabelOfId:
    """Notices ids that come again with another label: they name several samples, of which one would be kept.

    Ids up to 16 million are looked at, as the table has a place for each.
    """

    _MOST = 2**24

    def __init__(self) -> None:
        self.table = torch.empty(0, dtype=torch.int32)

    def check(self, ids: Tensor, y: Tensor) -> None:
        if ids.device.type != "cpu" or y.device.type != "cpu" or not len(ids):
            return
        seen = (ids >= 0) & (ids < self._MOST)
        ids, y = ids[seen].long(), y[seen].int()
        if not len(ids):
            return
        if (missing := int(ids.max()) + 1 - len(self.table)) > 0:
            more = self.table.new_full((max(missing, len(self.table)),), -1)
            self.table = torch.cat([self.table, more])
        before = self.table[ids]
        self.table[ids] = y
        if not bool(((before < 0) | (before == y)).all() and (self.table[ids] == y).all()):
            wrong = int(ids[((before >= 0) & (before != y)) | (self.table[ids] != y)][0])
            raise DataError(
                f"id {wrong} comes with several labels: ids must name one sample each in all of the data; "
                "nnheads.with_ids gives such ids"
            )


@final
class Batches:
    """Batches (x, y, ids) on the target's device; ids are -1 where there are none.

    Args:
        source: yields (x, y) or (x, y, ids) a batch.
        target: see `Target`.
        augment: for uint8 images.
        seed: of the augmentation.
    """

    def __init__(
        self, source: Iterable[Any], target: Target, augment: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.source = source
        self.target = target
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)
        self._labels = _LabelOfId() if target.needs_ids else None

    @property
    def steps(self) -> int | None:
        """Number of batches; None where the source cannot tell, as a loader over a stream cannot."""
        try:
            return len(self.source) if isinstance(self.source, Sized) else None
        except TypeError:
            return None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        target = self.target
        for batch in self.source:
            x, y, ids = self._unpack(batch)
            # Compared before the transfer: afterwards it would make a GPU wait.
            if target.num_classes is not None and y.dim() == 1 and len(y) and y.device.type == "cpu":
                low, high = int(y.min()), int(y.max())
                if low < 0 or high >= target.num_classes:
                    label, last = (low if low < 0 else high), target.num_classes - 1
                    raise ShapeError(
                        f"label {label} is outside the head's classes 0 to {last}: "
                        f"attach_head(num_classes=) or model.head.widen({high + 1})"
                    )
            x = x.to(target.device, non_blocking=True)
            if x.dtype == torch.uint8:
                x = self._prepare(x)
            elif self.augment is not None:
                raise ConfigError(f"augment= is for uint8 images, not {x.dtype}: augment others in the data set")
            elif x.is_floating_point():
                x = x.to(target.dtype)
            if target.channels_last and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            yield x, y.to(target.device, non_blocking=True), ids.to(target.device, non_blocking=True)

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or not isinstance(batch[0], Tensor):
            raise DataError("a batch must be (x, y) or (x, y, ids) with a tensor x; see nnheads.with_ids")
        x, y = batch[0], label_tensor(batch[1])
        if not y.dim():
            raise DataError(
                f"{type(self.source).__name__} yields single samples, not batches: give a data set or a loader"
            )
        if len(batch) == 2:
            if self.target.needs_ids:
                raise DataError("the head stores samples and needs their ids: let the loader yield (x, y, ids)")
            return x, y, torch.full((len(y),), -1)
        ids = torch.as_tensor(batch[2])
        if ids.is_floating_point() or ids.shape != (len(y),):
            raise DataError(f"ids must be integers of shape ({len(y)},), got {ids.dtype} {tuple(ids.shape)}")
        if self.target.needs_ids and len(ids) > 1 and bool((ids == ids[0]).all()):
            raise DataError(
                f"all ids of a batch are {int(ids[0])}: the third item must be the samples' ids, not their task"
            )
        if self._labels is not None and y.dim() == 1:
            self._labels.check(ids, y)
        return x, y, ids.long()

    def _prepare(self, x: Tensor) -> Tensor:
        preprocessing = _required(self.target)
        if self.augment is not None:
            x = self.augment(x, self.generator)
        return preprocessing(x).to(self.target.dtype)


def training_batches(data: Data, target: Target, *, batch_size: int, augment: str, seed: int) -> Batches:
    """Shuffled batches to train on; a loader keeps its own order, batch size and workers."""
    augmentation = None if augment == "none" else get_augmentation(augment)
    if isinstance(data, ImageSet):
        _check_names(data, target)
        # Batch normalisation cannot train on a single sample.
        alone = len(data) > batch_size and len(data) % batch_size == 1
        images = BatchLoader(
            data,
            _required(target),
            batch_size,
            shuffle=True,
            augment=augmentation,
            seed=seed,
            drop_last=alone,
            device=target.device,
            channels_last=target.channels_last,
        )
        return Batches(images, target)
    if isinstance(data, BatchLoader):
        if augmentation is not None:
            raise ConfigError(f"augment={augment!r} is for what is not batches yet: give it to the BatchLoader")
        _check_names(data.data, target)
        return Batches(data, target)
    if isinstance(data, DataLoader):
        if isinstance(_sampler(data), DistributedSampler) and distributed.world_size() > 1:
            raise ConfigError(
                "every process must see the same batches, of which it embeds its part: leave the DistributedSampler out"
            )
        return Batches(_identified(data), target, augmentation, seed)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        count = _count(data)
        loader = DataLoader(
            _with_ids(data),
            batch_size,
            shuffle=True,
            drop_last=leaves_one(count, batch_size),
            generator=torch.Generator().manual_seed(seed),
            pin_memory=target.device.type == "cuda",
        )
        return Batches(loader, target, augmentation, seed)
    return Batches(_iterable(data), target, augmentation, seed)


def ordered_batches(data: Data, target: Target, *, batch_size: int = 512, most: int | None = None) -> Batches:
    """Every sample once, in order and without our augmentation; transforms inside a data set stay what they are.

    Of a loader with a ``SubsetRandomSampler``, or with a list of positions as its sampler, those are the samples; other
    samplers only say how often a sample comes in training.

    Args:
        data: as in `training_batches`; the same samples get the same ids.
        target: see `Target`.
        batch_size: of what is not a loader already.
        most: at most about so many samples, drawn at random.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size must be at least 1, not {batch_size}")
    if isinstance(data, BatchLoader):
        target = replace(target, preprocessing=data.preprocessing)
        data = data.data
    if isinstance(data, ImageSet):
        _check_names(data, target)
        if most is not None and most < len(data):
            data = data.subset(torch.randperm(len(data))[:most])
        images = BatchLoader(
            data, _required(target), batch_size, device=target.device, channels_last=target.channels_last
        )
        return Batches(images, target)
    if isinstance(data, DataLoader) and _yields_batches(data):
        return Batches(data, target)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        order: Sequence[int] = _order(data.dataset, most, _drawn_from(data))
        same: DataLoader[Any] = DataLoader(
            _with_ids(data.dataset),
            max(data.batch_size or 1, 128),
            sampler=order,
            num_workers=data.num_workers,
            collate_fn=_collate(data),
            pin_memory=data.pin_memory,
            worker_init_fn=data.worker_init_fn,
            multiprocessing_context=data.multiprocessing_context,
        )
        return Batches(same, target)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        pin = target.device.type == "cuda"
        return Batches(DataLoader(_with_ids(data), batch_size, sampler=_order(data, most), pin_memory=pin), target)
    return Batches(_iterable(data), target)


def _check_names(data: ImageSet, target: Target) -> None:
    """DataError where an image set and a model that both have names for their classes number them differently."""
    named, names = data.class_names, target.class_names
    if names is None or numbered(named) or numbered(names):
        return
    for label in data.labels.unique().tolist():
        if label < len(names) and named[label] != names[label]:
            raise DataError(
                f"class {label} is {named[label]!r} in the images and {names[label]!r} in the model: number them "
                "alike, with images.relabeled(model.class_names)"
            )


def numbered(names: Sequence[str]) -> bool:
    """Whether classes have no names but their numbers."""
    return all(name == str(label) for label, name in enumerate(names))


def _yields_batches(loader: DataLoader[Any]) -> bool:
    """Whether the items of a loader without batches of its own are batches already."""
    if loader.batch_sampler is not None or isinstance(loader.dataset, IterableDataset) or not _count(loader.dataset):
        return False
    item = loader.dataset[0]
    return isinstance(item, tuple | list) and len(item) > 1 and isinstance(item[1], Tensor) and item[1].dim() == 1


def _required(target: Target) -> Preprocessing:
    if target.preprocessing is None:
        raise ConfigError(
            "the images are uint8 and the model has no preprocessing: set model.preprocessing = Preprocessing(...)"
        )
    return target.preprocessing


def preprocessing_of(data: ImageSet) -> Preprocessing:
    """The preprocessing that images need by themselves: their size, and mean and deviation of each channel."""
    channels, height, width = data.images.shape[1:]
    some = data.images[torch.linspace(0, len(data) - 1, min(len(data), 10_000)).long()] if len(data) else data.images
    counts = torch.stack([torch.bincount(some[:, c].flatten().long(), minlength=256) for c in range(channels)]).double()
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    std = ((share * (levels - mean[:, None]).square()).sum(1)).sqrt().clamp_min(1 / 255)
    numbers = [tuple(round(float(v), 4) for v in each) for each in (mean, std)]
    return Preprocessing((height, width), channels, numbers[0], numbers[1])


@final
class _CollateWithIds:
    """A loader's own collate function sees (x, y) as ever; the ids go beside it. Picklable, for worker processes."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> tuple[Any, Any, Tensor]:
        batch = self.collate([(x, y) for x, y, _ in items])
        return batch[0], batch[1], torch.tensor([int(i) for *_, i in items])


def _identified(loader: DataLoader[Any]) -> Iterable[Any]:
    """The same loader over the same data set with ids; one that has ids, or cannot have any, as it is."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None or _has_ids(dataset):
        return loader
    return DataLoader(
        with_ids(dataset),
        batch_sampler=loader.batch_sampler,  # whatever it shuffles or balances are positions, which stay the same
        num_workers=loader.num_workers,
        collate_fn=_collate(loader),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _collate(loader: DataLoader[Any]) -> Callable[[list[Any]], Any] | None:
    # The collate function of an unbatched loader takes single items: it has no use here.
    if loader.batch_sampler is None:
        return default_collate
    return loader.collate_fn if _has_ids(loader.dataset) else _CollateWithIds(loader.collate_fn)


def _has_ids(dataset: Dataset[Any]) -> bool:
    if isinstance(dataset, ImageSet | WithIds):
        return True
    if not _count(dataset):
        return False
    item = dataset[0]
    return isinstance(item, tuple | list) and len(item) == 3


def _with_ids(dataset: Dataset[Any]) -> Dataset[Any]:
    return dataset if _has_ids(dataset) else with_ids(dataset)


def samples_in(data: Data) -> int:
    """How many samples `ordered_batches` visits; 0 where that is not known beforehand."""
    if isinstance(data, BatchLoader):
        return len(data.data)
    if isinstance(data, DataLoader):
        drawn = _drawn_from(data)
        return samples_in(data.dataset) if drawn is None else len(drawn)
    return len(data) if isinstance(data, Dataset) and isinstance(data, Sized) else 0


def _drawn_from(loader: DataLoader[Any]) -> list[int] | None:
    """The positions that a loader's sampler draws from, in order; None for all.

    A training and a validation set are often two samplers over one data set.
    """
    sampler = _sampler(loader)
    drawn = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    if isinstance(drawn, Tensor | Sequence | np.ndarray):
        return sorted({int(position) for position in drawn})
    return None


def _sampler(loader: DataLoader[Any]) -> Any:
    own = isinstance(loader.batch_sampler, BatchSampler)
    return loader.batch_sampler.sampler if own else loader.sampler  # type: ignore[union-attr]


def _order(dataset: Dataset[Any], most: int | None, positions: Sequence[int] | None = None) -> Sequence[int]:
    positions = range(_count(dataset)) if positions is None else positions
    if most is None or most >= len(positions):
        return positions
    return [positions[place] for place in torch.randperm(len(positions))[:most].tolist()]


def _count(dataset: Dataset[Any]) -> int:
    if not isinstance(dataset, Sized):
        raise DataError(f"{type(dataset).__name__} has no length: give a data set with __len__, or a loader")
    return len(dataset)


def _iterable(data: Any) -> Iterable[Any]:
    if isinstance(data, Iterable) and not isinstance(data, Iterator):
        return data
    raise DataError(
        f"data must be an ImageSet, a data set or a loader that can be iterated again, not {type(data).__name__}"
    )
