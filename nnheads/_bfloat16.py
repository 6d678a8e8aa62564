"""Products in bfloat16 on processors that have no instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
    }
)


class RoundedProducts(TorchFunctionMode):
    """Under autocast, convolves and multiplies in float32 what is rounded to bfloat16, and rounds the result.

    That is what hardware with bfloat16 does: it multiplies rounded numbers, sums in float32 and rounds the sum. So the
    results, and the gradients, differ from the hardware's by the order of the sums alone. Torch's own kernels for a
    CPU without the instructions are right as well, but a training step of a slim ResNet-18 takes ten times as long.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not torch.is_autocast_enabled("cpu") or not _all_cast((*args, *kwargs.values())):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            product = func(*map(_rounded, args), **{name: _rounded(value) for name, value in kwargs.items()})
        return product.to(torch.bfloat16)


def _all_cast(values: Iterable[Any]) -> bool:
    # What autocast leaves alone stays so: float64, and tensors of other devices.
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return all(t.is_floating_point() and t.dtype != torch.float64 and t.device.type == "cpu" for t in tensors)


def _rounded(value: Any) -> Any:
    # The way back through both casts rounds the gradients too, as they are on hardware with bfloat16.
    return value.to(torch.bfloat16).float() if isinstance(value, torch.Tensor) else value
