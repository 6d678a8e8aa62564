"""For what is kept beyond a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def lasting(function: F) -> F:
    """Decorator of what changes tensors that are kept: without gradients, and outside of `torch.inference_mode`.

    A tensor made in inference mode can never be changed again outside of it.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))
