"""What is plugged into Avalanche's strategies. Importing this module imports Avalanche."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final, final

import numpy as np
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.losses import ICaRLLossPlugin
from avalanche.training.plugins import (
    AGEMPlugin,
    BiCPlugin,
    CoPEPlugin,
    CurrentDataFeCAMUpdate,
    CurrentDataNCMUpdate,
    EvaluationPlugin,
    EWCPlugin,
    FeatureDistillationPlugin,
    FeCAMOracle,
    GDumbPlugin,
    GEMPlugin,
    GenerativeReplayPlugin,
    GSS_greedyPlugin,
    LFLPlugin,
    LwFPlugin,
    MASPlugin,
    MemoryFeCAMUpdate,
    MemoryNCMUpdate,
    MIRPlugin,
    NCMOracle,
    RARPlugin,
    ReplayPlugin,
    RWalkPlugin,
)
from torch import Tensor

from nnheads.averaging import WeightAverage
from nnheads.data import leaves_one
from nnheads.errors import ConfigError

_OF_OUTPUTS_OR_INPUTS: Final = (
    AGEMPlugin,
    BiCPlugin,
    CoPEPlugin,
    CurrentDataFeCAMUpdate,
    CurrentDataNCMUpdate,
    EWCPlugin,
    FeatureDistillationPlugin,
    FeCAMOracle,
    GDumbPlugin,
    GEMPlugin,
    GSS_greedyPlugin,
    GenerativeReplayPlugin,
    ICaRLLossPlugin,
    LFLPlugin,
    LwFPlugin,
    MASPlugin,
    MIRPlugin,
    MemoryFeCAMUpdate,
    MemoryNCMUpdate,
    NCMOracle,
    RARPlugin,
    RWalkPlugin,
    ReplayPlugin,
)
"""Avalanche's plugins that take the outputs of a training step for logits with a gradient, give a model the images of
the data set as they are, or bring batches of their own."""


def check_sees_no_outputs(strategy: str, plugins: Iterable[Any]) -> None:
    """ConfigError for plugins of Avalanche that cannot work where training steps are on embeddings and a data set's
    images are raw; ``strategy`` is the name of what trains so."""
    for plugin in plugins:
        if isinstance(plugin, _OF_OUTPUTS_OR_INPUTS):
            raise ConfigError(
                f"{type(plugin).__name__} does not work with {strategy}, which trains on embeddings and batches of its "
                "own: plugins can look at weights, losses and metrics (SynapticIntelligence, LRScheduler, "
                "EarlyStopping, loggers)"
            )


def silent_evaluator() -> EvaluationPlugin:
    """An evaluator without metrics and loggers: the runner evaluates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no logger
        return EvaluationPlugin()


@final
class StepReport(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is not typed
    """Calls a function after every training step with the size of the strategy's batch."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.report = report

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.report(strategy.train_mb_size)


@final
class AveragedWeights(SupervisedPlugin):  # type: ignore[misc]
    """Averages the weights over the steps of each experience.

    The average takes their place at its end, before a strategy chooses exemplars by them, keeps their answers or takes
    class means.

    Args:
        decay: see `nnheads.averaging.WeightAverage`.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.average: WeightAverage | None = None

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if self.average is None:  # not before: GDumb puts another network in its model's place
            self.average = WeightAverage(strategy.model, self.decay)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        assert self.average is not None
        self.average.update()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        # Not after the experience: DER has kept its network's answers by then.
        if strategy.clock.train_exp_epochs + 1 == strategy.train_epochs:
            assert self.average is not None
            self.average.apply()
            self.average = None


@final
class LastSamples(SupervisedPlugin):  # type: ignore[misc]
    """Passes the last experience's data as often as comes near a number of samples.

    Args:
        samples: how many; None to leave the epochs as they are.
        experiences: of the stream.
    """

    def __init__(self, samples: int | None, experiences: int) -> None:
        super().__init__()
        self.samples = samples
        self.experiences = experiences

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        if self.samples is not None and strategy.clock.train_exp_counter == self.experiences - 1:
            strategy.train_epochs = max(1, round(self.samples / len(strategy.adapted_dataset)))


@final
class NoRestOfOne(SupervisedPlugin):  # type: ignore[misc]
    """Leaves out the last sample where it would be a batch of its own, on which batch normalisation cannot train."""

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        data = strategy.adapted_dataset
        if leaves_one(len(data), strategy.train_mb_size):
            strategy.adapted_dataset = data.subset(range(len(data) - 1))


@final
class GEM(GEMPlugin):  # type: ignore[misc]
    """Avalanche's GEM with a solver that is always there: its own needs the ``quadprog`` package."""

    @torch.no_grad()
    def solve_quadprog(self, g: Tensor) -> Tensor:
        """The gradient nearest to ``g`` (p,) that hurts no experience kept; GEM's equation 11, solved in its dual.

        The dual ``min 1/2 v'GG'v + (Gg)'v, v >= memory_strength`` is a non-negative least-squares problem in
        ``v - memory_strength`` once GG' is factored.
        """
        from scipy.optimize import nnls

        kept = self.G.double().cpu().numpy()
        gradient = g.double().cpu().numpy()
        gram = kept @ kept.T
        gram = gram + np.eye(len(gram)) * (1e-3 + 1e-8 * np.trace(gram))
        linear = kept @ gradient + gram @ np.full(len(gram), self.memory_strength)
        factor = np.linalg.cholesky(gram)
        v, _ = nnls(factor.T, -np.linalg.solve(factor, linear))
        projected = gradient + kept.T @ (v + self.memory_strength)
        return torch.from_numpy(projected).to(g.dtype)
