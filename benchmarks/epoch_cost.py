"""What a head that decides by stored samples adds to a training epoch; ``python -m nnheads.benchmarks.epoch_cost``.

A dense epoch and one with 50,000 centers, ResNet-18 with a CIFAR stem, batches of 128, refreshes included. Steps are
timed in turn, some of each head a round, on real CIFAR-10 images, and extrapolated to an epoch: a step's time does not
depend on what the images show, nor an exact search's on where the centers are. So the centers are embeddings of some
images with noise, which saves the pass over all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch

from nnheads.attach import attach_head
from nnheads.backbones import build_backbone
from nnheads.benchmarks.datasets import load_dataset
from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.scripts import check_whole, run_script
from nnheads.benchmarks.speed.harness import Clock, own_clock
from nnheads.data import BatchLoader, get_augmentation
from nnheads.devices import autocast_for, prefers_channels_last, resolve_device
from nnheads.headed import HeadedModel
from nnheads.heads import MemoryHead

TRAIN_IMAGES = 50_000


def measure(
    data_dir: Path | None = None,
    *,
    heads: tuple[str, ...] = ("dense", "nngk", "impostor"),
    backbone: str = "resnet18_cifar",
    batch_size: int = 128,
    rounds: int = 5,
    steps: int = 3,
    epochs: int = 10,
    device: str = "auto",
) -> dict[str, Any]:
    """Time training steps and the pass that refreshes the centers.

    Args:
        data_dir: where CIFAR-10 is.
        heads: the first is the one that the others are compared with.
        backbone: see `nnheads.list_backbones`.
        batch_size: images a step.
        rounds: rounds after a warm-up; medians over them are reported.
        steps: steps of each head a round.
        epochs: length of the training over which the one refresh that `nnheads.fit` makes is spread.
        device: see `nnheads.devices.resolve_device`.

    Returns:
        Seconds of a step, of a refresh and of an epoch for each head, and the ratios to the first head's.
    """
    where = resolve_device(device)
    clock = own_clock(where)
    data = load_dataset("cifar10", data_dir)
    models = {name: _model(name, backbone, where) for name in heads}
    optimizers = {
        name: torch.optim.SGD([*m.backbone.parameters(), *m.head.parameters()], lr=1e-3) for name, m in models.items()
    }
    channels_last = prefers_channels_last(where)
    batches_of_one_pass = BatchLoader(
        data.train,
        data.preprocessing,
        batch_size,
        shuffle=True,
        augment=get_augmentation("crop-flip"),
        device=where,
        channels_last=channels_last,
    )
    loader = chain.from_iterable(repeat(batches_of_one_pass))  # as many passes as the rounds need
    for model in models.values():
        _fill(model, next(loader)[0])
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    head_seconds: dict[str, list[float]] = {name: [] for name in heads}
    passes: list[float] = []
    for number in range(rounds + 1):  # the first is the warm-up
        for name, model in models.items():
            whole, of_head = _steps(model, optimizers[name], loader, steps, where, clock)
            if number:
                seconds[name].append(whole)
                head_seconds[name].append(of_head)
        started = clock()
        x = next(loader)[0]
        with torch.no_grad(), autocast_for(where):
            models[heads[0]].eval().features(x)
        _wait(where)
        if number:
            passes.append(clock() - started)
    batches = math.ceil(TRAIN_IMAGES / batch_size)
    refresh = batches * statistics.median(passes)
    result: dict[str, Any] = {}
    for name, model in models.items():
        step = statistics.median(seconds[name])
        own = refresh / epochs if isinstance(model.head, MemoryHead) else 0.0
        result[name] = {
            "step_seconds": step,
            "head_seconds": statistics.median(head_seconds[name]),
            "refresh_seconds_an_epoch": own,
            "epoch_seconds": batches * step + own,
        }
    for name in heads:
        result[name]["epoch_ratio"] = result[name]["epoch_seconds"] / result[heads[0]]["epoch_seconds"]
        result[name]["step_ratio"] = result[name]["step_seconds"] / result[heads[0]]["step_seconds"]
    return {
        "backbone": backbone,
        "batch_size": batch_size,
        "centers": TRAIN_IMAGES,
        "rounds": rounds,
        "steps_a_round": steps,
        "epochs_a_refresh": epochs,
        "refresh_seconds": refresh,
        "heads": result,
        "threads": torch.get_num_threads(),
        "clock": "processor time" if clock is time.process_time else "wall",
        "versions": versions(),
        "device": device_name(where),
    }


def _model(head: str, backbone: str, device: torch.device) -> HeadedModel:
    torch.manual_seed(0)
    model = attach_head(build_backbone(backbone, 10), head).to(device)
    if prefers_channels_last(device):
        model.backbone.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def _fill(model: HeadedModel, x: torch.Tensor) -> None:
    head = model.head
    if not isinstance(head, MemoryHead):
        return
    with autocast_for(x.device):
        z = model.eval().features(x).float()
    z = z[torch.arange(TRAIN_IMAGES, device=z.device) % len(z)]
    z = z + 0.1 * z.std() * torch.randn_like(z)
    head.memorize(z, torch.arange(TRAIN_IMAGES, device=z.device) % 10, ids=torch.arange(TRAIN_IMAGES, device=z.device))


def _steps(
    model: HeadedModel,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    steps: int,
    device: torch.device,
    clock: Clock,
) -> tuple[float, float]:
    """Mean seconds of a step, and of the head's forward pass in it."""
    model.train()
    batches = [next(loader) for _ in range(steps)]
    of_head = 0.0
    _wait(device)
    started = clock()
    for x, y, ids in batches:
        with autocast_for(device):
            z = model.features(x)
            _wait(device)
            begun = clock()
            loss = model.head.loss(z, y, ids=ids)
            _wait(device)
            of_head += clock() - begun
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait(device)
    return (clock() - started) / steps, of_head / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure, print JSON, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; with one, times are the processor's")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.threads is not None:
        check_whole("--threads", given.threads)
        torch.set_num_threads(given.threads)
    check_whole("--rounds", given.rounds)
    found = measure(given.data_dir, device=given.device, rounds=given.rounds)
    print(json.dumps(found, indent=2))
    if given.out is not None:
        write_json(given.out, found)


if __name__ == "__main__":
    run_script(main)
