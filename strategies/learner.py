"""What the runner needs of a strategy, whoever wrote it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from nnheads.data import Preprocessing
from nnheads.devices import Precision
from nnheads.headed import HeadedModel


@final
@dataclass(frozen=True, eq=False)
class Setup:
    """Everything a strategy is built from.

    Attributes:
        backbone: with its dense classifier of ``num_classes`` outputs.
        head: name of the head, for strategies that take any.
        head_options: its options.
        benchmark: Avalanche benchmark, see `nnheads.benchmarks.streams.Stream.avalanche_benchmark`.
        preprocessing: what goes with its images.
        augment: see `nnheads.data.get_augmentation`.
        class_names: of all classes of the stream.
        epochs: passes over each experience.
        batch_size: new samples a step.
        replay_batch: replayed samples a step.
        memory: exemplars that may be kept.
        exemplar_bytes: bytes an exemplar's image is compressed to; None: as it is.
        learning_rate: of SGD, constant.
        seed: of everything random.
        device: where to train.
        precision: see `nnheads.devices.resolve_precision`; for Avalanche's own strategies ``"auto"`` is float32.
        ema: decay of averaged weights, None for none.
        strategy_options: further options of the strategy.
        on_step: called after every step with the number of new samples seen in it.
    """

    backbone: nn.Module
    head: str
    benchmark: Any
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    augment: str
    epochs: int
    batch_size: int
    replay_batch: int
    memory: int
    learning_rate: float
    seed: int
    device: torch.device
    head_options: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "auto"
    ema: float | None = None
    exemplar_bytes: int | None = None
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    on_step: Callable[[int], None] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole stream."""
        return len(self.class_names)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as uint8."""
        height, width = self.preprocessing.size
        return self.preprocessing.channels * height * width

    @property
    def stored_bytes(self) -> int:
        """Bytes of the image of an exemplar, as it is stored."""
        return self.exemplar_bytes or self.image_bytes


class Learner(ABC):
    """A strategy at work: it learns experience after experience and answers in between. Abstract."""

    @abstractmethod
    def learn(self, experience: int) -> None:
        """Train on an experience of the benchmark, from 0; each is given once, in order."""

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """Scores (B, classes) of preprocessed images (B, C, H, W) in evaluation mode; the largest decides."""

    @property
    @abstractmethod
    def gradient_samples(self) -> int:
        """Samples that went through the backbone with a gradient so far, replayed ones and further passes included."""

    @property
    @abstractmethod
    def exemplars(self) -> int:
        """Images kept."""

    @abstractmethod
    def memory_parts(self) -> dict[str, int]:
        """Bytes of what is kept between experiences beside one copy of the weights, by what it is."""

    @abstractmethod
    def headed_model(self) -> HeadedModel | None:
        """The model that answers, to be saved; None where the strategy decides by something that is no head."""

    def center_history(self) -> list[dict[str, Any]]:
        """Every change of the centers, see `nnheads.strategies.center_rules.CenterEvent`; none by default."""
        return []

    @property
    def channels_last(self) -> bool:
        """Memory format in which `scores` is best given its images."""
        return False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a run needs to go on after an experience: tensors, and values that JSON takes."""
        raise NotImplementedError(f"{type(self).__name__} cannot be resumed")

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be resumed")
