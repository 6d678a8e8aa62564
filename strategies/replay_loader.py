"""Batches of new and replayed samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import numpy as np
import torch
from torch import Tensor

from nnheads.data import Augmentation, BatchLoader
from nnheads.strategies.buffer import ExemplarBuffer


@final
class ReplayLoader:
    """Batches ``[x, y, ids, t]``: new samples first, then replayed ones that came with earlier experiences.

    Args:
        new: batches of the experience.
        buffer: the exemplars; it may change while the batches are taken.
        count: replayed samples a batch.
        experience: the experience that is being learned.
        augment: what is done to the replayed images.

    Attributes:
        new_in_batch: new samples in the batch given last.
    """

    def __init__(
        self, new: BatchLoader, buffer: ExemplarBuffer, count: int, experience: int, augment: Augmentation
    ) -> None:
        self.new = new
        self.buffer = buffer
        self.count = count
        self.experience = experience
        self.augment = augment
        self.new_in_batch = 0

    def __len__(self) -> int:
        return len(self.new)

    def __iter__(self) -> Iterator[list[Tensor]]:
        generator = torch.Generator()
        seed = np.random.SeedSequence([abs(self.new.seed), self.new.epoch, 1]).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(seed) >> 1)
        for x, y, ids in self.new:
            self.new_in_batch = len(y)
            images, old_y, old_ids = self.buffer.draw(self.count, generator, before=self.experience)
            if len(old_y):
                images = self.augment(images.to(x.device), generator)
                old_x = self.new.preprocessing(images, channels_last=self.new.channels_last)
                x, y, ids = torch.cat([x, old_x]), torch.cat([y, old_y.to(y.device)]), torch.cat([ids, old_ids.to(ids)])
            yield [x, y, ids, torch.zeros_like(y)]
