"""The biased (gated) network: how many samples skip f2, at what accuracy and time; strange images; attacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.benchmarks.datasets import ImageData
from nnheads.benchmarks.studies.head_training import fitted, headed_model
from nnheads.benchmarks.studies.images import study_images
from nnheads.benchmarks.studies.study import Cell, Curves, Entry, Form, Job, Outcome, Scale, Settings, Study, Table
from nnheads.data import ImageSet
from nnheads.gating import sweep_threshold
from nnheads.headed import HeadedModel
from nnheads.training import resolve_device

SETS: Final = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "images:tiny-imagenet": "TinyImageNet"}
NOISES: Final = ("uniform noise", "inverted", "checkerboard")
STRENGTHS: Final = (2, 4, 8)  # of 255
_BATCH: Final = 128


def run(job: Job) -> Outcome:
    """Trains a biased network, sweeps its threshold, and asks it what it was not trained on."""
    data = study_images(job)
    model = headed_model(job, data, at=job.settings["at"])
    history = fitted(job, data, model)
    job.report("sweeping the threshold", 0, 0)
    sweep = sweep_threshold(model, data.test, timed_batches=int(job.settings["timed_batches"]), device=job.device)
    right, gate, skipped, _ = _answers(model, data.test, job)
    measures: dict[str, float | None] = {
        "network": sweep.network_accuracy,
        "test": _mean(right),
        "skipped": _mean(skipped),
        "network_ms": sweep.network_ms_per_sample,
        "train_seconds": history.seconds,
        "gate": _mean(gate),
    }
    own = float(model.gated_head().gate.threshold)
    point = next((each for each in sweep.points if each.threshold == own), sweep.points[0])
    measures["ms"] = point.ms_per_sample
    for name, images in strange_images(data.test, job.seed).items():
        _, strange, skips, _ = _answers(model, images, job)
        measures[f"auroc_{name}"] = _auroc(gate, strange)
        measures[f"skipped_{name}"] = _mean(skips)
    measures |= _attacks(job, data, model)
    points = sorted(sweep.points, key=lambda each: each.skipped)
    curve: dict[str, list[Any]] = {
        "skipped": [100 * each.skipped for each in points],
        "accuracy": [each.accuracy for each in points],
        "network": [sweep.network_accuracy] * len(points),
        "ms": [each.ms_per_sample for each in points],
    }
    return Outcome(measures, {"sweep": curve})


def strange_images(images: ImageSet, seed: int) -> dict[str, ImageSet]:
    """Images that belong to no class: noise, the same images inverted, a checkerboard over them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = images.images
    noise = torch.randint(0, 256, pixels.shape, generator=generator, dtype=torch.uint8)
    rows, columns = torch.arange(pixels.shape[2]), torch.arange(pixels.shape[3])
    board = ((rows[:, None] // 2 + columns[None] // 2) % 2).bool()
    checked = torch.where(board, pixels, 255 - pixels)
    made = zip(NOISES, (noise, 255 - pixels, checked), strict=True)
    return {name: replace(images, images=other) for name, other in made}


def _attacks(job: Job, data: ImageData, model: HeadedModel) -> dict[str, float | None]:
    """Accuracy under a black-box attack: signs of the gradient (FGSM) of another network trained on the same images."""
    few = data.test.subset(torch.arange(min(len(data.test), int(job.settings["attacked"]))))
    other = Job({**job.settings, "head": "dense", "head_options": {}}, job.seed + 1, None, job.device, job.report)
    surrogate = headed_model(other, data)
    fitted(other, data, surrogate)
    dense = Job(other.settings, job.seed, None, job.device, job.report)
    plain = headed_model(dense, data)  # the same first weights as the biased network's
    fitted(dense, data, plain)
    found: dict[str, float | None] = {}
    for strength in (0, *STRENGTHS):
        attacked = fast_gradient_sign(surrogate, few, strength, job)
        right, _, skipped, _ = _answers(model, attacked, job)
        found[f"biased_{strength}"] = _mean(right)
        found[f"attack_skipped_{strength}"] = _mean(skipped)
        with torch.no_grad():
            answers = [plain(x).argmax(1).cpu() for x, _ in _batches(plain, attacked, job)]
        found[f"dense_{strength}"] = float((torch.cat(answers) == attacked.labels).double().mean())
    return found


def fast_gradient_sign(model: HeadedModel, images: ImageSet, strength: int, job: Job) -> ImageSet:
    """Images moved by ``strength`` of 255 along the sign of the gradient of a model's loss (Goodfellow et al. 2015)."""
    if not strength:
        return images
    assert model.preprocessing is not None
    moved = []
    for x, y in _batches(model, images, job):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.nll_loss(model(x), y), x)
        moved.append(gradient.sign().cpu() * strength)  # normalizing keeps the sign
    pixels = (images.images.float() + torch.cat(moved)).round().clamp(0, 255).byte()
    return replace(images, images=pixels)


def _answers(model: HeadedModel, images: ImageSet, job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each image: whether the answer is right, the gate's value, whether it skipped f2, and the answer."""
    model.eval()
    parts = []
    with torch.no_grad():
        for x, y in _batches(model, images, job):
            found = model.gated(x)
            answer = found.log_probs.argmax(1)
            parts.append([t.cpu() for t in (answer == y, found.gate, found.skipped, answer)])
    right, gate, skipped, answer = (torch.cat(column) for column in zip(*parts, strict=True))
    return right, gate, skipped, answer


def _batches(model: HeadedModel, images: ImageSet, job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    from nnheads.data import BatchLoader

    assert model.preprocessing is not None
    for x, y, _ in BatchLoader(images, model.preprocessing, _BATCH, device=resolve_device(job.device)):
        yield x, y


def _auroc(inside: Tensor, outside: Tensor) -> float:
    """How well the gate tells known images from strange ones: the chance that a known one has the higher value."""
    from sklearn.metrics import roc_auc_score

    labels = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return float(roc_auc_score(labels.numpy(), torch.cat([inside, outside]).double().numpy()))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


# ---- cells and tables ---------------------------------------------------------------------------------------------

_PAPER: Final[Settings] = {
    "backbone": "resnet18_cifar",
    "backbone_options": {},
    "at": "layer2",
    "head": "biased",
    "head_options": {},
    "epochs": 30,
    "batch_size": 128,
    "lr": 0.1,
    "augment": "crop-flip",
    "timed_batches": 4,
    "attacked": 2_000,
}


def _cell(dataset: str) -> str:
    return dataset.removeprefix("images:")


def _tables() -> Iterator[Table]:
    cells = tuple(_cell(dataset) for dataset in SETS)
    columns: tuple[tuple[str, str, Form], ...] = (
        ("whole network", "network", "percent"),
        ("biased", "test", "percent"),
        ("skipped", "skipped", "percent"),
        ("network, a sample", "network_ms", "ms"),
        ("biased, a sample", "ms", "ms"),
    )
    entries = [
        Entry(title, column, _cell(dataset), measure, None, form)
        for dataset, title in SETS.items()
        for column, measure, form in columns
    ]
    lines = (("accuracy", "biased"), ("network", "whole network"))
    curves = Curves(cells, "sweep", "skipped", lines, "test images that skip f2 (%)", "accuracy (%)")
    note = "The threshold was chosen on held-out training images, for half a per cent of accuracy."
    yield Table("skipped", "Samples that skip f2, accuracy and time", tuple(entries), curves, note)
    rows: list[Entry] = []
    for dataset, title in SETS.items():
        for name in NOISES:
            rows += [
                Entry(f"{title}, {name}", "AUROC of the gate", _cell(dataset), f"auroc_{name}"),
                Entry(f"{title}, {name}", "skipped", _cell(dataset), f"skipped_{name}"),
            ]
    title = "Does the gate stay shut on images of no class"
    yield Table("strange", title, tuple(rows), quantity="AUROC, share of images")
    attacks: list[Entry] = []
    for dataset, title in SETS.items():
        for strength in (0, *STRENGTHS):
            row, cell = f"{title}, {strength}/255", _cell(dataset)
            attacks += [
                Entry(row, "dense", cell, f"dense_{strength}"),
                Entry(row, "biased", cell, f"biased_{strength}"),
                Entry(row, "skipped", cell, f"attack_skipped_{strength}"),
            ]
    title = "Accuracy under a black-box attack: FGSM on another network"
    note = "On the first test images, which come class by class where they come from class folders."
    yield Table("attack", title, tuple(attacks), note=note, quantity="accuracy, share of images")


def _small(epochs: int) -> dict[str, Any]:
    return {"backbone": "resnet9", "backbone_options": {"width": 16}, "at": "layer1", "epochs": epochs, "lr": 0.05}


STUDY: Final = Study(
    name="biased",
    title="a gate in front of most of the network",
    source="Deep Metric Learning and Image Classification with Nearest Neighbour Gaussian Kernels (review), section 5",
    cells=tuple(Cell(_cell(dataset), {**_PAPER, "dataset": dataset}) for dataset in SETS),
    tables=tuple(_tables()),
    scales={
        "smoke": Scale(
            "digits in place of CIFAR-10, 300 images, 2 epochs of a small convolutional network.",
            {
                **_small(2),
                "backbone": "convnet",
                "backbone_options": {"width": 8},
                "at": "bn1",
                "dataset": "digits",
                "train_images": 300,
                "test_images": 100,
                "augment": "none",
                "attacked": 50,
                "timed_batches": 1,
            },
            cells=("cifar10",),
        ),
        "cpu": Scale(
            "CIFAR-10, 10,000 training and 2,000 test images, 8 epochs of a ResNet-9 of width 16 cut behind layer1.",
            {**_small(8), "train_images": 10_000, "test_images": 2_000, "attacked": 1_000},
            cells=("cifar10",),
        ),
        "paper": Scale("CIFAR-10, CIFAR-100, and a folder tiny-imagenet/ of class folders; a ResNet-18, 30 epochs."),
    },
    run=run,
    note="The review proposes these experiments and has no numbers of its own. Network, epochs and place of the cut "
    "are ours.",
)
