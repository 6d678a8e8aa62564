"""The steps of a training, and what each head needs of them; `nnheads.training.fit` is the way in."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from nnheads import distributed
from nnheads.averaging import WeightAverage
from nnheads.devices import Precision, autocast_for
from nnheads.errors import ConfigError, DataError, DivergedError
from nnheads.evaluation import target_for
from nnheads.headed import HeadedModel
from nnheads.heads import BiasedHead, Head, MemoryHead
from nnheads.interrupt import InterruptFlag
from nnheads.loaders import Data, ordered_batches, samples_in, training_batches
from nnheads.progress import Progress, Report

_REFRESH_EVERY = 4  # epochs, for heads whose centers do not follow by themselves: a twelfth of the cost of training
_INTERRUPTED_SAMPLES = 4096  # enough for a vote, seconds to embed


@dataclass
class History:
    """What a training did.

    Attributes:
        epochs: ``loss`` (mean over the epoch), ``seconds`` and ``samples`` of each epoch.
        seconds: altogether, refreshes included.
        gradient_samples: samples that went through a backward pass.
        refresh_seconds: of that, embedding samples for the memory in passes of their own.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    gradient_samples: int = 0
    refresh_seconds: float = 0.0


@final
class TrainingRun:
    """One call of `fit`."""

    def __init__(
        self,
        model: HeadedModel,
        data: Data,
        device: torch.device,
        precision: Precision,
        lr: float,
        report: Report,
        interrupt: InterruptFlag,
    ) -> None:
        self.model, self.data, self.device, self.precision, self.lr = model, data, device, precision, lr
        self.report, self.interrupt = report, interrupt
        head = model.head
        self.trains_with_memory = head.uses_memory and head.trains_with == "output"
        needs = {"num_classes": head.num_classes, "needs_ids": head.uses_memory}
        self.target = target_for(model, device, precision, **needs)
        self.history = History()
        self.step = 0
        self.started_empty = not _held(head)

    def prepare(
        self,
        epochs: int,
        batch_size: int,
        optimizer: str,
        weight_decay: float,
        schedule: str,
        augment: str,
        ema: float | None,
        seed: int,
    ) -> None:
        self.epochs = epochs
        self.batches = training_batches(self.data, self.target, batch_size=batch_size, augment=augment, seed=seed)
        self.steps = self.batches.steps
        if self.steps == 0:
            raise DataError("there is nothing to train on: the data set is empty")
        # Only weights that are in the plain order are reordered, for they are put back into it at the end.
        self.reordered = self.target.channels_last and all(p.is_contiguous() for p in self.model.backbone.parameters())
        if self.reordered:
            self.model.backbone.to(memory_format=torch.channels_last)
        self.optimizer = self.scheduler = self.average = None
        if not epochs:
            return
        self.optimizer = _build_optimizer(self.model, optimizer, self.lr, weight_decay)
        if schedule == "onecycle":
            if self.steps is None:
                raise ConfigError("schedule 'onecycle' needs a loader with a length: give schedule='constant'")
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                [group["lr"] for group in self.optimizer.param_groups],
                total_steps=max(2, epochs * self.steps),
                cycle_momentum=False,
            )
        self.average = WeightAverage(self.model, ema) if ema is not None else None

    def epoch(self, number: int) -> None:
        """One pass over the data."""
        _train_mode(self.model)
        head = self.model.head
        storing = self.trains_with_memory and number == 0
        if storing:
            head.begin_refresh()
        started, samples, steps = time.perf_counter(), 0, 0
        total = torch.zeros((), device=self.device, dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        mean = math.nan
        try:
            for x, y, ids in self.batches:
                total += self._step(x, y, ids, storing, number) * len(y)
                samples, steps = samples + len(y), steps + 1
                # Reading a number makes a GPU wait: there only now and then.
                if self.device.type == "cpu" or steps % 20 == 0 or steps == self.steps:
                    mean = float(total) / samples
                    if not math.isfinite(mean):
                        self._diverged(number, x)
                    rate = samples / (time.perf_counter() - started)
                    self.report.step(Progress(number, self.epochs, steps, self.steps, mean, rate))
                if self.interrupt.requested:
                    break
            if not samples and not self.interrupt.requested:
                raise DataError("there is nothing to train on: the loader gave no batch")
        except BaseException as error:
            # Ctrl-C reaches worker processes too, and a loader complains when they end.
            if not isinstance(error, RuntimeError) or not self.interrupt.requested:
                if storing:
                    head.abandon_refresh()
                raise
        distributed.average_statistics(distributed.sharing(self.model))
        if self.trains_with_memory:
            # Ends the storing; and centers have moved, so an automatic width is chosen anew.
            head.refreshed()
        seconds = time.perf_counter() - started
        if samples:
            mean = float(total) / samples
            self.history.epochs.append({"loss": mean, "seconds": seconds, "samples": float(samples)})
            self.report.epoch(number, self.epochs, mean, seconds, samples)

    def _step(self, x: Tensor, y: Tensor, ids: Tensor, storing: bool, epoch: int) -> Tensor:
        model, optimizer = self.model, self.optimizer
        assert optimizer is not None
        with autocast_for(self.device, self.precision):
            z = distributed.features(model, x)
            if (storing or self.device.type == "cpu") and not _finite(z):
                self._diverged(epoch, x)
            if storing:
                # Before the loss, so that there are centers from the first step on; a sample's own is left out.
                model.head.memorize(z.detach(), y, ids=ids)
            loss = model.head.loss(z, y, ids=ids)
        optimizer.zero_grad()
        loss.backward()
        distributed.sum_gradients(distributed.sharing(model).parameters())
        optimizer.step()
        self.step += 1
        self.history.gradient_samples += len(y)
        if self.scheduler is not None and self.step < self.epochs * (self.steps or 0):
            self.scheduler.step()
        if self.average is not None:
            self.average.update()
        return loss.detach()

    def _diverged(self, epoch: int, x: Tensor) -> None:
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise DataError(f"epoch {epoch + 1}, step {self.step + 1}: the input holds NaN or infinity")
        raise DivergedError(
            f"training diverged in epoch {epoch + 1}, step {self.step + 1}: the loss is not finite; "
            f"give a lower lr than {self.lr:g}"
        )

    def embed_memory(self, *, replace: bool = False, most: int | None = None) -> None:
        """A pass over all samples, in evaluation mode, that stores them or moves the centers of those stored.

        Args:
            replace: whether samples that are stored get a new center also where centers are learned or loose. Soft
                labels stay.
            most: at most so many samples.
        """
        started = time.perf_counter()
        self.report.memory()
        batches = ordered_batches(self.data, self.target, most=most)
        with autocast_for(self.device, self.precision):
            if not replace:
                self.model.refresh(batches)
            elif isinstance(self.model.head, MemoryHead):
                memory = self.model.head.memory
                soft = (memory.soft_row[: len(memory)] >= 0).nonzero().squeeze(1)
                ids, values = memory.ids[soft], memory.values_at(soft)
                self.model.memorize(batches, same_images=True)
                memory.relabel(ids, values)
        self.history.refresh_seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Leaves the averaged weights and a memory that fits them."""
        head, interrupted = self.model.head, self.interrupt.requested
        if interrupted and (self.trains_with_memory or not self.step):
            return  # the centers fit the weights as they are, not the averaged ones
        if self.average is not None:
            self.average.apply()
            distributed.average_statistics(distributed.sharing(self.model))
        if not head.uses_memory:
            return
        if interrupted:
            self.embed_memory(most=None if _held(head) else _INTERRUPTED_SAMPLES)
        elif isinstance(head, MemoryHead) and head.anchored:
            # Trained centers were held near embeddings of augmented images in batch norm's training mode.
            self.embed_memory(replace=True)
        elif _moves(head) or not _held(head) or _held(head) < samples_in(self.data):
            self.embed_memory()


# ---- what a head needs -------------------------------------------------------------------------------------------


def _follows(head: Head) -> bool:
    return isinstance(head, MemoryHead) and head.follows


def _moves(head: Head) -> bool:
    return isinstance(head, MemoryHead) and head.moves


def fills_first(head: Head, refresh: str | int, epochs: int) -> bool:
    if epochs == 0:
        return False  # `finish` does
    fixed = isinstance(head, MemoryHead) and not head.follows and not head.moves
    return head.trains_with == "output" and (refresh == 0 or fixed)


def refreshes_after(head: Head, refresh: str | int, epoch: int) -> bool:
    if isinstance(refresh, int):
        return refresh > 0 and (epoch + 1) % refresh == 0
    # After the first epoch too: most of what it stored comes from a backbone that had hardly learned.
    return _moves(head) and not _follows(head) and epoch % _REFRESH_EVERY == 0


def _finite(z: Tensor) -> bool:
    """Whether embeddings are finite and so small that their squared norms are too."""
    return bool(torch.isfinite(z.detach().to(torch.promote_types(z.dtype, torch.float32)).square().sum()))


def _held(head: Head) -> int:
    return len(head.memory) if isinstance(head, MemoryHead) else 0


# ---- setting up -----------------------------------------------------------------------------------------------


def _build_optimizer(model: HeadedModel, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    backbone = list(model.backbone.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in backbone if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in backbone if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        *model.head.param_groups(lr, weight_decay),
    ]
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("every parameter is frozen: nothing to train; epochs=0 fills the memory")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def _train_mode(model: HeadedModel) -> None:
    """Training mode, but norms whose parameters are frozen keep the statistics that these belong to."""
    model.train()
    if isinstance(model.head, BiasedHead) and model.head.gating:
        model.backbone.eval()  # the gate learns what the network answers as it is used
    for module in model.backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            weights = list(module.parameters())
            if weights and not any(p.requires_grad for p in weights):
                module.eval()
