"""Networks by name, each with its dense classifier, ready for ``attach_head``."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from typing import Any, Final, final

from torch import Tensor, nn
from torch.nn import functional as F

from nnheads.errors import ConfigError, UnknownNameError, unknown_name

_SPEC: Final = "_nnheads_backbone_spec"
# Where the weights came from: whoever rebuilds a backbone from its spec brings the weights.
_WEIGHT_OPTIONS: Final = frozenset({"weights", "pretrained", "progress"})
_SOURCES: Final = ("torchvision", "timm")


@final
class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


@final
class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem with stride 1 and no max-pooling.

    With ``nf=20`` this is the slim ResNet-18 of GEM (Lopez-Paz and Ranzato 2017), which continual learning
    compares on, with the parameter names that Avalanche uses; with ``nf=64`` the usual ResNet-18 for CIFAR.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        nf: channels of the first stage; the embedding has ``8 * nf`` features.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, nf: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, nf, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(nf)
        self.layer1 = nn.Sequential(_Block(nf, nf, 1), _Block(nf, nf, 1))
        self.layer2 = nn.Sequential(_Block(nf, 2 * nf, 2), _Block(2 * nf, 2 * nf, 1))
        self.layer3 = nn.Sequential(_Block(2 * nf, 4 * nf, 2), _Block(4 * nf, 4 * nf, 1))
        self.layer4 = nn.Sequential(_Block(4 * nf, 8 * nf, 2), _Block(8 * nf, 8 * nf, 1))
        self.linear = nn.Linear(8 * nf, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@final
class ResNet9(nn.Module):
    """ResNet-9 (Page 2018): the smallest residual network that trains on 32x32 images in minutes on a CPU.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first convolution; the embedding has ``8 * width`` features. Page's has 64.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stem = self._stage(in_channels, width)
        self.layer1 = self._stage(width, 2 * width)
        self.residual1 = nn.Sequential(self._stage(2 * width, 2 * width), self._stage(2 * width, 2 * width))
        self.layer2 = self._stage(2 * width, 4 * width)
        self.layer3 = self._stage(4 * width, 8 * width)
        self.residual3 = nn.Sequential(self._stage(8 * width, 8 * width), self._stage(8 * width, 8 * width))
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), 8x8 or more, to logits (B, num_classes)."""
        out = F.max_pool2d(self.layer1(self.stem(x)), 2)
        out = out + self.residual1(out)
        out = F.max_pool2d(self.layer2(out), 2)
        out = F.max_pool2d(self.layer3(out), 2)
        out = out + self.residual3(out)
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


@final
class _Shrink(nn.Module):
    """Max-pooling of what is larger than 8x8: digits of that size have no pixel to spare. A module, for tracing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if min(x.shape[-2:]) > 8 else x


@final
class ConvNet(nn.Module):
    """Three 3x3 convolutions with batch normalisation, for digits: any image of 8x8 or more.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first convolution; the embedding has ``4 * width`` features.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.shrink = _Shrink()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.shrink(out)
        out = F.max_pool2d(F.relu(self.bn2(self.conv2(out)), inplace=True), 2)
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def _slim_resnet18(num_classes: int, in_channels: int, *, nf: int = 20) -> nn.Module:
    return ResNet18(num_classes, in_channels, nf)


def _resnet18_cifar(num_classes: int, in_channels: int, *, nf: int = 64) -> nn.Module:
    return ResNet18(num_classes, in_channels, nf)


def _resnet9(num_classes: int, in_channels: int, *, width: int = 32) -> nn.Module:
    return ResNet9(num_classes, in_channels, width)


def _convnet(num_classes: int, in_channels: int, *, width: int = 32) -> nn.Module:
    return ConvNet(num_classes, in_channels, width)


_OWN: Final[dict[str, Callable[..., nn.Module]]] = {
    "convnet": _convnet,
    "resnet18_cifar": _resnet18_cifar,
    "resnet9": _resnet9,
    "slim_resnet18": _slim_resnet18,
}


def list_backbones(source: str | None = None) -> list[str]:
    """The names that ``build_backbone`` takes.

    Args:
        source: None for the networks of nnheads, ``"torchvision"`` or ``"timm"`` for theirs
            (``torchvision:resnet18``).

    Returns:
        Sorted names.

    Raises:
        UnknownNameError: ``source`` is something else.
        ConfigError: timm is not installed.
    """
    if source is None:
        return sorted(_OWN)
    if source not in _SOURCES:
        raise unknown_name("source of backbones", source, _SOURCES)
    return [f"{source}:{name}" for name in _source_names(source)]


def build_backbone(name: str, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """Builds a network with its dense classifier.

    Weights are drawn from torch's global generator: the same seed gives the same network.

    Args:
        name: one of ``list_backbones()``, ``torchvision:NAME`` (a classification model of torchvision) or
            ``timm:NAME``.
        num_classes: outputs of the classifier.
        in_channels: channels of the images; torchvision's networks take 3.
        **options: for ``slim_resnet18`` and ``resnet18_cifar`` ``nf`` (20 and 64), for ``resnet9`` and ``convnet``
            ``width`` (32), for the others whatever ``torchvision.models.get_model`` or ``timm.create_model`` takes.

    Raises:
        UnknownNameError: no network has that name.
        ConfigError: an option the network cannot take.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    sizes |= {key: options[key] for key in ("nf", "width") if key in options and name in _OWN}
    for what, value in sizes.items():
        if value < 1:
            raise ConfigError(f"backbone {name!r}: {what} must be 1 or more, not {value}")
    source, _, model_name = name.partition(":")
    try:
        if name in _OWN:
            model = _OWN[name](num_classes, in_channels, **options)
        elif source in _SOURCES and model_name:
            model = _from_source(source, model_name, num_classes, in_channels, options)
        else:
            raise unknown_name("backbone", name, [*_OWN, *(f"{source}:NAME" for source in _SOURCES)])
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"backbone {name!r}: {error}") from error
    kept = {key: value for key, value in options.items() if key not in _WEIGHT_OPTIONS}
    setattr(model, _SPEC, {"name": name, "num_classes": num_classes, "in_channels": in_channels, **kept})
    return model


def backbone_spec(model: nn.Module) -> dict[str, Any] | None:
    """The arguments with which ``build_backbone`` makes a network like this one; None if it did not make it.

    The origin of the weights (``weights=``, ``pretrained=``) is not part of it.
    """
    spec = vars(model).get(_SPEC)
    return dict(spec) if spec is not None else None


def _from_source(source: str, name: str, num_classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    known = _source_names(source)
    if name.partition(".")[0] not in known:  # behind a dot, timm names the weights
        near = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {' or '.join(f'{source}:{each}' for each in near)}?"
            if near
            else f"see list_backbones({source!r})"
        )
        raise UnknownNameError(f"unknown {source} backbone {name!r}; {hint}")
    if source == "timm":
        import timm

        made: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
        return made
    if in_channels != 3:
        raise ConfigError(
            f"backbone 'torchvision:{name}' takes images of 3 channels, not {in_channels}: "
            f"convert the images, or take timm:NAME or one of {', '.join(_OWN)}"
        )
    import torchvision

    if name in ("googlenet", "inception_v3"):
        # torchvision warns where this is left open, and announces False as its default.
        options = {"init_weights": False, **options}
    model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **options)
    return model


def _source_names(source: str) -> list[str]:
    if source == "torchvision":
        import torchvision

        return sorted(torchvision.models.list_models(module=torchvision.models))
    if importlib.util.find_spec("timm") is None:
        raise ConfigError("backbones named timm:NAME need timm: pip install timm")
    import timm

    return sorted(timm.list_models())
