"""Streams: a data set cut into experiences that arrive one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from nnheads.benchmarks.datasets import ImageData, Progress, load_dataset
from nnheads.benchmarks.specs import STREAMS, StreamSpec, list_streams, stream_spec
from nnheads.data import ImageSet, Preprocessing, stratified_split
from nnheads.errors import ConfigError, DataError, unknown_name

__all__ = ["STREAMS", "Scenario", "Stream", "StreamSpec", "list_streams", "make_stream", "stream_spec"]

Scenario = Literal["class", "task"]
"""``class``: nothing is known of a test sample but its image. ``task``: also its experience, and with it
which classes it can be of; task labels are then the experiences' numbers, otherwise 0."""

DRIFT = 0.5
"""New instances: how far a class's share of an experience swings around the equal one."""


@final
@dataclass(frozen=True, eq=False)
class Stream:
    """A data set in memory and its experiences. Make one with `make_stream`.

    Attributes:
        spec: as used; for ``images:DIR`` with what was settled from the images.
        seed: of class order and of the drift of new instances.
        scenario: see `Scenario`.
        train: all training images, ids as loaded: 0..N-1 (after `holdout` a part of these).
        test: all test images, every id -1.
        preprocessing: what goes with both.
        class_order: the class indices in order of arrival.
        experiences: the classes of each experience, in order of arrival.
        train_parts: the positions in ``train`` of each experience's samples, int64.
    """

    spec: StreamSpec
    seed: int
    scenario: Scenario
    train: ImageSet
    test: ImageSet
    preprocessing: Preprocessing
    class_order: list[int]
    experiences: list[tuple[int, ...]]
    train_parts: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for e in range(len(self.experiences)):
            for what, part in (("training", self.train_parts[e]), ("test", self.test_indices(e))):
                if len(part) == 0:
                    raise DataError(
                        f"stream {self.spec.name}: experience {e} has no {what} images; take fewer experiences"
                    )

    def __len__(self) -> int:
        return len(self.experiences)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of all classes, by class index."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """How many classes there are in the whole stream."""
        return self.train.num_classes

    @property
    def shared_test(self) -> bool:
        """Whether every experience has the same test images, all of them (new instances): one evaluation
        serves."""
        return self.spec.kind == "instances"

    def train_indices(self, e: int) -> Tensor:
        """Positions in ``train`` of the samples of experience ``e``, int64, ascending."""
        return self.train_parts[e]

    def test_indices(self, e: int) -> Tensor:
        """Positions in ``test`` of the samples of the classes of experience ``e``, int64, ascending."""
        return torch.isin(self.test.labels, torch.tensor(self.experiences[e])).nonzero().flatten()

    def train_set(self, e: int) -> ImageSet:
        """The training images of experience ``e``."""
        return self.train.subset(self.train_indices(e))

    def test_set(self, e: int) -> ImageSet:
        """The test images of the classes of experience ``e``."""
        return self.test.subset(self.test_indices(e))

    def classes_seen(self, e: int) -> list[int]:
        """The classes of experiences 0 to ``e``, ascending."""
        return sorted({label for classes in self.experiences[: e + 1] for label in classes})

    def class_mask(self, e: int) -> Tensor:
        """Bool (num_classes,), true for the classes of experience ``e``: what the scenario ``task`` tells at
        test."""
        mask = torch.zeros(self.num_classes, dtype=torch.bool)
        mask[list(self.experiences[e])] = True
        return mask

    @cached_property
    def benchmark(self) -> Any:
        """`avalanche_benchmark` with raw images and ids, made once."""
        return self.avalanche_benchmark()

    def avalanche_benchmark(self, *, transformed: bool = False, ids: bool = True) -> Any:
        """The stream as an Avalanche benchmark: ``train_stream`` and ``test_stream``, one experience for each
        of ours.

        Args:
            transformed: False: images are raw uint8, for strategies that augment and normalise a batch at a
                time. True: float32, normalised, and augmented one by one while training, as Avalanche's own
                strategies expect.
            ids: True: items are ``(x, y, id, t)``. False: ``(x, y, t)``, the only form that some of
                Avalanche's own strategies unpack.
        """
        from nnheads.benchmarks.scenarios import build_benchmark

        return build_benchmark(self, transformed=transformed, ids=ids)

    def holdout(self, fraction: float = 0.1, seed: int = 0) -> Stream:
        """The same stream with part of its training images in place of its test images, to choose settings
        by.

        Args:
            fraction: of the training images of each class, see `stratified_split`.
            seed: of the choice.

        Returns:
            A stream whose ``train`` is the rest, with the ids it had, and whose ``test`` is the part held
            out.
        """
        kept, held = stratified_split(self.train.labels, fraction, _apart(seed, 1))
        test = self.train.subset(held)
        return replace(self._with_training(kept), test=replace(test, ids=torch.full_like(test.ids, -1)))

    def thinned(self, share: float, seed: int = 0) -> Stream:
        """The same stream with a share of its training images, to try settings quickly.

        Args:
            share: of the training images of each class, see `stratified_split`.
            seed: of the choice.
        """
        return self._with_training(stratified_split(self.train.labels, share, _apart(seed, 2))[1])

    def _with_training(self, kept: Tensor) -> Stream:
        """With some of the training images, by position."""
        position = torch.full((len(self.train),), -1)
        position[kept] = torch.arange(len(kept))
        parts = tuple(position[part][position[part] >= 0] for part in self.train_parts)
        return replace(self, train=self.train.subset(kept), train_parts=parts)


def make_stream(
    name: str,
    *,
    data_dir: str | Path | None = None,
    seed: int = 0,
    scenario: Scenario = "class",
    progress: Progress | None = None,
) -> Stream:
    """Loads the data of a stream and cuts them into experiences.

    Split streams: the classes are permuted by ``seed`` and dealt out in that order; labels stay the data
    set's own. In ``split-cifar110`` CIFAR-10's ten classes come first whatever the seed, and the rest are
    permuted.

    ``new-instances:STREAM``: every experience has all classes. The images of a class are shuffled by ``seed``
    and each goes to exactly one experience; of E experiences, number e gets a share of the class in
    proportion to ``1 + 0.5 sin(2 pi (e / E + phase))`` with a phase for each class drawn by ``seed``, so that
    class proportions change a little from one experience to the next. The test images of every experience are
    all test images.

    Args:
        name: see `stream_spec`.
        data_dir: see `nnheads.benchmarks.datasets.load_dataset`.
        seed: of class order or drift, at least 0.
        scenario: see `Scenario`.
        progress: called while images are downloaded or decoded.

    Raises:
        UnknownNameError: if there is no such stream.
        ConfigError: if the scenario is not known, or is ``task`` with new instances.
        DataError: see `nnheads.benchmarks.datasets.load_dataset`.
    """
    spec = stream_spec(name)
    if scenario not in ("class", "task"):
        raise unknown_name("scenario", scenario, ("class", "task"))
    if scenario == "task" and spec.kind == "instances":
        raise ConfigError(f"{name}: scenario 'task' needs experiences with classes of their own; take 'class'")
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, not {seed}")
    data = _first_classes(load_dataset(spec.dataset, data_dir, progress=progress), spec.classes)
    count = data.train.num_classes
    if spec.dataset.startswith("images:"):
        experiences = spec.experiences if spec.kind == "instances" else min(5, max(2, count // 2))
        backbone = spec.backbone if min(data.preprocessing.size) >= 32 else "convnet"
        spec = replace(spec, experiences=experiences, backbone=backbone)
    rng = np.random.default_rng(seed)
    fixed = spec.first_classes if spec.first_fixed else 0
    order = [*rng.permutation(fixed).tolist(), *(fixed + rng.permutation(count - fixed)).tolist()]
    if spec.kind == "instances":
        groups = [tuple(order)] * spec.experiences
        parts = _drifting_parts(data.train.labels, spec.experiences, rng)
    else:
        groups = _deal(order, spec.experiences, spec.first_classes)
        labels = data.train.labels
        parts = tuple(torch.isin(labels, torch.tensor(group)).nonzero().flatten() for group in groups)
    return Stream(spec, seed, scenario, data.train, data.test, data.preprocessing, order, groups, parts)


def _apart(seed: int, use: int) -> int:
    """A seed of its own for one use of a seed: the same seed shuffles the same class alike, and what is held out of new
    instances would come from the first experience."""
    return int(np.random.SeedSequence([seed, use]).generate_state(1)[0])


def _first_classes(data: ImageData, classes: int) -> ImageData:
    if classes in (0, data.train.num_classes):
        return data
    halves = []
    for half, is_train in ((data.train, True), (data.test, False)):
        kept = half.subset((half.labels < classes).nonzero().flatten())
        ids = torch.arange(len(kept)) if is_train else kept.ids
        halves.append(replace(kept, ids=ids, class_names=half.class_names[:classes]))
    return ImageData(halves[0], halves[1], data.preprocessing)


def _deal(order: Sequence[int], experiences: int, first: int) -> list[tuple[int, ...]]:
    head = [tuple(order[:first])] if first else []
    rest = np.array_split(np.array(order[first:]), experiences - len(head))
    return [*head, *(tuple(group.tolist()) for group in rest)]


def _drifting_parts(labels: Tensor, experiences: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
    parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(experiences)]
    steps = np.arange(experiences) / experiences
    for label in np.unique(labels.numpy()):
        rows = rng.permutation(np.flatnonzero(labels.numpy() == label))
        weights = 1 + DRIFT * np.sin(2 * np.pi * (steps + rng.random()))
        cuts = np.rint(np.cumsum(weights)[:-1] / weights.sum() * len(rows)).astype(int)
        # every class is known from the first experience, however few images it has
        for part, piece in zip(parts, np.split(rows, np.maximum(cuts, 1)), strict=True):
            part.append(piece)
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in parts)
