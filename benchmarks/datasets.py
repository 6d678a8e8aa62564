"""Image sets by name: bundled, downloaded, or read from a folder; the same `ImageSet` whatever the layout on
disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.benchmarks.core50 import find_core50, load_core50
from nnheads.benchmarks.folders import (
    Progress,
    check_same_classes,
    from_folder,
    has_class_folders,
    list_classes,
)
from nnheads.benchmarks.published_sets import DatasetFacts, find, read
from nnheads.benchmarks.svhn import load_svhn
from nnheads.data import ImageSet, Preprocessing, stratified_split
from nnheads.errors import ConfigError, DataError, unknown_name
from nnheads.storage import cache_root

__all__ = [
    "DATASETS",
    "DatasetFacts",
    "ImageData",
    "Progress",
    "cache_root",
    "from_folder",
    "list_datasets",
    "load_dataset",
    "load_images",
]

HELD_OUT = 0.2
"""Share of each class that is the test set where a source has none of its own (digits, ``DIR/<class>/*``);
the choice is that of `stratified_split` with seed 0, the same whatever the seed of a run."""


def _facts(
    name: str,
    title: str,
    layout: str,
    classes: int,
    side: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> DatasetFacts:
    return DatasetFacts(name, title, layout, classes, Preprocessing((side, side), len(mean), mean, std))


_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

DATASETS: dict[str, DatasetFacts] = {
    facts.name: facts
    for facts in (
        _facts("digits", "load_digits", "", 10, 8, (0.3055,), (0.3759,)),
        _facts("mnist", "MNIST", "MNIST/raw", 10, 28, (0.1307,), (0.3081,)),
        _facts("fmnist", "FashionMNIST", "FashionMNIST/raw", 10, 28, (0.2860,), (0.3530,)),
        _facts("svhn", "SVHN", "", 10, 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        _facts("cifar10", "CIFAR10", "cifar-10-batches-py", 10, 32, *_CIFAR10),
        _facts("cifar100", "CIFAR100", "cifar-100-python", 100, 32, *_CIFAR100),
        _facts("core50", "CORe50", "", 50, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        _facts("cifar110", "CIFAR10 and CIFAR100", "", 110, 32, *_CIFAR10),
    )
}

JOINED: dict[str, tuple[str, str]] = {"cifar110": ("cifar10", "cifar100")}
"""Data sets that are two others: the classes of the first, then those of the second."""


@final
@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory.

    Attributes:
        train: training images; ids 0..N-1.
        test: test images; every id is -1, so that a head never takes a training sample for the test sample
            itself.
        preprocessing: what goes with both.
    """

    train: ImageSet
    test: ImageSet
    preprocessing: Preprocessing


def list_datasets() -> list[str]:
    """The names that `load_dataset` takes, beside ``images:DIR``."""
    return list(DATASETS)


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    size: int | None = None,
    progress: Progress | None = None,
) -> ImageData:
    """Loads the training and test images of a data set, downloading them on first use.

    Args:
        name: one of `list_datasets`, or ``images:DIR`` with ``DIR/train/<class>/*`` and
            ``DIR/test/<class>/*``, or with ``DIR/<class>/*`` of which a fixed fifth of each class is the test
            set.
        data_dir: where the data set is: torchvision's layout, or ``train/<class>/*`` and ``test/<class>/*``;
            or the parent of a folder of the data set's name (``cifar10``) that holds either. Default:
            ``$NNHEADS_DATA`` if it has the data set, else `cache_root`, into which it is downloaded.
        size: side of the images in pixels, to which they are resized; None for the data set's own. Images of
            ``images:DIR`` are read at that size, not at the 64 pixels that large ones are read at otherwise.
        progress: called during slow steps.

    Raises:
        UnknownNameError: if there is no data set of that name.
        DataError: if the data are missing, damaged or do not fit together.
    """
    if name.startswith("images:"):
        return _load_own(_own_folder(name, data_dir), progress, size)
    preprocessing = _known(name).preprocessing
    train, test = (load_images(name, data_dir, train=part, progress=progress) for part in (True, False))
    if train.class_names != test.class_names:
        raise DataError(f"{name}: train and test have different classes: both need the same folders")
    if size is not None and (size, size) != preprocessing.size:
        train, test = (replace(images, images=_resized(images.images, (size, size))) for images in (train, test))
        preprocessing = replace(preprocessing, size=(size, size))
    return ImageData(train, test, preprocessing)


def load_images(
    name: str, data_dir: str | Path | None = None, *, train: bool, progress: Progress | None = None
) -> ImageSet:
    """One half of `load_dataset`: the training or the test images. Same arguments and errors."""
    if name.startswith("images:"):
        data = load_dataset(name, data_dir, progress=progress)
        return data.train if train else data.test
    facts = _known(name)
    if name == "digits":
        images = _digits(train)
    elif name == "svhn":
        images = load_svhn(data_dir, cache_root(), train=train)
    elif name == "core50":
        root = find_core50(data_dir, cache_root())
        images = load_core50(root, facts.preprocessing, train=train, progress=progress)
    elif name in JOINED:
        first, second = (load_images(part, data_dir, train=train, progress=progress) for part in JOINED[name])
        images = _join(first, second)
    else:
        layout, root = find(facts, data_dir, progress)
        if layout == "folders":
            check_same_classes(root / "train", root / "test")
            half = root / ("train" if train else "test")
            images = from_folder(half, facts.preprocessing, progress=progress)
        else:
            images = read(facts, root, train)
    return images if train else _without_ids(images)


def load_foreign(name: str, data_dir: str | Path | None, preprocessing: Preprocessing) -> ImageSet:
    """The test images of a data set in the form that a model trained on another one takes.

    Args:
        name, data_dir: as in `load_dataset`.
        preprocessing: gives size and channels; images are resized, and made grey or RGB.
    """
    found = load_images(name, data_dir, train=False)
    return replace(found, images=in_form(found.images, preprocessing.size, preprocessing.channels))


def in_form(images: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """Images (N, C, H, W) uint8 resized to ``size`` and made grey (1 channel) or RGB (3)."""
    from torchvision.transforms.functional import rgb_to_grayscale

    if tuple(images.shape[2:]) != size:
        images = _resized(images, size)
    if images.shape[1] != channels:
        images = rgb_to_grayscale(images) if channels == 1 else images.expand(-1, 3, -1, -1).contiguous()
    return images


def _known(name: str) -> DatasetFacts:
    if name not in DATASETS:
        raise unknown_name("data set", name, [*DATASETS, "images:DIR"])
    return DATASETS[name]


def _without_ids(images: ImageSet) -> ImageSet:
    return replace(images, ids=torch.full_like(images.labels, -1))


def _digits(train: bool) -> ImageSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    part = stratified_split(labels, HELD_OUT)[0 if train else 1]
    return ImageSet(images[part], labels[part], class_names=tuple("0123456789"))


def _join(first: ImageSet, second: ImageSet) -> ImageSet:
    return ImageSet(
        torch.cat([first.images, second.images]),
        torch.cat([first.labels, second.labels + first.num_classes]),
        class_names=first.class_names + second.class_names,
    )


def _own_folder(name: str, data_dir: str | Path | None) -> Path:
    given = name.removeprefix("images:")
    if not given and data_dir is None:
        raise ConfigError("images: needs a folder of class folders, as in images:DIR")
    return Path(given or str(data_dir)).expanduser()


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    def resize(part: Tensor) -> Tensor:
        return F.interpolate(part, size, mode="bilinear", antialias=True)

    return torch.cat([resize(part) for part in images.split(1024)])


def _load_own(folder: Path, progress: Progress | None, size: int | None = None) -> ImageData:
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    halves = [part for part in ("train", "test") if has_class_folders(folder / part)]
    if len(halves) == 1:
        missing = "test" if halves == ["train"] else "train"
        raise DataError(
            f"{folder} has {halves[0]}/<class>/* but no {missing}/<class>/*: put both there, or class folders alone"
        )
    if halves:
        check_same_classes(folder / "train", folder / "test")
        train = from_folder(folder / "train", size=size, progress=progress)
        preprocessing = _measured(train)
        test = from_folder(folder / "test", preprocessing, progress=progress)
        return ImageData(train, _without_ids(test), preprocessing)
    whole = from_folder(folder, size=size, progress=progress)
    for label, files in enumerate(list_classes(folder).values()):
        if len(files) < 2:
            raise DataError(f"{folder / whole.class_names[label]} has a single image: put at least two there")
    first, second = stratified_split(whole.labels, HELD_OUT)
    train = replace(whole.subset(first), ids=torch.arange(len(first)))
    return ImageData(train, _without_ids(whole.subset(second)), _measured(train))


def _measured(images: ImageSet) -> Preprocessing:
    # in chunks: a float copy of all images would take four times their memory
    channels, height, width = images.images.shape[1:]
    total, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for chunk in torch.split(images.images, 2048):
        values = chunk.transpose(0, 1).flatten(1).double() / 255
        total += values.sum(1)
        squares += values.square().sum(1)
    pixels = len(images) * height * width
    mean = total / pixels
    # a channel that never varies has no scale of its own: one grey level stands in
    std = (squares / pixels - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return Preprocessing((height, width), channels, tuple(mean.tolist()), tuple(std.tolist()))
