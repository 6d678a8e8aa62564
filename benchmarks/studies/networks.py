"""The papers' networks: those of Conv-KNN's tables I to IV and XIV, and the three of "DNN or k-NN"."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Literal, final

import torch.nn.functional as F
from torch import Tensor, nn

from nnheads.errors import unknown_name

Place = Literal["final", "iterative", "post", "both"]

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}


def grey_convnet(in_channels: int, num_classes: int, side: int) -> nn.Sequential:
    """Conv-KNN's table I, for 28x28 grey images and for SVHN, with a classifier that `attach_head` replaces.

    Convolutions of 32, 32, 64 and 64 kernels without padding (5x5 twice, then 3x3 twice), ReLU after each, batch
    normalization after the second, max-pooling after the second and the fourth: 81,952 parameters (83,552 on RGB).
    """
    after = ((side - 8) // 2 - 4) // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 32, 5),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 5),
            relu2=nn.ReLU(),
            norm=nn.BatchNorm2d(32),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(64, 64, 3),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            classifier=nn.Linear(64 * after * after, num_classes),
        )
    )


def colour_convnet(in_channels: int, num_classes: int, side: int) -> nn.Sequential:
    """Conv-KNN's table II, for CIFAR-10: convolutions of 96, 80, 96 and 64 kernels, padded, and two poolings; 446,832
    parameters."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 96, 5, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(96, 80, 5, padding=2),
            relu2=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(80, 96, 5, padding=2),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(96, 64, 3, padding=1),
            relu4=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            classifier=nn.Linear(64 * (side // 4) ** 2, num_classes),
        )
    )


def activation_convnet(
    in_channels: int, num_classes: int, side: int, activation: str, place: Place, dropout: float = 0.25
) -> nn.Sequential:
    """Conv-KNN's table XIV, "non-bias CNN", with an activation at the places of table XV.

    Args:
        in_channels, num_classes, side: of the images.
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"none"``.
        place: ``"final"`` once, in front of the classifier; ``"iterative"`` after the second convolution of each
            block; ``"post"`` after each batch normalization; ``"both"`` at the last two.
        dropout: share; the paper does not say.
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    kind, after = ACTIVATIONS[activation], ((side - 8) // 2 - 4) // 2

    def at(*places: Place) -> nn.Module:
        return kind() if place in places else nn.Identity()

    def block(number: int, before: int, width: int, kernel: int) -> list[tuple[str, nn.Module]]:
        return [
            (f"conv{number}a", nn.Conv2d(before, width, kernel)),
            (f"conv{number}b", nn.Conv2d(width, width, kernel)),
            (f"iterative{number}", at("iterative", "both")),
            (f"norm{number}", nn.BatchNorm2d(width)),
            (f"post{number}", at("post", "both")),
            (f"pool{number}", nn.MaxPool2d(2)),
            (f"dropout{number}", nn.Dropout(dropout)),
        ]

    tail: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("final", at("final")),
        ("classifier", nn.Linear(64 * after * after, num_classes, bias=False)),
    ]
    return nn.Sequential(OrderedDict([*block(1, in_channels, 32, 5), *block(2, 32, 64, 3), *tail]))


@final
class Normalize(nn.Module):
    """Embeddings of unit length."""

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)


def lenet640(in_channels: int, num_classes: int, side: int) -> nn.Sequential:
    """LeNet-5 with an embedding of 640 numbers of unit length in front of its last layer.

    The paper gives the 640 and the normalization alone: the convolutions (6 and 16 kernels of 5x5, the first padded for
    28x28 images) and the layer of 120 are those of LeCun et al. 1998, with ReLU and max-pooling.
    """
    padding = 2 if side == 28 else 0
    after = ((side + 2 * padding - 4) // 2 - 4) // 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 6, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc3=nn.Linear(16 * after * after, 120),
            relu3=nn.ReLU(),
            fc4=nn.Linear(120, 640),
            relu4=nn.ReLU(),
            embedding=Normalize(),
            classifier=nn.Linear(640, num_classes),
        )
    )


def mlp640(in_channels: int, num_classes: int, side: int) -> nn.Sequential:
    """Two fully connected layers with an embedding of 640 numbers of unit length between them."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(in_channels * side * side, 640),
            relu1=nn.ReLU(),
            embedding=Normalize(),
            classifier=nn.Linear(640, num_classes),
        )
    )


@final
class _Unit(nn.Module):
    """Norm, activation and convolution twice, and a shortcut (Zagoruyko and Komodakis 2016), leaky ReLU of 0.1."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if before != width or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.norm1(x), 0.1)
        kept = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.leaky_relu(self.norm2(self.conv1(out)), 0.1))
        added: Tensor = out + kept
        return added


@final
class WideResNet(nn.Module):
    """Wide-ResNet with an embedding of unit length: 28-10 has 4 units a group and an embedding of 640 numbers.

    Args:
        in_channels: of the images.
        num_classes: outputs.
        units: residual units in each of the three groups.
        widen: channels of the groups are 16, 32 and 64 times this.
    """

    def __init__(self, in_channels: int, num_classes: int, units: int = 4, widen: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        width = 16
        groups = []
        for group in range(3):
            wide = 16 * widen * 2**group
            members = []
            for unit in range(units):
                members.append(_Unit(width, wide, 2 if group and not unit else 1))
                width = wide
            groups.append(nn.Sequential(*members))
        self.unit_1, self.unit_2, self.unit_3 = groups
        self.norm = nn.BatchNorm2d(width)
        self.embedding = Normalize()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        out = self.unit_3(self.unit_2(self.unit_1(self.conv(x))))
        pooled = F.leaky_relu(self.norm(out), 0.1).mean((2, 3))
        logits: Tensor = self.classifier(self.embedding(pooled))
        return logits


def dnn_or_knn_network(name: str, in_channels: int, num_classes: int, side: int) -> tuple[nn.Module, list[str]]:
    """A network of "DNN or k-NN" and the layers at which the paper looks, first to last, the embedding at the end.

    Args:
        name: ``"wrn-28-10"``, ``"lenet-640"`` or ``"mlp-640"``; also ``"wrn-D-W"`` of another depth and width.
        in_channels, num_classes, side: of the images.
    """
    if name == "lenet-640":
        return lenet640(in_channels, num_classes, side), ["pool1", "pool2", "relu3", "embedding"]
    if name == "mlp-640":
        return mlp640(in_channels, num_classes, side), ["embedding"]
    kind, _, size = name.partition("-")
    depth, _, widen = size.partition("-")
    if kind != "wrn" or not depth.isdigit() or not widen.isdigit() or (int(depth) - 4) % 6:
        raise unknown_name("network", name, ["wrn-28-10", "lenet-640", "mlp-640"])
    units = (int(depth) - 4) // 6
    layers = ["conv", *(f"unit_{group}.{unit}" for group in (1, 2, 3) for unit in range(units)), "embedding"]
    return WideResNet(in_channels, num_classes, units, int(widen)), layers
