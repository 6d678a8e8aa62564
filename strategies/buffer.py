"""A class-balanced buffer of exemplar images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.strategies.codec import ImageCodec, RawCodec, WebPCodec


class Change(NamedTuple):
    """What an `ExemplarBuffer.offer` did.

    Attributes:
        entered: (n,) int64 positions, among the rows offered, of the samples that are held now and were not before.
        left: (m,) int64 ids that were held before and are not any more.
    """

    entered: Tensor
    left: Tensor


class Drawn(NamedTuple):
    """What an `ExemplarBuffer.draw` gave.

    Attributes:
        rows: (n,) int64 where the samples are held, until the next change; see `ExemplarBuffer.images_at`.
        labels: (n,) int64.
        ids: (n,) int64.
    """

    rows: Tensor
    labels: Tensor
    ids: Tensor


@final
class ExemplarBuffer:
    """At most ``budget`` images as uint8, the same number for every class seen.

    Each class may hold ``budget // classes seen`` images. Which ones does not depend on the order in which they were
    offered: every sample has a random priority, a hash of its id and the seed, and of each class those with the lowest
    are held. So they are a uniform sample of all that was offered, and when classes arrive the others shrink by
    dropping their highest priorities. The budget is the size of the storage: it cannot be exceeded, not even for the
    length of an update.

    Args:
        budget: images that may be held.
        image_shape: (C, H, W); None to keep the record of the samples without their images.
        exemplar_bytes: bytes an image is compressed to, see `nnheads.strategies.codec.WebPCodec`; None: as it is.
        seed: of the choice.
        class_names: of the samples that `exemplars` returns.

    Raises:
        ConfigError: a budget below 1.
    """

    def __init__(
        self,
        budget: int,
        image_shape: tuple[int, int, int] | None,
        *,
        exemplar_bytes: int | None = None,
        seed: int = 0,
        class_names: tuple[str, ...] = (),
    ) -> None:
        if budget < 1:
            raise ConfigError(f"memory must be at least 1 exemplar, not {budget}")
        self.budget = budget
        self.seed = seed
        self.class_names = class_names
        self.keeps_images = image_shape is not None
        shape = image_shape or (0, 0, 0)
        self._codec: ImageCodec = RawCodec(shape) if exemplar_bytes is None else WebPCodec(shape, exemplar_bytes)
        try:
            self._images = torch.zeros(budget, *self._codec.row_shape, dtype=torch.uint8)
            self._labels = np.zeros(budget, dtype=np.int64)
            self._ids = np.zeros(budget, dtype=np.int64)
            self._since = np.zeros(budget, dtype=np.int64)
            self._priority = np.zeros(budget, dtype=np.uint64)
        except (RuntimeError, MemoryError, ValueError):
            raise ConfigError(
                f"a memory of {budget:,} exemplars is more than this machine can hold: give less"
            ) from None
        self._count = 0
        self._seen: set[int] = set()

    def __len__(self) -> int:
        """Images held."""
        return self._count

    @property
    def classes_seen(self) -> list[int]:
        """The classes offered so far, ascending."""
        return sorted(self._seen)

    @property
    def experiences(self) -> int:
        """One more than the latest experience of a sample held."""
        return int(self._since[: self._count].max()) + 1 if self._count else 0

    @property
    def quota(self) -> int:
        """Images each class may hold now."""
        return self.budget // max(1, len(self._seen))

    @property
    def bytes(self) -> int:
        """Bytes of the rows held: images, labels, ids, priorities and experience; what `state` holds."""
        return self._count * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample, as it is stored."""
        return self._images[0].numel() + 4 * 8

    @property
    def compresses(self) -> bool:
        """Whether images are held compressed."""
        return not isinstance(self._codec, RawCodec)

    @property
    def ids(self) -> Tensor:
        """(n,) int64 ids of the samples held."""
        return torch.from_numpy(self._ids[: self._count].copy())

    @property
    def labels(self) -> Tensor:
        """(n,) int64 labels of the samples held."""
        return torch.from_numpy(self._labels[: self._count].copy())

    @property
    def ranks(self) -> Tensor:
        """(n,) int64 place of each sample held in the order of their priorities: the last of a class go first."""
        return torch.from_numpy(self._priority[: self._count].argsort().argsort())

    def held_before(self, experience: int) -> ExemplarBuffer:
        """A copy with the samples that came with an earlier experience; it has room for no others."""
        rows = self.rows_before(experience)
        made = copy.copy(self)
        made.budget = len(rows)
        made._images = self._images[rows]
        at = rows.numpy()
        made._labels, made._ids = self._labels[at], self._ids[at]
        made._since, made._priority = self._since[at], self._priority[at]
        made._count = len(rows)
        made._seen = set(self._seen)
        return made

    def exemplars(self) -> ImageSet:
        """What is held, as an image set; images that are not compressed are shared."""
        return ImageSet(self._codec.decode(self._images[: self._count]), self.labels, self.ids, self.class_names)

    def encode(self, images: Tensor) -> Tensor:
        """(n, C, H, W) uint8 images as they are stored, (n, ...) uint8; images that are not compressed are shared."""
        return self._codec.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of `encode`, up to what compression loses."""
        return self._codec.decode(codes)

    def offer(self, data: ImageSet, rows: Tensor, experience: int = 0, codes: Tensor | None = None) -> Change:
        """Offer samples; they enter where their class has room for them, others make room.

        Args:
            data: where the samples are.
            rows: (n,) int64 their positions there. One that is held already is left as it is.
            experience: the experience they come with, see `draw`.
            codes: all of ``data.images`` by `encode`, where the caller has them.

        Raises:
            DataError: a sample that is held already has another label now, or another image than in an earlier
                experience.
            ConfigError: more classes than the budget has room for. Nothing is changed after either.
        """
        ids, first = np.unique(data.ids[rows].numpy(), return_index=True)
        held = self._count
        labels = data.labels[rows].numpy()[first]
        fresh = ~np.isin(ids, self._ids[:held])
        seen = self._seen | set(labels.tolist())
        if self.budget < len(seen):
            raise ConfigError(
                f"a memory of {self.budget} exemplars is smaller than the {len(seen)} classes seen: give at least one "
                "exemplar a class"
            )
        self._check_known(data, rows[torch.from_numpy(first[~fresh])], experience, codes)
        ids, first, labels = ids[fresh], first[fresh], labels[fresh]
        self._seen.update(labels.tolist())
        priority = priorities(ids, self.seed)
        keep = self._chosen(
            np.concatenate([self._labels[:held], labels]),
            np.concatenate([self._ids[:held], ids]),
            np.concatenate([self._priority[:held], priority]),
            self.quota,
        )
        out = np.flatnonzero(~keep[:held])
        into = np.flatnonzero(keep[held:])
        left = self._ids[out].copy()
        # What enters takes the places of what leaves; the rest is appended, or the last rows move into the holes.
        places = np.concatenate([out, np.arange(held, held + max(0, len(into) - len(out)))])[: len(into)]
        where = torch.from_numpy(places)
        chosen = rows[torch.from_numpy(first[into])]
        if self.keeps_images:
            self._images[where] = self._codec.encode(data.images[chosen]) if codes is None else codes[chosen]
        self._labels[places], self._ids[places], self._since[places] = labels[into], ids[into], experience
        self._priority[places] = priority[into]
        self._count = held + max(0, len(into) - len(out))
        holes = out[len(into) :]
        if len(holes):
            self._close(holes)
        return Change(torch.from_numpy(np.sort(first[into])), torch.from_numpy(left))

    def exchange(self, left: Tensor, data: ImageSet, rows: Tensor, experience: int = 0) -> None:
        """Put samples in the place of others. A sample takes over the priority of one of its class that leaves, so
        that those held stay as likely to be kept when others are offered as before.

        Args:
            left: (m,) int64 ids of samples that leave.
            data: where those are that enter.
            rows: (n,) int64 their positions there; none of them is held.
            experience: the experience they come with, see `draw`.

        Raises:
            ConfigError: more samples than the budget allows; nothing is changed then.
        """
        held = self._count
        if held - len(left) + len(rows) > self.budget:
            raise ConfigError(f"{held - len(left) + len(rows)} exemplars do not fit a memory of {self.budget}")
        out = np.flatnonzero(np.isin(self._ids[:held], left.numpy()))
        freed: dict[int, list[np.uint64]] = {}
        for i in out[self._priority[out].argsort()]:
            freed.setdefault(int(self._labels[i]), []).append(self._priority[i])
        if len(out):
            self._close(out)
        ids, labels = data.ids[rows].numpy(), data.labels[rows].numpy()
        priority = priorities(ids, self.seed)
        for i in priority.argsort():
            if freed.get(int(labels[i])):
                priority[i] = freed[int(labels[i])].pop(0)
        places = slice(self._count, self._count + len(ids))
        if self.keeps_images and len(rows):
            self._images[places] = self._codec.encode(data.images[rows])
        self._labels[places], self._ids[places], self._since[places] = labels, ids, experience
        self._priority[places] = priority
        self._count += len(ids)
        self._seen.update(labels.tolist())

    def draw(self, count: int, generator: torch.Generator, before: int | None = None) -> Drawn:
        """A random batch, without repetition as far as there are enough.

        Args:
            count: samples wanted.
            generator: of the choice.
            before: only samples that came with an earlier experience than this one; None for all.

        Returns:
            ``count`` samples, or none where there are none.
        """
        rows = torch.arange(self._count) if before is None else self.rows_before(before)
        if not len(rows) or count < 1:
            rows = rows[:0]
        elif len(rows) >= count:
            rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
        else:
            rows = rows[torch.randint(len(rows), (count,), generator=generator)]
        at = rows.numpy()
        return Drawn(rows, torch.from_numpy(self._labels[at]), torch.from_numpy(self._ids[at]))

    def rows_before(self, experience: int) -> Tensor:
        """(n,) int64 rows, until the next change, of samples that came with an earlier experience than this one."""
        return torch.from_numpy(np.flatnonzero(self._since[: self._count] < experience))

    def images_at(self, rows: Tensor) -> Tensor:
        """(n, C, H, W) uint8 images of rows (n,) that `draw` gave."""
        return self._codec.decode(self._images[rows])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values with which `load_state` goes on."""
        held = slice(self._count)
        tensors = {
            "images": self._images[held],
            "labels": self.labels,
            "ids": self.ids,
            "since": torch.from_numpy(self._since[held].copy()),
            "priority": torch.from_numpy(self._priority[held].view(np.int64).copy()),
        }
        return tensors, {"seed": self.seed, "classes_seen": self.classes_seen}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            ConfigError: more samples than the budget allows.
        """
        count = len(tensors["ids"])
        if count > self.budget:
            raise ConfigError(f"{count} saved exemplars do not fit a memory of {self.budget}")
        self._images[:count] = tensors["images"]
        self._labels[:count], self._ids[:count], self._since[:count] = (
            tensors[name].numpy() for name in ("labels", "ids", "since")
        )
        self._priority[:count] = tensors["priority"].numpy().view(np.uint64)
        self._count = count
        self.seed = int(values["seed"])
        self._seen = {int(label) for label in values["classes_seen"]}

    def _check_known(self, data: ImageSet, rows: Tensor, experience: int, codes: Tensor | None) -> None:
        """DataError where samples that are held, at positions (n,), are others than those held under their ids."""
        if not len(rows):
            return
        ids, labels = data.ids[rows].numpy(), data.labels[rows].numpy()
        order = self._ids[: self._count].argsort()
        held = order[np.searchsorted(self._ids[order], ids)]
        wrong = np.flatnonzero(self._labels[held] != labels)
        if len(wrong):
            i = wrong[0]
            raise DataError(
                f"id {ids[i]} is that of a sample of class {self._labels[held[i]]} already, and now of one of class "
                f"{labels[i]}: ids must not repeat over the experiences of a stream"
            )
        # Within an experience a sample may be offered more than once.
        earlier = torch.from_numpy(np.flatnonzero(self._since[held] < experience))
        if not self.keeps_images or not len(earlier):
            return
        given = self.encode(data.images[rows[earlier]]) if codes is None else codes[rows[earlier]]
        other = (given != self._images[torch.from_numpy(held)[earlier]]).flatten(1).any(1).nonzero().flatten()
        if len(other):
            raise DataError(
                f"id {ids[earlier[other[0]]]} is that of another image of an earlier experience: ids must not repeat "
                "over the experiences of a stream"
            )

    @staticmethod
    def _chosen(
        labels: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], priority: npt.NDArray[np.uint64], quota: int
    ) -> npt.NDArray[np.bool_]:
        """Whether each sample is among the ``quota`` of its class with the lowest priorities."""
        order = np.lexsort((ids, priority, labels))
        ordered = labels[order]
        starts = np.searchsorted(ordered, ordered)
        keep = np.zeros(len(labels), dtype=bool)
        keep[order] = np.arange(len(labels)) - starts < quota
        return keep

    def _close(self, holes: npt.NDArray[np.int64]) -> None:
        """Move the last rows into the holes, so that the rows held are the first ones."""
        keep = self._count - len(holes)
        inner = holes[holes < keep]
        movers = np.setdiff1d(np.arange(keep, self._count), holes)
        self._images[torch.from_numpy(inner)] = self._images[torch.from_numpy(movers)]
        for column in (self._labels, self._ids, self._since, self._priority):
            column[inner] = column[movers]
        self._count = keep


def priorities(ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """A pseudo-random number for each id: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    start = np.random.SeedSequence(abs(seed)).generate_state(1, np.uint64)[0]
    x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
