"""Where a model runs and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from nnheads._bfloat16 import RoundedProducts
from nnheads.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device a name stands for.

    Args:
        device: ``"auto"`` for CUDA where there is one, else MPS, else the CPU; or any name that torch takes.

    Raises:
        ConfigError: the name is unknown, or this machine has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}: give auto, cpu, cuda, cuda:N or mps") from None
    if found.type == "cuda":
        if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise ConfigError(f"device {str(device)!r} is not on this machine ({count} CUDA devices): give auto or cpu")
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not on this machine: give auto or cpu")
    return found


def resolve_precision(device: torch.device, precision: Precision = "auto") -> torch.dtype:
    """The dtype in which a backbone's matrix products run: float32 or bfloat16.

    ``"auto"`` is bfloat16 where the hardware multiplies it faster: CUDA devices from Ampere on, and CPUs with AMX or
    AVX512-BF16, where it halves the time of a convolutional step. Parameters, heads and memories stay as they are.

    Raises:
        ConfigError: ``precision`` is something else.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"unknown precision {precision!r}: give auto, float32 or bfloat16")
    if precision == "auto":
        fast = (device.type == "cpu" and cpu_bfloat16() != "no bfloat16") or (
            device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@contextmanager
def autocast_for(device: torch.device, precision: Precision = "auto") -> Iterator[None]:
    """The autocast context of a precision, see `resolve_precision`; does nothing for float32.

    A CPU without bfloat16 multiplies the rounded numbers in float32: as fast as float32, with bfloat16's results.
    """
    dtype = resolve_precision(device, precision)
    if dtype == torch.float32:
        yield
    elif device.type == "cpu" and cpu_bfloat16() == "no bfloat16":
        with torch.autocast("cpu", dtype=dtype), RoundedProducts():
            yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield


def prefers_channels_last(device: torch.device, precision: Precision = "auto") -> bool:
    """Whether convolutions are faster in channels-last memory format.

    On a GPU in bfloat16, whose gain depends on it. On a CPU with oneDNN always: it saves reordering the maps for every
    convolution.
    """
    if device.type == "cpu":
        return bool(torch.backends.mkldnn.is_available())
    return device.type == "cuda" and resolve_precision(device, precision) == torch.bfloat16


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to CUDA by pinned memory, so that the copy runs beside the network and nothing waits."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrices are multiplied faster in bfloat16 than in float32, see `resolve_precision`."""
    return resolve_precision(device) == torch.bfloat16


def auto_precision(device: str | torch.device) -> Literal["float32", "bfloat16"]:
    """What a precision of ``"auto"`` is on a device, by name.

    Raises:
        ConfigError: see `resolve_device`.
    """
    return "bfloat16" if multiplies_bfloat16(resolve_device(device)) else "float32"


@cache
def cpu_bfloat16() -> Literal["AMX", "AVX512_BF16", "no bfloat16"]:
    """What this processor multiplies bfloat16 with."""
    # With neither, torch's bfloat16 convolutions take ten times as long as float32 ones. Torch has no public name for
    # this.
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512_BF16" if torch.cpu._is_avx512_bf16_supported() else "no bfloat16"
