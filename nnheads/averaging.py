"""An average of a model's weights along training."""

from __future__ import annotations

from itertools import chain
from typing import final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nnheads.headed import HeadedModel


@final
class WeightAverage:
    """Exponential moving average of a network's parameters and batch-norm statistics.

    The decay of step n is ``min(decay, (1 + n) / (10 + n))``, so that a short training is not averaged with its own
    beginning. Integer buffers are copied: an average would corrupt an index. Of a head the parameters are averaged; its
    memory is not.

    Args:
        model: what is trained.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.live = _averaged_parts(model)
        self.averaged = AveragedModel(self.live, multi_avg_fn=self._average, use_buffers=True)

    def update(self) -> None:
        """Takes in the weights as they are; once a step."""
        self.averaged.update_parameters(self.live)
        self.steps += 1

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Puts the averaged weights into the model, or into another one like it."""
        if not self.steps:
            return
        into = self.live if model is None else _averaged_parts(model)
        mine = chain(self.averaged.module.parameters(), self.averaged.module.buffers())
        for target, source in zip(chain(into.parameters(), into.buffers()), mine, strict=True):
            target.copy_(source)

    @torch.no_grad()
    def _average(
        self,
        averaged: tuple[Tensor, ...] | list[Tensor],
        current: tuple[Tensor, ...] | list[Tensor],
        _: Tensor | int,
    ) -> None:
        if averaged[0].is_floating_point():
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            get_ema_multi_avg_fn(decay)(averaged, current, self.steps)
        else:
            torch._foreach_copy_(averaged, current)


def _averaged_parts(model: nn.Module) -> nn.ModuleList:
    if not isinstance(model, HeadedModel):
        return nn.ModuleList([model])
    return nn.ModuleList([model.backbone, nn.ParameterList(model.head.parameters())])
