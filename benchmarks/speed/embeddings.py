"""Real embeddings to measure searches on: CIFAR images seen by a small backbone that was trained on CIFAR-100.

``nnheads bench embeddings --embeddings FILE --data-dir DATA`` makes them once, in minutes, for all measurements.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from nnheads.attach import attach_head
from nnheads.backbones import ResNet9, build_backbone
from nnheads.benchmarks.datasets import load_dataset
from nnheads.data import get_augmentation
from nnheads.devices import autocast_for, resolve_device
from nnheads.errors import CheckpointError, ConfigError
from nnheads.headed import HeadedModel
from nnheads.storage import replacing_file
from nnheads.training import embed, fit

VIEW_WIDTH = 64
_SIDE = 4  # of the last feature map for images of 32x32


def make_embeddings(
    path: Path, data_dir: Path | None = None, *, width: int = 16, epochs: int = 3, share: float = 1.0
) -> Path:
    """Train a ResNet-9 on CIFAR-100 and keep what it makes of the images.

    Args:
        path: safetensors file to write: ``train`` and ``test`` (N, 8 * width) float32 embeddings of CIFAR-100 with
            ``train_labels`` and ``test_labels``; ``maps`` (M, 16, 64) float16, the last feature maps, projected to 64
            principal directions, of the training images of CIFAR-10 and CIFAR-100, plain, mirrored and cropped;
            ``queries`` (Q, 64) float32, the test images in the same directions.
        data_dir: where CIFAR-10 and CIFAR-100 are.
        width: of the ResNet-9.
        epochs: of its training.
        share: of the images, for a rehearsal.

    Raises:
        CheckpointError: the file cannot be written; before anything is trained where that is known.
    """
    with replacing_file(path) as made:
        tensors, facts = _made(data_dir, width, epochs, share)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made, metadata=facts)
    return path


def _made(data_dir: Path | None, width: int, epochs: int, share: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = load_dataset("cifar100", data_dir)
    train, test = data.train, data.test
    other = load_dataset("cifar10", data_dir).train
    if share < 1:
        train, test, other = (s.subset(torch.randperm(len(s))[: int(share * len(s))]) for s in (train, test, other))
    torch.manual_seed(0)
    model = attach_head(
        build_backbone("resnet9", 100, width=width), "dense", num_classes=100, preprocessing=data.preprocessing
    )
    fit(
        model, train, epochs=epochs, batch_size=128, lr=0.003, optimizer="adamw", weight_decay=0.05, augment="crop-flip"
    )
    z, labels, _ = embed(model, train)
    z_test, test_labels, _ = embed(model, test)
    centered = (z - z.mean(0)).double()
    axes = torch.linalg.eigh(centered.T @ centered).eigenvectors.flip(1)[:, :VIEW_WIDTH].float()
    maps = torch.cat(
        [_maps(model, images, view, axes, z.mean(0)) for view in range(3) for images in (train.images, other.images)]
    )
    tensors = {
        "train": z,
        "train_labels": labels,
        "test": z_test,
        "test_labels": test_labels,
        "maps": maps,
        "queries": (z_test - z.mean(0)) @ axes,
    }
    answers = model.head(z_test.to(model.device)).argmax(1).cpu()
    accuracy = float((answers == test_labels).float().mean())
    facts = {"backbone": f"resnet9, width {width}, {epochs} epochs of CIFAR-100", "accuracy": f"{accuracy:.4f}"}
    return tensors, facts


def read_embeddings(path: Path | None, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file that `make_embeddings` wrote, and what it says of itself.

    Raises:
        ConfigError: no file was named.
        CheckpointError: it is not such a file.
    """
    if path is None:
        raise ConfigError("this needs real embeddings: make them with nnheads bench embeddings --embeddings FILE")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except Exception as error:  # safetensors raises its own, and what the system raises
        raise CheckpointError(f"{path} holds no embeddings ({error}): nnheads bench embeddings makes them") from error


def windows(side: int = _SIDE, smallest: int = 2) -> Tensor:
    """(W, side * side) averaging weights of all rectangles of at least ``smallest`` on a side."""
    spans = [(a, b) for a in range(side) for b in range(a + smallest, side + 1)]
    found = torch.zeros(len(spans) ** 2, side, side)
    for i, (top, bottom) in enumerate(spans):
        for j, (left, right) in enumerate(spans):
            found[i * len(spans) + j, top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
    return found.flatten(1)


def views(maps: Tensor) -> Tensor:
    """The embeddings of all windows of feature maps: (n, 16, 64) to (n * 36, 64) float32, a map's views together."""
    return torch.matmul(windows(), maps.float()).flatten(0, 1)


@torch.no_grad()
def _maps(model: HeadedModel, images: Tensor, view: int, axes: Tensor, mean: Tensor) -> Tensor:
    """(n, 16, 64) float16: the last feature map of each image, plain (0), mirrored (1) or cropped at random (2)."""
    if model.preprocessing is None:
        raise ConfigError("the model has no preprocessing")
    device = resolve_device("auto")
    net = cast(ResNet9, model.backbone).to(device).eval()
    crop, generator = get_augmentation("crop"), torch.Generator().manual_seed(0)
    parts = []
    for part in images.split(512):
        part = part.flip(3) if view == 1 else crop(part, generator) if view == 2 else part
        with autocast_for(device):
            x = model.preprocessing(part.to(device))
            out = F.max_pool2d(net.layer1(net.stem(x)), 2)
            out = out + net.residual1(out)
            out = F.max_pool2d(net.layer3(F.max_pool2d(net.layer2(out), 2)), 2)
            out = out + net.residual3(out)
        parts.append(((out.float().flatten(2).mT.cpu() - mean) @ axes).half())
    return torch.cat(parts)
