"""What the strategy ``impostor`` plugs into `ReplayStrategy` beside its centers. Imports Avalanche."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, final

import numpy as np
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from nnheads.devices import autocast_for
from nnheads.strategies.center_plugin import CenterPlugin
from nnheads.strategies.replay import ReplayStrategy


@final
class FineTune(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is not typed
    """After n_t epochs, every epoch of a `ReplayStrategy` is a pass over its exemplars.

    Args:
        n_t: epochs before.
        passes: how many follow; of the last a part where it is no whole number.
    """

    def __init__(self, n_t: int, passes: float) -> None:
        super().__init__()
        self.n_t = n_t
        self.passes = passes
        self._epochs = 0

    def before_training_exp(self, strategy: ReplayStrategy, **kwargs: Any) -> None:
        self._epochs = 0

    def before_training_epoch(self, strategy: ReplayStrategy, **kwargs: Any) -> None:
        if self._epochs >= self.n_t:
            strategy.dataloader = _ExemplarBatches(strategy, min(1.0, self.passes - (self._epochs - self.n_t)))
        self._epochs += 1


@final
class FrozenAfterFirst(SupervisedPlugin):  # type: ignore[misc]
    """Nothing is trained after the first experience: samples only become centers."""

    def __init__(self, centers: CenterPlugin) -> None:
        super().__init__()
        self.centers = centers

    def before_training_exp(self, strategy: ReplayStrategy, **kwargs: Any) -> None:
        self.centers.intake_first = strategy.clock.train_exp_counter > 0

    def before_training_epoch(self, strategy: ReplayStrategy, **kwargs: Any) -> None:
        if strategy.clock.train_exp_counter > 0:
            strategy.dataloader = []


@final
class FeatureDistillation(SupervisedPlugin):  # type: ignore[misc]
    """The tie of equation 8 on each batch, replayed samples too, with embeddings of the backbone before the experience.

    Args:
        tie: lambda.
    """

    def __init__(self, tie: float) -> None:
        super().__init__()
        self.tie = tie

    def before_training_exp(self, strategy: ReplayStrategy, **kwargs: Any) -> None:
        if strategy.clock.train_exp_counter == 0:
            return
        before = copy.deepcopy(strategy.model).eval().requires_grad_(False)

        def loss(x: Tensor, z: Tensor) -> Tensor:
            with torch.no_grad(), autocast_for(strategy.device, strategy.precision):
                then = before.features(x).float()
            tie: Tensor = self.tie * (z - then).square().sum(-1).mean()
            return tie

        strategy.further_loss = loss

    def after_training_exp(self, strategy: ReplayStrategy, **kwargs: Any) -> None:
        strategy.further_loss = None


@final
class _ExemplarBatches:
    """One pass over a share of the exemplars, drawn at random, in batches ``[x, y, ids, t]``."""

    def __init__(self, strategy: ReplayStrategy, share: float) -> None:
        self.strategy = strategy
        self.count = min(len(strategy.buffer), max(2, round(share * len(strategy.buffer))))
        self.new_rows = torch.zeros(0, dtype=torch.int64)
        self.size: int = strategy.train_mb_size + strategy.replay_batch

    def __len__(self) -> int:
        return max(1, self.count // self.size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        strategy = self.strategy
        seed = np.random.SeedSequence([abs(strategy.seed), strategy.epochs_done, 2]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed) >> 1)
        held = strategy.buffer.exemplars()
        # In equal parts: batch normalisation cannot train on a rest of one.
        drawn = torch.randperm(len(held), generator=generator)[: self.count]
        for rows in drawn.tensor_split(len(self)):
            images = strategy.augment(held.images[rows].to(strategy.device), generator)
            x = strategy.preprocessing(images, channels_last=strategy.channels_last)
            y, ids = held.labels[rows].to(strategy.device), held.ids[rows].to(strategy.device)
            yield [x, y, ids, torch.zeros_like(y)]
