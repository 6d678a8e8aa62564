"""The model that answers where weights are averaged."""

from __future__ import annotations

import copy
from itertools import chain

from torch import nn

from nnheads.averaging import WeightAverage
from nnheads.headed import HeadedModel


def averaged_copy(model: HeadedModel, average: WeightAverage) -> HeadedModel:
    """A copy of a model that has the averaged weights, in evaluation mode."""
    made = copy.deepcopy(model).eval().requires_grad_(False)
    average.apply(made)
    return made


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in chain(module.parameters(), module.buffers()))
