"""The gated biased network against the dense network it was made of; ``python -m nnheads.benchmarks.gate``.

A dense network is trained (or loaded with ``--dense``) without some held-out images; a gate is trained on it with
``nnheads.fit_gate`` on the same images, and its threshold chosen on those held out. Then: the share of test images that
skip the second part, what that costs and saves, the sweep of the threshold, and how well a low g tells other data.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnheads.attach import attach_head
from nnheads.backbones import build_backbone
from nnheads.benchmarks.datasets import ImageData, load_dataset
from nnheads.benchmarks.gate_unexpected import gate_values, prepared, unexpected
from nnheads.benchmarks.plots import new_figure, save_figure
from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.scripts import check_whole, run_script
from nnheads.data import ImageSet
from nnheads.errors import ConfigError
from nnheads.gating import count_flops, sweep_threshold
from nnheads.headed import HeadedModel, evaluating
from nnheads.io import load, save
from nnheads.training import embed, evaluate, fit, fit_gate

RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "augment": "crop-flip",
    "batch_size": 128,
}


def parts(data: ImageSet, held_out: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and those that nothing is trained on; the same ones for the same seed."""
    if not 0 < held_out < len(data):
        raise ConfigError(f"--held-out must be above 0 and below the {len(data)} training images, got {held_out}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[held_out:]), data.subset(order[:held_out])


def train_dense(
    data: ImageData, train: ImageSet, *, backbone: str = "resnet9", epochs: int = 3, seed: int = 0
) -> HeadedModel:
    """The plain dense network."""
    torch.manual_seed(seed)
    model = attach_head(build_backbone(backbone, len(data.train.class_names), data.train.images.shape[1]), "dense")
    fit(model, train, epochs=epochs, seed=seed, progress=False, **RECIPE)
    return model


def measure(
    data: ImageData,
    dense: HeadedModel,
    gated: HeadedModel,
    *,
    batch_sizes: Sequence[int] = (128, 512),
    rounds: int = 5,
) -> dict[str, Any]:
    """Accuracy, share skipped, operations and time of both networks.

    Args:
        data: its test images count.
        dense: the plain network.
        gated: what ``fit_gate`` made of it.
        batch_sizes: of whole batches that are timed.
        rounds: the networks take turns; medians are reported.
    """
    x = prepared(gated, data.test.images[:2])
    flops = count_flops(gated, x)
    head = gated.gated_head()
    plain, own = evaluate(dense, data.test), evaluate(gated, data.test)
    skipped = gate_values(gated, data.test.images) >= float(head.gate.threshold)
    sweep = sweep_threshold(gated, data.test, timed_batches=2, rounds=min(2, rounds), precision="float32")
    return {
        "flops": {**asdict(flops), "share_of_f2": flops.second / (flops.first + flops.second)},
        "dense_accuracy": plain.accuracy,
        "accuracy": own.accuracy,
        "points_lost": 100 * (plain.accuracy - own.accuracy),
        "skipped": float(skipped.double().mean()),
        "accuracy_where_skipped": _accuracy(own.predictions, own.labels, skipped),
        "dense_accuracy_where_skipped": _accuracy(plain.predictions, plain.labels, skipped),
        "threshold": _finite(float(head.gate.threshold)),
        "sharpness": float(head.gate.sharpness),
        "gate_sigma": float(head.gate.log_sigma.detach().exp()),
        "centers": len(head.memory),
        "memory_bytes": head.memory.bytes,
        "time": [_time_ratio(dense, gated, data.test.images, size, rounds) for size in batch_sizes],
        "sweep": {
            "network_accuracy": sweep.network_accuracy,
            "network_ms_per_sample": sweep.network_ms_per_sample,
            "points": [{**asdict(p), "threshold": _finite(p.threshold)} for p in sweep.points],
        },
    }


def figure(found: dict[str, Any]) -> Any:
    """Accuracy and time against the share of test images that skip."""
    points = found["sweep"]["points"]
    drawn = new_figure(8, 3.9)
    left, right = drawn.subplots(1, 2)
    skipped = [100 * p["skipped"] for p in points]
    left.plot(skipped, [100 * p["accuracy"] for p in points], marker="o")
    left.axhline(100 * found["dense_accuracy"], color="grey", linestyle="--", label="dense network")
    left.axvline(100 * found["skipped"], color="tab:orange", label="chosen threshold")
    left.set(xlabel="test images that skip f2 (%)", ylabel="accuracy (%)")
    left.legend()
    ratios = [p["ms_per_sample"] / found["sweep"]["network_ms_per_sample"] for p in points]
    right.plot(skipped, ratios, marker="o")
    right.axhline(1, color="grey", linestyle="--", label="whole network")
    right.axvline(100 * found["skipped"], color="tab:orange", label="chosen threshold")
    right.set(xlabel="test images that skip f2 (%)", ylabel="time of a batch, whole network = 1", ylim=(0, None))
    right.legend()
    network = "a saved network" if found["backbone"] is None else f"{found['backbone']}, {found['epochs']} epochs,"
    seed = "" if found["seed"] is None else f", seed {found['seed']}"
    where = f"{network} cut behind {found['at']}{seed}"
    drawn.suptitle(f"biased head on {found['dataset']}: {where}; {found['device']}", fontsize=9)
    return drawn


@torch.no_grad()
def _time_ratio(
    dense: HeadedModel, gated: HeadedModel, images: Tensor, batch_size: int, rounds: int
) -> dict[str, float | int]:
    """Milliseconds of whole batches, float32, the networks in turn; and the ratio in processor time."""
    batches = [prepared(gated, part) for part in images[: max(1024, batch_size)].split(batch_size)]
    seconds: dict[str, list[float]] = {"dense": [], "gated": []}
    busy: dict[str, list[float]] = {"dense": [], "gated": []}
    with evaluating(dense), evaluating(gated):
        for number in range(rounds + 1):
            for name, model in (("dense", dense), ("gated", gated)):
                started, worked = time.perf_counter(), time.process_time()
                for x in batches:
                    model(x)
                if gated.device.type == "cuda":
                    torch.cuda.synchronize(gated.device)
                if number:
                    seconds[name].append(1000 * (time.perf_counter() - started) / len(batches))
                    busy[name].append(1000 * (time.process_time() - worked) / len(batches))
    median = {name: statistics.median(each) for name, each in seconds.items()}
    ratio, cpu_ratio = (
        statistics.median(b / a for a, b in zip(each["dense"], each["gated"], strict=True)) for each in (seconds, busy)
    )
    return {
        "batch_size": batch_size,
        "dense_ms": median["dense"],
        "gated_ms": median["gated"],
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
    }


def _accuracy(predictions: Tensor, labels: Tensor, where: Tensor) -> float | None:
    return float((predictions[where] == labels[where]).double().mean()) if bool(where.any()) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write ``gate.json``, ``gate.png`` and the models where ``--out`` and ``--models`` say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--backbone", default="resnet9")
    parser.add_argument("--at", default="layer1", help="the backbone is cut behind this module")
    parser.add_argument("--epochs", type=int, default=3, help="of the dense network")
    parser.add_argument("--gate-epochs", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=5000, help="training images that only choose the threshold")
    parser.add_argument("--per-class", type=int, default=500, help="centers of each class")
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; medians are reported")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", type=Path, help="a saved dense network, trained without the held-out images")
    parser.add_argument("--gated", type=Path, help="the saved gated network of an earlier run: only measure it")
    parser.add_argument("--models", type=Path, help="save both networks here")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    check_whole("--rounds", given.rounds)

    data = load_dataset(given.dataset, given.data_dir)
    train, held_out = parts(data.train, given.held_out)
    dense = load(given.dense) if given.dense else None
    if dense is None:
        dense = train_dense(data, train, backbone=given.backbone, epochs=given.epochs, seed=given.seed)
    history = None
    if given.gated is None:
        torch.manual_seed(given.seed)
        gated = attach_head(
            copy.deepcopy(dense), "biased", at=given.at, per_class=given.per_class, tolerance=given.tolerance
        )
        history = fit_gate(
            gated,
            train,
            epochs=given.gate_epochs,
            calibration=held_out,
            seed=given.seed,
            progress=False,
            **{name: value for name, value in RECIPE.items() if name != "optimizer"},
        )
    else:
        gated = load(given.gated)
        head = gated.gated_head()
        head.gate.tolerance = given.tolerance
        z, y, _ = embed(gated, held_out)
        head.calibrate(z.to(gated.device), y.to(gated.device))
    if given.models is not None:
        save(dense, given.models / "dense")
        save(gated, given.models / "gated")
    found = {
        "dataset": given.dataset,
        # of what was trained here
        "backbone": None if given.dense else given.backbone,
        "at": gated.at,
        "epochs": None if given.dense else given.epochs,
        "gate_epochs": None if given.gated else given.gate_epochs,
        "gate_seconds": history.seconds if history else None,
        "train_images": len(train),
        "held_out_images": len(held_out),
        "seed": None if given.dense and given.gated else given.seed,
        "recipe": RECIPE,
        "head": gated.head.config(),
        **measure(data, dense, gated, rounds=given.rounds),
        "unexpected": unexpected(dense, gated, data.test, given.data_dir),
        "versions": versions(),
        "device": device_name(gated.device),
    }
    write_json(given.out / "gate.json", found)
    save_figure(figure(found), given.out / "gate.png")
    print(json.dumps({k: v for k, v in found.items() if k not in ("sweep", "head")}, indent=2))


if __name__ == "__main__":
    run_script(main)
