"""Any Avalanche strategy as the runner uses it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from nnheads.attach import attach_head
from nnheads.devices import Precision, autocast_for, prefers_channels_last
from nnheads.errors import DivergedError
from nnheads.headed import HeadedModel
from nnheads.heads.dense import DenseHead
from nnheads.strategies.learner import Learner, Setup
from nnheads.strategies.plugins import NoRestOfOne


@final
@dataclass(frozen=True)
class Kept:
    """What a strategy keeps between experiences.

    Attributes:
        exemplars: images.
        parts: bytes of anything else, by what it is.
    """

    exemplars: int = 0
    parts: tuple[tuple[str, int], ...] = ()


@final
class Features(nn.Module):
    """The embedding of a headed model as a module of its own.

    Args:
        headed: the model.
        precision: of its matrix products; embeddings are in float32 always. ``"auto"`` is float32, as Avalanche has it.
    """

    def __init__(self, headed: HeadedModel, precision: Precision = "auto") -> None:
        super().__init__()
        self.headed = headed
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with _autocast(x, self.precision):
            z = self.headed.features(_laid_out(x, self.precision))
        return z.float()


@final
class Lowered(nn.Module):
    """A network whose matrix products run in another precision; its output is in float32.

    A loss, a distillation or a class mean outside of it is computed as Avalanche computes it.

    Args:
        network: the network.
        precision: of its matrix products.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.network = network
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        with _autocast(x, self.precision):
            out: Tensor = self.network(_laid_out(x, self.precision))
        return out.float()


def _autocast(x: Tensor, precision: Precision) -> AbstractContextManager[None]:
    return autocast_for(x.device, "float32" if precision == "auto" else precision)


def _laid_out(x: Tensor, precision: Precision) -> Tensor:
    """Images in the memory format in which that precision is fast, as our own strategies have them."""
    if precision != "auto" and x.ndim == 4 and prefers_channels_last(x.device, precision):
        return x.contiguous(memory_format=torch.channels_last)
    return x


@final
class AvalancheLearner(Learner):
    """One of Avalanche's strategies as the runner uses it.

    Args:
        setup: the settings.
        strategy: the Avalanche strategy.
        kept: tells what it keeps.
        own_scores: its scores of images where they are not the model's output; classes not seen are masked then.
        before: called before an experience is learned.
        at_once: whether the whole stream is learned at the first experience, and nothing after it.
    """

    def __init__(
        self,
        setup: Setup,
        strategy: Any,
        kept: Callable[[], Kept] = Kept,
        *,
        own_scores: Callable[[Tensor], Tensor] | None = None,
        before: Callable[[int], None] | None = None,
        at_once: bool = False,
    ) -> None:
        self.setup = setup
        self.strategy = strategy
        self.kept = kept
        self.own_scores = own_scores
        self.before = before
        self.at_once = at_once
        self._seen: set[int] = set()
        strategy.plugins.append(NoRestOfOne())  # last: after those that choose what is trained on
        self._counted = _count_gradient_samples(setup.backbone)

    def learn(self, experience: int) -> None:
        stream = self.setup.benchmark.train_stream
        if self.before is not None:
            self.before(experience)
        if not self.at_once:
            self.strategy.train(stream[experience], eval_streams=[])
        elif experience == 0:
            self.strategy.train(stream, eval_streams=[])
        if not all(bool(part.isfinite().all()) for part in self.strategy.model.parameters()):
            raise DivergedError("training diverged: weights are not finite any more; give a lower lr")
        self._seen.update(int(c) for c in stream[experience].classes_in_this_experience)

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        self.strategy.model.eval()
        if self.own_scores is None:
            found: Tensor = self.strategy.model(x)
            return found
        if not self._seen:  # class means of nothing
            return torch.zeros(len(x), self.setup.num_classes, device=x.device)
        found = self.own_scores(x)
        # finite: what is masked for another reason comes behind them
        everything = found.new_full((len(x), self.setup.num_classes), torch.finfo(found.dtype).min)
        seen = sorted(self._seen)
        everything[:, seen] = found[:, seen]
        return everything

    @property
    def gradient_samples(self) -> int:
        return self._counted[0]

    @property
    def exemplars(self) -> int:
        return self.kept().exemplars

    def memory_parts(self) -> dict[str, int]:
        kept = self.kept()
        return {"exemplars": kept.exemplars * self.setup.stored_bytes, **dict(kept.parts)}

    def headed_model(self) -> HeadedModel | None:
        if self.own_scores is not None:
            return None
        model = self.strategy.model
        # A copy: the strategy goes on with its model as it is.
        made = attach_head(
            copy.deepcopy(model.network if isinstance(model, Lowered) else model),
            "dense",
            num_classes=self.setup.num_classes,
            preprocessing=self.setup.preprocessing,
            class_names=self.setup.class_names,
        )
        classifier = made.attached()[0].layer
        if not isinstance(made.head, DenseHead) or not isinstance(classifier, nn.Linear):
            return None
        made.head.output.load_state_dict(classifier.state_dict())
        return made.eval()


def _count_gradient_samples(backbone: nn.Module) -> list[int]:
    """A list of one number that goes up by the samples that pass the backbone with a gradient, in any copy of it."""
    count = [0]

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            count[0] += len(args[0])

    backbone.register_forward_pre_hook(add)
    return count
