"""Batches of new and replayed samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from nnheads.data import Augmentation, BatchLoader
from nnheads.devices import moved
from nnheads.strategies.buffer import Drawn, ExemplarBuffer

_DECODED_BYTES: Final = 2**31  # of exemplars that are kept decoded at most


@final
class OfOneTask:
    """Batches ``(x, y, ids, t)`` of a loader of ``(x, y, ids)``, as Avalanche takes them, all of task 0."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        return ((x, y, ids, torch.zeros_like(y)) for x, y, ids in self.loader)


@final
class ReplayLoader:
    """Batches ``[x, y, ids, t]``: new samples first, then replayed ones that came with earlier experiences.

    For as long as the experience is learned, the exemplars that are replayed lie decoded where the batches go: each is
    drawn several times, and is decoded once.

    Args:
        new: batches of the experience.
        buffer: the exemplars; it may change while the batches are taken.
        count: replayed samples a batch.
        experience: the experience that is being learned.
        augment: what is done to the replayed images.
        replay_dropped: whether exemplars that leave the buffer in the meantime are replayed all the same; a copy of
            those from earlier experiences is held for it.

    Attributes:
        new_rows: positions in the experience's data of the new samples of the batch given last, on the CPU.
    """

    def __init__(
        self,
        new: BatchLoader,
        buffer: ExemplarBuffer,
        count: int,
        experience: int,
        augment: Augmentation,
        replay_dropped: bool = True,
    ) -> None:
        self.new = new
        self.buffer = buffer.held_before(experience) if replay_dropped and count > 0 else buffer
        self.count = count
        self.experience = experience
        self.augment = augment
        self.new_rows = new.rows
        self._decoded: tuple[Tensor, Tensor] | None = None  # ids, ascending, and images

    def __len__(self) -> int:
        return len(self.new)

    def __iter__(self) -> Iterator[list[Tensor]]:
        generator = torch.Generator()
        seed = np.random.SeedSequence([abs(self.new.seed), self.new.epoch, 1]).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(seed) >> 1)
        for x, y, ids in self.new:
            self.new_rows = self.new.rows
            old = self.buffer.draw(self.count, generator, before=self.experience)
            if len(old.rows):
                images = self.augment(self._images_of(old, x.device), generator)
                old_x = self.new.preprocessing(images, channels_last=self.new.channels_last)
                old_y, old_ids = moved(old.labels, x.device), moved(old.ids, x.device)
                x, y, ids = torch.cat([x, old_x]), torch.cat([y, old_y]), torch.cat([ids, old_ids])
            yield [x, y, ids, torch.zeros_like(y)]

    def _images_of(self, drawn: Drawn, device: torch.device) -> Tensor:
        """(n, C, H, W) uint8 images of what was drawn, on the device."""
        buffer, preprocessing = self.buffer, self.new.preprocessing
        if self._decoded is None and (buffer.compresses or device.type != "cpu"):
            rows = buffer.rows_before(self.experience)  # others are not drawn while this one is learned
            if len(rows) * preprocessing.channels * math.prod(preprocessing.size) <= _DECODED_BYTES:
                ids, order = buffer.ids[rows].sort()
                self._decoded = ids, buffer.images_at(rows[order]).to(device)
        if self._decoded is None:
            return moved(buffer.images_at(drawn.rows), device)
        ids, images = self._decoded
        return images.index_select(0, moved(torch.searchsorted(ids, drawn.ids), device))
