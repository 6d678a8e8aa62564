"""The model that answers where weights are averaged."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from nnheads.averaging import WeightAverage
from nnheads.headed import HeadedModel


def averaged_copy(model: HeadedModel, average: WeightAverage) -> HeadedModel:
    """A copy of a model that has the averaged weights, in evaluation mode."""
    made = copy.deepcopy(model).eval().requires_grad_(False)
    mine = nn.ModuleList([made.backbone, nn.ParameterList(made.head.parameters())])
    theirs = average.averaged.module
    with torch.no_grad():
        for target, source in zip(
            chain(mine.parameters(), mine.buffers()), chain(theirs.parameters(), theirs.buffers()), strict=True
        ):
            target.copy_(source)
    return made


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in chain(module.parameters(), module.buffers()))
