"""The strategy ``replay`` as the runner uses it. Importing this module imports Avalanche."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from nnheads.attach import attach_head
from nnheads.devices import autocast_for
from nnheads.headed import HeadedModel
from nnheads.strategies.budget import exemplars_within
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.learner import Learner, Setup
from nnheads.strategies.plugins import StepReport
from nnheads.strategies.replay import ReplayStrategy
from nnheads.strategies.replay_options import ReplayOptions


@final
class ReplayLearner(Learner):
    """`ReplayStrategy` as the runner uses it.

    Args:
        setup: the settings.
        make: what makes the strategy, of the arguments of `ReplayStrategy`.
        keep_images: whether the images of the samples in the buffer are kept.
        soft_labels: whether centers may get soft labels, for which room is then kept within ``budget_bytes``.
        budget_bytes: what exemplars with their centers may take, in place of ``setup.memory``. None: where images are
            compressed, the bytes of ``setup.memory`` images that are not; else there is no such limit.
    """

    def __init__(
        self,
        setup: Setup,
        make: Callable[..., ReplayStrategy] = ReplayStrategy,
        *,
        keep_images: bool = True,
        soft_labels: bool = False,
        budget_bytes: int | None = None,
    ) -> None:
        if budget_bytes is None and setup.exemplar_bytes is not None:
            budget_bytes = setup.memory * setup.image_bytes
        if budget_bytes is not None:
            fitting = exemplars_within(budget_bytes, setup, images=keep_images, soft=soft_labels)
            setup = replace(setup, memory=fitting)
        model = attach_head(
            setup.backbone,
            setup.head,
            num_classes=setup.num_classes,
            preprocessing=setup.preprocessing,
            class_names=setup.class_names,
            **setup.head_options,
        )
        buffer = ExemplarBuffer(
            setup.memory,
            (setup.preprocessing.channels, *setup.preprocessing.size) if keep_images else None,
            exemplar_bytes=setup.exemplar_bytes if keep_images else None,
            seed=setup.seed,
            class_names=setup.class_names,
        )
        self.setup = setup
        self.strategy = make(
            model=model,
            preprocessing=setup.preprocessing,
            augment=setup.augment,
            buffer=buffer,
            learning_rate=setup.learning_rate,
            replay_batch=setup.replay_batch,
            seed=setup.seed,
            precision=setup.precision,
            ema=setup.ema,
            train_mb_size=setup.batch_size,
            train_epochs=setup.epochs,
            device=setup.device,
            plugins=[StepReport(setup.on_step)] if setup.on_step is not None else None,
        )

    @property
    def buffer(self) -> ExemplarBuffer:
        """The exemplars."""
        return self.strategy.buffer

    def learn(self, experience: int) -> None:
        self.strategy.train(self.setup.benchmark.train_stream[experience], eval_streams=[])

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        model = self.headed_model().eval()
        with autocast_for(self.setup.device, self.setup.precision):
            log_probs: Tensor = model(x)
        return log_probs

    @property
    def gradient_samples(self) -> int:
        return self.strategy.gradient_samples

    @property
    def exemplars(self) -> int:
        return len(self.buffer)

    @property
    def channels_last(self) -> bool:
        return self.strategy.channels_last

    def memory_parts(self) -> dict[str, int]:
        return self.strategy.memory_parts()

    def headed_model(self) -> HeadedModel:
        model: HeadedModel = self.strategy.model
        return model

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        strategy = self.strategy
        buffer, buffer_values = self.buffer.state()
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": strategy.model.state_dict(),
            "buffer": buffer,
            "random": {"cpu": torch.get_rng_state()},
        }
        tensors = {f"{part}.{name}": tensor for part, group in parts.items() for name, tensor in group.items()}
        values = {
            "buffer": buffer_values,
            "experiences": strategy.clock.train_exp_counter,
            "epochs": strategy.epochs_done,
            "gradient_samples": strategy.gradient_samples,
        }
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        strategy = self.strategy
        strategy.model.load_state_dict(_part(tensors, "model"))
        self.buffer.load_state(_part(tensors, "buffer"), values["buffer"])
        strategy.clock.train_exp_counter = int(values["experiences"])
        strategy.epochs_done = int(values["epochs"])
        strategy.gradient_samples = int(values["gradient_samples"])
        torch.set_rng_state(tensors["random.cpu"])


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def build_replay(setup: Setup) -> Learner:
    """Factory of ``replay``."""
    options = ReplayOptions(**setup.strategy_options)
    return ReplayLearner(setup, partial(ReplayStrategy, replay_dropped=options.replay_dropped))
