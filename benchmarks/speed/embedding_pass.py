"""A pass over a data set beside the bare network: whether decoding, preparing and copying cost anything."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from nnheads.attach import attach_head
from nnheads.backbones import build_backbone
from nnheads.benchmarks.datasets import load_dataset
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn
from nnheads.data import BatchLoader, ImageSet
from nnheads.devices import autocast_for, prefers_channels_last, resolve_device
from nnheads.loaders import preprocessing_of
from nnheads.training import embed

BARE = "backbone alone"
_BATCH = 512
_CASES = (
    ("convnet", {"width": 32}),
    ("resnet9", {"width": 16}),
    ("resnet18_cifar", {"nf": 64}),
)


def rows(settings: Settings, report: Report) -> list[Row]:
    """Milliseconds of `nnheads.embed` over the 50,000 training images, and of the network alone on prepared batches.

    With one thread of a CPU they are processor time: what else runs on the core does not count.
    """
    found = []
    device = resolve_device()
    data = _images(settings)
    preprocessing = preprocessing_of(data)
    last = prefers_channels_last(device)
    batches = [x for x, _, _ in BatchLoader(data, preprocessing, _BATCH, device=device, channels_last=last)]
    for name, options in _CASES[:1] if settings.quick else _CASES:
        case = ", ".join([name, *(f"{option} {value}" for option, value in options.items()), f"{len(data):,} images"])
        if not settings.wants(case):
            continue
        torch.manual_seed(0)
        network = build_backbone(name, 10, **options).eval()
        model = attach_head(copy.deepcopy(network), "dense", preprocessing=preprocessing)
        network.to(device)
        timings = in_turn(
            {
                OURS: partial(embed, model, data, batch_size=_BATCH),
                BARE: partial(_forward, network, batches, device),
            },
            settings.rounds,
        )
        row = timings.row(case)
        row |= {
            "images_per_second": len(data) / timings.median(OURS),
            "met": row["ratio"] <= 1.05,
        }
        found.append(row)
        report(f"{case}: {row['ms'][OURS]:.0f} ms, {BARE} {row['ms'][BARE]:.0f} ms, ratio {row['ratio']:.3f}")
    return found


@torch.inference_mode()
def _forward(network: nn.Module, batches: list[Tensor], device: torch.device) -> list[Tensor]:
    with autocast_for(device):
        return [network(x) for x in batches]


def _images(settings: Settings) -> ImageSet:
    """Training images of CIFAR-10; drawn ones of their size where only the harness is tried."""
    if settings.quick:
        images = torch.randint(0, 256, (256, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
        return ImageSet(images, torch.arange(256) % 10)
    return load_dataset("cifar10", settings.data_dir).train
