"""The images of a study's cell: a data set or a balanced share of it, in the form that the paper's network takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.benchmarks.datasets import ImageData, load_dataset
from nnheads.benchmarks.studies.study import Job
from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.preprocessing import Preprocessing


def study_images(job: Job) -> ImageData:
    """The images that a cell's settings ask for.

    Settings read: ``dataset`` (``images:NAME`` is a folder of class folders in the data directory); ``classes``, the
    labels kept (all by default), renumbered; ``train_images`` and ``test_images``, so many in all, drawn class by
    class; ``per_class``, so many training images of each class; ``form``, channels and side that the network takes, to
    which digits are enlarged and padded; ``labels``, ``"random"`` for labels drawn evenly.

    Raises:
        DataError: the images are not there, or fewer than asked for.
    """
    settings = job.settings
    form = settings.get("form")
    data = _loaded(str(settings["dataset"]), job.data_dir, int(form[1]) if form else None)
    train, test = data.train, data.test
    if settings.get("classes"):
        train, test = (_only(part, tuple(settings["classes"])) for part in (train, test))
    if settings.get("per_class"):
        train = _balanced(train, int(settings["per_class"]) * train.num_classes, job.seed, exact=False)
    if settings.get("train_images"):
        train = _balanced(train, int(settings["train_images"]), job.seed)
    if settings.get("test_images"):
        test = _balanced(test, int(settings["test_images"]), job.seed + 1)
    if form:
        channels, side = form
        train, test = (replace(part, images=fitted(part.images, channels, side)) for part in (train, test))
    train = replace(train, ids=torch.arange(len(train)))
    if settings.get("labels") == "random":
        train, test = (_relabelled(part, job.seed + n) for n, part in enumerate((train, test)))
    return ImageData(train, test, statistics(train))


def statistics(images: ImageSet) -> Preprocessing:
    """Size, channels, mean and standard deviation of a set of images, by which they are normalized."""
    channels, height, width = images.images.shape[1:]
    total, squares = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for part in images.images.split(4096):
        values = part.transpose(0, 1).flatten(1).double() / 255
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / (len(images) * height * width)
    std = (squares / (len(images) * height * width) - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return Preprocessing((height, width), channels, tuple(mean.tolist()), tuple(std.tolist()))


def fitted(images: Tensor, channels: int, side: int) -> Tensor:
    """Small images in the form of larger ones: enlarged by a whole factor, padded with zeros, grey repeated in colour.

    Larger images, or such with another number of channels, are resized by area or averaged over their channels.
    """
    if images.shape[2] == images.shape[3] and images.shape[2] < side:
        factor = side // images.shape[2]
        images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        before = (side - images.shape[2]) // 2
        after = side - images.shape[2] - before
        images = F.pad(images, (before, after, before, after))
    elif tuple(images.shape[2:]) != (side, side):
        parts = [F.interpolate(p.float(), (side, side), mode="area").round().byte() for p in images.split(1024)]
        images = torch.cat(parts)
    if images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    elif images.shape[1] == 3 and channels == 1:
        images = images.float().mean(1, keepdim=True).round().byte()
    return images.contiguous()


@lru_cache(maxsize=2)  # the cells of a table share their images
def _loaded(name: str, data_dir: Path | None, size: int | None) -> ImageData:
    if name.startswith("images:"):
        folder = name.removeprefix("images:")
        if data_dir is None:
            raise DataError(f"needs --data-dir DIR with a folder {folder}/ of class folders")
        inside = data_dir / folder
        if not inside.is_dir():
            raise DataError(f"no folder {folder}/ of class folders in {data_dir}")
        return load_dataset(f"images:{inside}", size=size)  # from the files, not by way of smaller images
    return load_dataset(name, data_dir)


def _only(part: ImageSet, classes: tuple[int, ...]) -> ImageSet:
    if max(classes) >= part.num_classes:
        raise DataError(f"classes {classes} of a data set with {part.num_classes}: name others")
    place = torch.full((part.num_classes,), -1)
    place[list(classes)] = torch.arange(len(classes))
    kept = part.subset(place[part.labels] >= 0)
    names = tuple(part.class_names[c] for c in classes)
    return replace(kept, labels=place[kept.labels], class_names=names)


def _balanced(part: ImageSet, count: int, seed: int, *, exact: bool = True) -> ImageSet:
    """So many images, as many of each class as of another where there are enough.

    Where a class has not enough, others make up for it if it is to be ``exact``; else there are fewer images.
    """
    if count > len(part) and exact:
        raise DataError(f"{count} images wanted of {len(part)}: ask for fewer")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(part), generator=generator)
    labels = part.labels[order]
    rank = torch.empty(len(part), dtype=torch.int64)  # which of its class each is
    for label in labels.unique().tolist():
        own = labels == label
        rank[own] = torch.arange(int(own.sum()))
    chosen = order[rank.argsort(stable=True)[:count]] if exact else order[rank < count // part.num_classes]
    return part.subset(chosen.sort().values)


def _relabelled(part: ImageSet, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(1000 + seed)
    labels = torch.randint(part.num_classes, (len(part),), generator=generator)
    return replace(part, labels=labels)


def number(settings: Any, key: str, kind: Callable[[Any], Any] = float) -> Any:
    """A number of a cell's settings.

    Raises:
        ConfigError: it is missing.
    """
    if settings.get(key) is None:
        raise ConfigError(f"a study's cell needs {key!r} among its settings")
    return kind(settings[key])
