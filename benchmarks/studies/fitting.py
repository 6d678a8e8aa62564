"""The papers' training: SGD whose rate falls on a plateau, at given steps or along one cycle; watched along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from nnheads.benchmarks.studies.augmentations import BY_NAME
from nnheads.benchmarks.studies.study import Settings
from nnheads.data import BatchLoader, ImageSet
from nnheads.devices import Precision, autocast_for, prefers_channels_last, resolve_device
from nnheads.errors import ConfigError, unknown_name
from nnheads.preprocessing import Augmentation, Preprocessing

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a model and a batch: the loss that is minimized."""


@final
@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `Recipe.of` reads it from a cell's settings, by these names.

    Attributes:
        batch_size: images a step; 0 for all of them, full-batch gradient descent.
        epochs: passes at most; 0 where ``steps`` counts.
        steps: steps at most; 0 where ``epochs`` counts.
        lr: the highest learning rate.
        momentum: Nesterov's; 0 for plain SGD.
        weight_decay: of weight matrices and kernels; not of biases and norms.
        schedule: ``"plateau"``: divided by ``factor`` when the epoch's loss has not fallen by a thousandth for
            ``patience`` epochs, at most ``drops`` times, then training ends; ``"milestones"``: divided by ``factor`` at
            these shares of the training; ``"onecycle"``: up for 30 %, then down; ``"constant"``.
        factor, patience, drops, milestones: see ``schedule``.
        augment: a name in `nnheads.benchmarks.studies.augmentations.BY_NAME`.
        precision: see `nnheads.devices.resolve_precision`.
    """

    batch_size: int = 128
    epochs: int = 0
    steps: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["plateau", "milestones", "onecycle", "constant"] = "constant"
    factor: float = 10.0
    patience: int = 3
    drops: int = 5
    milestones: Sequence[float] = ()
    augment: str = "none"
    precision: Precision = "auto"

    @classmethod
    def of(cls, settings: Settings) -> Recipe:
        """The recipe in a cell's settings."""
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})

    def length(self, per_epoch: int) -> int:
        """Steps at most.

        Raises:
            ConfigError: neither epochs nor steps are given, or both.
        """
        if (self.epochs > 0) == (self.steps > 0):
            raise ConfigError("a recipe needs epochs or steps, one of the two, above 0")
        return self.steps or self.epochs * per_epoch


@final
@dataclass
class Training:
    """What a training did.

    Attributes:
        losses: mean loss of each epoch, the last one as far as it went.
        rates: learning rate of each epoch.
        steps: taken.
        seconds: of training alone, what was watched not counted.
        watched: one entry a moment watched: its ``step``, and what was found.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    watched: list[dict[str, float]] = field(default_factory=list)

    def columns(self) -> dict[str, list[Any]]:
        """What was watched, a list for each thing."""
        keys = dict.fromkeys(key for entry in self.watched for key in entry)
        return {key: [entry.get(key) for entry in self.watched] for key in keys}


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a network that gives logits."""
    return nn.functional.cross_entropy(model(x).float(), y)


def train(
    model: nn.Module,
    loss: Loss,
    images: ImageSet,
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    seed: int,
    device: str,
    report: Callable[[str, int, int], None] | None = None,
    watch: Callable[[int], Mapping[str, float]] | None = None,
    watch_at: Sequence[int] = (),
) -> Training:
    """Trains a model in place; it is left in evaluation mode on the device.

    Args:
        model: moved to the device.
        loss: see `Loss`.
        images: to train on.
        preprocessing: theirs.
        recipe: see `Recipe`.
        seed: of order, augmentation and dropout.
        device: see `resolve_device`.
        report: called after steps.
        watch: called in evaluation mode with the number of steps taken.
        watch_at: numbers of steps at which it is; 0 is before training, and -1 is after the last.

    Raises:
        ConfigError: the recipe cannot work, or the loss becomes NaN or infinite.
    """
    where = resolve_device(device)
    model.to(where).train()
    size = recipe.batch_size or len(images)
    loader = BatchLoader(
        images,
        preprocessing,
        min(size, len(images)),
        shuffle=True,
        augment=None if recipe.augment == "none" else _augmentation(recipe.augment),
        seed=seed,
        drop_last=len(images) > size,  # a small last batch is a poor one for NCA and for batch normalization
        device=where,
        channels_last=prefers_channels_last(where, recipe.precision),
    )
    total = recipe.length(len(loader))
    optimizer = _optimizer(model, recipe)
    schedule = _Schedule(optimizer, recipe, total)
    done = Training()
    wanted = {total if at == -1 else at for at in watch_at} if watch is not None else set()

    def look(step: int) -> None:
        if watch is not None:
            model.eval()
            with torch.no_grad():
                done.watched.append({"step": step, **watch(step)})
            model.train()

    torch.manual_seed(seed)
    if 0 in wanted:
        look(0)
    while done.steps < total and not schedule.ended:
        started, sum_of_losses, samples = time.perf_counter(), 0.0, 0
        done.rates.append(optimizer.param_groups[0]["lr"])
        for x, y, _ in loader:
            with autocast_for(where, recipe.precision):
                value = loss(model, x, y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            done.steps += 1
            found = float(value.detach())
            if not math.isfinite(found):
                raise ConfigError(f"training diverged at step {done.steps}: loss not finite; lower lr {recipe.lr:g}")
            sum_of_losses, samples = sum_of_losses + found * len(y), samples + len(y)
            schedule.step(done.steps)
            if report is not None and done.steps % 10 == 0:
                report(f"training, loss {found:.3f}", done.steps, total)
            if done.steps in wanted and done.steps < total:
                done.seconds += time.perf_counter() - started
                look(done.steps)
                started = time.perf_counter()
            if done.steps >= total:
                break
        done.seconds += time.perf_counter() - started
        done.losses.append(sum_of_losses / max(1, samples))
        schedule.epoch(done.losses[-1])
    if total in wanted:  # the schedule may have ended it earlier
        look(done.steps)
    model.eval()
    return done


def moments(steps: int, count: int) -> list[int]:
    """Steps at which to look, closer together at the beginning: 0, and ``count`` more up to the last."""
    chosen = [round(steps * (i / count) ** 2) for i in range(count + 1)]
    return sorted({min(steps, max(i, at)) for i, at in enumerate(chosen)})


def _augmentation(name: str) -> Augmentation:
    if name not in BY_NAME:
        raise unknown_name("augmentation", name, BY_NAME)
    return BY_NAME[name]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


@final
class _Schedule:
    """The learning rate, step by step and epoch by epoch."""

    def __init__(self, optimizer: torch.optim.SGD, recipe: Recipe, total: int) -> None:
        self.recipe, self.optimizer, self.total = recipe, optimizer, total
        self.ended = False
        self.best, self.waited, self.dropped = math.inf, 0, 0
        self.cycle: torch.optim.lr_scheduler.OneCycleLR | None = None
        if recipe.schedule == "onecycle":
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, recipe.lr, total_steps=max(2, total), cycle_momentum=False
            )
        self.milestones = sorted(round(share * total) for share in recipe.milestones)

    def step(self, step: int) -> None:
        if self.cycle is not None and step < self.total:
            self.cycle.step()
        elif self.recipe.schedule == "milestones":
            for _ in range(self.milestones.count(step)):
                self._drop()

    def epoch(self, loss: float) -> None:
        if self.recipe.schedule != "plateau":
            return
        if loss < self.best * (1 - 1e-3):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited >= self.recipe.patience:
            self.waited = 0
            if self.dropped == self.recipe.drops:
                self.ended = True
            else:
                self.dropped += 1
                self._drop()

    def _drop(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] /= self.recipe.factor
