"""The strategy ``impostor``: replay whose exemplars are the centers, chosen by Algorithm 1. Imports Avalanche."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
class ImpostorContinual(ReplayStrategy):
    """`ReplayStrategy` whose exemplars are the centers, exchanged by Algorithm 1 (see `CenterPlugin`).

    Works on any Avalanche benchmark whose items are ``(x, y, id)``, or ``(x, y, id, t)`` with a task label, with raw
    uint8 images, and with any head that votes with Gaussian kernels (impostor, nngk).

    Args:
        model: of `nnheads.attach_head`.
        buffer: the exemplars, which are the centers; its budget is the budget of both.
        options: see `ImpostorOptions`.
        train_epochs: n_t, the epochs on an experience before its centers are chosen, which a plugin may stop earlier;
            ``options.fine_tune`` passes over the exemplars follow.
        plugins: further plugins; they are called after the strategy's own.
        settings: the other settings of `ReplayStrategy`.

    Attributes:
        centers: the plugin, whose ``history`` has every change of the centers.

    Raises:
        ConfigError: the head does not vote by kernels; or averaged weights without exemplar images.
    """

    def __init__(
        self,
        *,
        model: HeadedModel,
        buffer: ExemplarBuffer,
        options: ImpostorOptions | None = None,
        train_epochs: int = 1,
        plugins: Sequence[Any] | None = None,
        **settings: Any,
    ) -> None:
        headed_with_centers(model)
        options = options or ImpostorOptions()
        if settings.get("ema") is not None and not buffer.keeps_images:
            raise ConfigError("ema needs the centers' images, to embed them by the averaged backbone: exemplars=true")
        self.centers = CenterPlugin(
            n_t=train_epochs,
            n_f=options.fine_tune_epochs,
            buffer=buffer,
            n_a=options.n_a,
            n_d=options.n_d,
            choose=options.choose,
            drop=options.drop,
            redistribute=options.redistribute,
            ridge=options.ridge,
            rounds=options.rounds,
            balanced=options.balanced,
            seed=settings.get("seed", 0),
        )
        own: list[SupervisedPlugin] = [self.centers]
        if options.fine_tune:
            own.append(FineTune(train_epochs, options.fine_tune))
        if options.drift == "frozen":
            own.insert(0, FrozenAfterFirst(self.centers))
        if options.drift == "distill":
            own.append(FeatureDistillation(options.drift_weight))
        super().__init__(
            model=model,
            buffer=buffer,
            views=options.views,
            replay_dropped=options.replay_dropped,
            train_epochs=train_epochs + options.fine_tune_epochs,
            plugins=[*own, *(plugins or [])],
            **settings,
        )


@final
class ImpostorLearner(Learner):
    """`ImpostorContinual` as the runner uses it."""

    def __init__(self, setup: Setup) -> None:
        self.options = options = ImpostorOptions.read(setup.strategy_options)
        if not options.exemplars:
            setup = replace(setup, replay_batch=0)
        self.replay = ReplayLearner(
            setup,
            partial(ImpostorContinual, options=options),
            keep_images=options.exemplars,
            soft_labels=options.redistribute != "none",
            budget_bytes=options.budget_bytes,
        )

    @property
    def strategy(self) -> ImpostorContinual:
        """The Avalanche strategy."""
        strategy = self.replay.strategy
        assert isinstance(strategy, ImpostorContinual)
        return strategy

    @property
    def centers(self) -> CenterPlugin:
        """The plugin that exchanges the centers."""
        return self.strategy.centers

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
