"""The strategy ``impostor``: replay whose exemplars are the centers, chosen by Algorithm 1. Imports Avalanche."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from avalanche.core import SupervisedPlugin
from torch import Tensor

from nnheads.errors import ConfigError
from nnheads.headed import HeadedModel
from nnheads.strategies.averaged import module_bytes
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.center_data import headed_with_centers
from nnheads.strategies.center_plugin import CenterPlugin
from nnheads.strategies.center_rules import CenterEvent
from nnheads.strategies.impostor_options import ImpostorOptions
from nnheads.strategies.impostor_plugins import FeatureDistillation, FineTune, FrozenAfterFirst
from nnheads.strategies.learner import Learner, Setup
from nnheads.strategies.replay import ReplayStrategy
from nnheads.strategies.replay_learner import ReplayLearner


@final
class ImpostorLearner(Learner):
    """`ReplayStrategy` whose exemplars are exchanged by a `CenterPlugin`, as the runner uses it.

    Attributes:
        centers: the plugin, whose ``history`` has every change of the centers.
    """

    def __init__(self, setup: Setup) -> None:
        self.options = options = ImpostorOptions.read(setup.strategy_options)
        if not options.exemplars and setup.ema is not None:
            raise ConfigError("ema needs the centers' images, to embed them by the averaged backbone: exemplars=true")
        if not options.exemplars:
            setup = replace(setup, replay_batch=0)
        self.replay = ReplayLearner(
            setup,
            keep_images=options.exemplars,
            soft_labels=options.redistribute != "none",
            budget_bytes=options.budget_bytes,
        )
        headed_with_centers(self.strategy.model)
        strategy = self.strategy
        self.centers = CenterPlugin(
            n_t=setup.epochs,
            n_f=options.fine_tune,
            buffer=strategy.buffer,
            n_a=options.n_a,
            n_d=options.n_d,
            choose=options.choose,
            drop=options.drop,
            redistribute=options.redistribute,
            ridge=options.ridge,
            rounds=options.rounds,
            balanced=options.balanced,
            seed=setup.seed,
        )
        strategy.train_epochs = setup.epochs + options.fine_tune
        plugins: list[SupervisedPlugin] = [self.centers]
        if options.fine_tune:
            plugins.append(FineTune(setup.epochs))
        if options.drift == "frozen":
            plugins.insert(0, FrozenAfterFirst(self.centers))
        if options.drift == "distill":
            plugins.append(FeatureDistillation(options.drift_weight))
        strategy.plugins[:0] = plugins

    @property
    def strategy(self) -> ReplayStrategy:
        """The Avalanche strategy."""
        return self.replay.strategy

    @property
    def buffer(self) -> ExemplarBuffer:
        """The exemplars, which are the centers."""
        return self.replay.buffer

    @property
    def history(self) -> list[CenterEvent]:
        """Every change of the centers."""
        return self.centers.history

    def center_history(self) -> list[dict[str, Any]]:
        return [event.to_dict() for event in self.history]

    def learn(self, experience: int) -> None:
        self.replay.learn(experience)

    def scores(self, x: Tensor) -> Tensor:
        return self.replay.scores(x)

    @property
    def gradient_samples(self) -> int:
        return self.replay.gradient_samples

    @property
    def exemplars(self) -> int:
        return self.replay.exemplars if self.options.exemplars else 0

    @property
    def channels_last(self) -> bool:
        return self.replay.channels_last

    def memory_parts(self) -> dict[str, int]:
        parts = self.replay.memory_parts()
        if self.options.drift == "distill":
            parts["distillation_teacher"] = module_bytes(self.strategy.model.backbone)
        return parts

    def headed_model(self) -> HeadedModel:
        return self.replay.headed_model()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = self.replay.state()
        return tensors, {**values, "history": self.center_history()}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.replay.load_state(tensors, values)
        self.centers.history = [CenterEvent.from_dict(event) for event in values["history"]]


def build_impostor(setup: Setup) -> Learner:
    """Factory of ``impostor``."""
    return ImpostorLearner(setup)
