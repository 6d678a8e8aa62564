"""The ordinary classifier: one linear layer, or a few with an activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._lasting import lasting
from .base import Head, one_of, positive
from .registry import register_head

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


@register_head("dense")
class DenseHead(Head):
    """``log softmax(W z + b)``, optionally behind hidden layers.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        hidden: widths of hidden layers, for instance ``(256, 128, 84)`` for the Conv-KNN paper's baseline.
        activation: between the layers.
        bias: whether the layers have a bias.
    """

    uses_memory = False
    differentiable = True
    trains_with = "output"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden: Sequence[int] = (),
        activation: Literal["relu", "tanh", "sigmoid", "gelu"] = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, num_classes)
        one_of("dense", "activation", activation, tuple(_ACTIVATIONS))
        for width in hidden:
            positive("dense", "each hidden width", width, integer=True)
        self.hidden, self.activation, self.bias = tuple(hidden), activation, bias
        layers: list[nn.Module] = []
        width = in_features
        for after in self.hidden:
            layers += [nn.Linear(width, after, bias=bias), _ACTIVATIONS[activation]()]
            width = after
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(width, num_classes, bias=bias)

    def config(self) -> dict[str, Any]:
        return {"hidden": list(self.hidden), "activation": self.activation, "bias": self.bias}

    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        weight = self.output.weight
        logits: Tensor = self.output(self.layers(z.to(weight.dtype)))
        return logits.log_softmax(-1)

    @lasting
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        self.output = wider(self.output, self.num_classes)


@torch.no_grad()
def wider(layer: nn.Linear, num_classes: int) -> nn.Linear:
    """The layer with more outputs: those there are keep their weights, the new ones are initialized as usual."""
    old = layer.out_features
    if num_classes <= old:
        return layer
    new = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None).to(layer.weight)
    new.weight[:old] = layer.weight
    if layer.bias is not None:
        new.bias[:old] = layer.bias
    return new
