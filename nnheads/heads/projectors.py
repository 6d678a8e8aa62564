"""Projectors: small networks from a feature map to the space in which the biased network searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

_LARGEST_MAP = 16
"""Larger feature maps are averaged down to this side first: the projector must stay cheap beside what it spares."""


@final
class PooledProjector(nn.Module):
    """Two 3x3 convolutions between max-poolings, averaged over what positions are left, and a linear layer.

    Pooling before each convolution keeps it cheap: behind the first stage of a ResNet-9 a tenth of the operations of
    what it may spare. Feature vectors (C,) and tokens (T, C), averaged over T, go through a hidden layer instead.

    Args:
        shape: of what one sample gives: (C, H, W), (T, C) or (C,).
        dim: width of the projection.
    """

    def __init__(self, shape: Sequence[int], dim: int) -> None:
        super().__init__()
        self.maps = len(shape) == 3
        channels = shape[0] if self.maps else shape[-1]
        width = max(16, min(2 * channels, 128))
        if self.maps:
            self.body = nn.Sequential(*_stage(channels, width), *_stage(width, 2 * width), nn.AdaptiveMaxPool2d(2))
        else:
            self.body = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 2 * width), nn.ReLU(inplace=True))
        self.output = nn.Linear(2 * width, dim)

    def forward(self, h: Tensor) -> Tensor:
        """(B, *shape) -> (B, dim)."""
        if self.maps:
            if max(h.shape[-2:]) > _LARGEST_MAP:
                h = F.adaptive_avg_pool2d(h, _LARGEST_MAP)
            if h.device.type == "cpu":
                # There torch pools a dozen times as fast so, and the pools took half of the projector's time.
                h = h.contiguous(memory_format=torch.channels_last)
            z = self.body(h).mean((2, 3))
        else:
            z = self.body(h if h.dim() == 2 else h.mean(1))
        projected: Tensor = self.output(z)
        return projected


@final
class GoogLeNetTrunk(nn.Module):
    """An auxiliary classifier of GoogLeNet without its last layer (Szegedy et al. 2015, section 5): 1,024 features.

    Args:
        aux: torchvision's auxiliary classifier, whose layers are taken as they are.
    """

    def __init__(self, aux: nn.Module) -> None:
        super().__init__()
        self.conv = aux.get_submodule("conv")
        self.fc1 = aux.get_submodule("fc1")

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1024)."""
        h = self.conv(F.adaptive_avg_pool2d(h, (4, 4)))
        return F.relu(self.fc1(h.flatten(1)), inplace=True)


@final
class InceptionTrunk(nn.Module):
    """The auxiliary classifier of Inception v3 without its last layer: 768 features.

    Args:
        aux: torchvision's auxiliary classifier, whose layers are taken as they are.
    """

    def __init__(self, aux: nn.Module) -> None:
        super().__init__()
        self.conv0 = aux.get_submodule("conv0")
        self.conv1 = aux.get_submodule("conv1")

    def forward(self, h: Tensor) -> Tensor:
        """(B, 768, H, W), 17x17 or more, -> (B, 768)."""
        h = self.conv1(self.conv0(F.avg_pool2d(h, kernel_size=5, stride=3)))
        return F.adaptive_avg_pool2d(h, (1, 1)).flatten(1)


def build_projector(spec: Mapping[str, Any]) -> nn.Module | None:
    """The projector that a specification describes.

    Args:
        spec: ``kind`` (``"pooled"``, ``"googlenet"``, ``"inception"`` or ``"module"``), ``shape`` of one sample's
            features, ``dim`` of the projection.

    Returns:
        The module; None for the kind ``"module"``, which only its maker can build.

    Raises:
        ConfigError: the kind is unknown or does not take features of that shape.
    """
    kind, shape, dim = spec.get("kind"), tuple(spec.get("shape", ())), spec.get("dim")
    if not isinstance(dim, int) or dim < 1:
        raise ConfigError(f"projector: dim must be 1 or more, got {dim!r}")
    if kind == "module":
        return None
    if kind not in _KINDS:
        raise ConfigError(f"projector: kind must be one of {', '.join([*_KINDS, 'module'])}, got {kind!r}")
    if not 1 <= len(shape) <= 3 or (kind != "pooled" and len(shape) != 3):
        raise ConfigError(f"projector {kind!r} does not take features of shape {shape}")
    return _KINDS[kind](shape, dim)


def auxiliary_projector(model: nn.Module, at: str | None) -> tuple[str, str, nn.Module] | None:
    """The place, kind and trunk of an auxiliary classifier of torchvision's GoogLeNet or Inception v3.

    Args:
        model: any model.
        at: where it is to be split; None for the first place at which the model has an auxiliary classifier.

    Returns:
        ``(at, kind, trunk)``; the trunk is a copy, with the weights of the model's own where it has them. None where
        the model is another one or has no auxiliary classifier at that place.
    """
    import copy

    from torchvision.models import GoogLeNet, Inception3

    if isinstance(model, GoogLeNet):
        places = {"inception4a": (model.aux1, 512), "inception4d": (model.aux2, 528)}
    elif isinstance(model, Inception3):
        places = {"Mixed_6e": (model.AuxLogits, 768)}
    else:
        return None
    at = at or next(iter(places))
    if at not in places:
        return None
    own, channels = places[at]
    kind = "googlenet" if isinstance(model, GoogLeNet) else "inception"
    return at, kind, _TRUNKS[kind](copy.deepcopy(own)) if own is not None else _fresh_trunk(kind, channels)


def _stage(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    # An odd row or column counts too, and a map of one position stays one.
    pool = nn.MaxPool2d(2, ceil_mode=True)
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return pool, conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


def _pooled(shape: tuple[int, ...], dim: int) -> nn.Module:
    return PooledProjector(shape, dim)


def _fresh_trunk(kind: str, channels: int) -> nn.Module:
    import importlib

    # torchvision.models has functions of the modules' names.
    aux = importlib.import_module(f"torchvision.models.{kind}").InceptionAux(channels, 1)
    trunk: nn.Module = _TRUNKS[kind](aux)
    return trunk


def _trunk(kind: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    def build(shape: tuple[int, ...], dim: int) -> nn.Module:
        if dim != TRUNK_DIMS[kind]:
            raise ConfigError(f"projector {kind!r} gives {TRUNK_DIMS[kind]} features, not {dim}")
        return _fresh_trunk(kind, shape[0])

    return build


TRUNK_DIMS: dict[str, int] = {"googlenet": 1024, "inception": 768}
_TRUNKS: dict[str, Callable[[nn.Module], nn.Module]] = {"googlenet": GoogLeNetTrunk, "inception": InceptionTrunk}
_KINDS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "pooled": _pooled,
    "googlenet": _trunk("googlenet"),
    "inception": _trunk("inception"),
}
