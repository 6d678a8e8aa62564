"""NNGK (Meyer et al. 2017): few samples a class, retrieval, number of neighbours, refresh interval, width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch

from nnheads.analysis import retrieval
from nnheads.benchmarks.datasets import ImageData
from nnheads.benchmarks.studies.head_training import SMALL_NETWORK, trained_model
from nnheads.benchmarks.studies.images import study_images
from nnheads.benchmarks.studies.study import Cell, Entry, Job, Outcome, Scale, Settings, Study, Table
from nnheads.data import ImageSet
from nnheads.training import embed, evaluate

HEADS: Final = ("dense", "nngk")
SAMPLES: Final = (6, 12, 18, 24, 30)
KS: Final = (1, 2, 4, 8)
SETS: Final = {"cars-196": "Cars-196", "birds-200": "Birds-200"}
# published by the review: data set, K: NNGK, the best of the others
_RECALL: Final = {("cars-196", 4): (92.36, 84.23), ("birds-200", 8): (87.17, 83.31)}
_SAMPLES: Final = {("dense", 6): 49.0, ("nngk", 6): 60.0}
_NEIGHBOURS: Final = (1, 4, 8, 16, 32, 64, 128)
_REFRESHES: Final = (1, 2, 5, 10, 0)
_WIDTHS: Final = ("auto", "learned", 1.0, 3.0, 10.0, 30.0)


def run(job: Job) -> Outcome:
    """Trains a backbone with a head; measures its accuracy, or the retrieval among classes it has not seen."""
    data = study_images(job)
    unseen: ImageSet | None = None
    if job.settings["kind"] == "retrieval":
        data, unseen = _unseen_classes(data)
    model, history = trained_model(job, data)
    measures: dict[str, float | None] = {"train_seconds": history.seconds}
    if unseen is None:
        found = evaluate(model, data.test, device=job.device)
        measures |= {"test": found.accuracy, "log_loss": found.log_loss}
        return Outcome(measures)
    z, labels, _ = embed(model, unseen, device=job.device)
    for k, share in retrieval(z, labels, KS, metric="cosine").items():
        measures[f"recall_{k}"] = share
    return Outcome(measures)


def _unseen_classes(data: ImageData) -> tuple[ImageData, ImageSet]:
    """As these data sets are split for retrieval: the first half of the classes to learn from, the images of the other
    half to retrieve among."""
    half = data.train.num_classes // 2
    names = data.train.class_names
    seen, tested = (
        replace(part.subset(part.labels < half), class_names=names[:half]) for part in (data.train, data.test)
    )
    seen = replace(seen, ids=torch.arange(len(seen)))
    others = [part.subset(part.labels >= half) for part in (data.train, data.test)]
    images = torch.cat([part.images for part in others])
    labels = torch.cat([part.labels for part in others])
    return ImageData(seen, tested, data.preprocessing), ImageSet(images, labels, class_names=names)


_PAPER: Final[Settings] = {
    "kind": "accuracy",
    "dataset": "images:birds-200",
    "form": [3, 224],
    "backbone": "torchvision:vgg16",
    "pretrained": True,
    "head": "nngk",
    "head_options": {"k": 32},
    "epochs": 50,
    "batch_size": 32,
    "lr": 1e-3,
    "optimizer": "sgd",
    "augment": "crop-flip",
}


def _cells() -> Iterator[Cell]:
    for head in HEADS:
        options: dict[str, Any] = {"k": 32} if head == "nngk" else {}
        for count in SAMPLES:
            settings = {**_PAPER, "head": head, "head_options": options, "per_class": count}
            yield Cell(f"samples-{count}-{head}", settings)
        for dataset in SETS:
            settings = {**_PAPER, "kind": "retrieval", "dataset": f"images:{dataset}"}
            yield Cell(f"retrieval-{dataset}-{head}", {**settings, "head": head, "head_options": options})
    for k in _NEIGHBOURS:
        yield Cell(f"neighbours-{k}", {**_PAPER, "head_options": {"k": k}})
    for every in _REFRESHES:
        # centers that follow their samples step by step need no refresh: here they do not
        yield Cell(f"refresh-{every}", {**_PAPER, "head_options": {"k": 32, "track": False}, "refresh": every})
    for width in _WIDTHS:
        yield Cell(f"width-{width}", {**_PAPER, "head_options": {"k": 32, "sigma": width}})


def _tables() -> Iterator[Table]:
    entries = [
        Entry(f"{count} a class", head, f"samples-{count}-{head}", "test", _SAMPLES.get((head, count)))
        for count in SAMPLES
        for head in HEADS
    ]
    title = "Test accuracy by training samples a class (the review: Birds-200, VGG-16)"
    yield Table("samples", title, tuple(entries), quantity="test accuracy")
    rows = []
    for dataset, title in SETS.items():
        for k in KS:
            ours, others = _RECALL.get((dataset, k), (None, None))
            for head, value in (("nngk", ours), ("dense", others)):
                rows.append(Entry(f"{title}, Recall@{k}", head, f"retrieval-{dataset}-{head}", f"recall_{k}", value))
    note = "In brackets beside dense: the best of the other methods of the paper. Cosine, classes not seen in training."
    yield Table("recall", "Recall@K of the embeddings", tuple(rows), note=note, quantity="recall")
    for name, title, values in (
        ("neighbours", "Number of neighbours k", _NEIGHBOURS),
        ("refresh", "Epochs between refreshes of the centers (0: before and after training)", _REFRESHES),
        ("width", "Width of the kernel", _WIDTHS),
    ):
        more = []
        for row in map(str, values):
            more.append(Entry(row, "test", f"{name}-{row}", "test"))
            more.append(Entry(row, "training", f"{name}-{row}", "train_seconds", None, "seconds"))
        yield Table(name, title, tuple(more), quantity="test accuracy")


STUDY: Final = Study(
    name="nngk",
    title="nearest neighbour Gaussian kernels against a dense layer",
    source="Nearest Neighbour Radial Basis Function Solvers for Deep Neural Networks, as reviewed by Chervontsev",
    cells=tuple(_cells()),
    tables=tuple(_tables()),
    scales={
        "smoke": Scale(
            "digits in place of all data, 2 epochs of a small convolutional network.",
            {
                **SMALL_NETWORK,
                "dataset": "digits",
                "backbone": "convnet",
                "backbone_options": {"width": 8},
                "train_images": 200,
                "test_images": 100,
                "epochs": 2,
                "augment": "none",
            },
            overrides=(("samples-*", {"train_images": None}),),
            cells=("samples-6-*", "retrieval-cars-196-*", "neighbours-8", "refresh-0", "width-auto"),
        ),
        "cpu": Scale(
            "CIFAR-10 in place of Birds-200 (1,000 test images), a ResNet-9 of width 16 from scratch; retrieval "
            "among 50 classes of CIFAR-100 in place of Cars-196 after training on the other 50; neighbours, refresh "
            "and width on 2,000 images.",
            {**SMALL_NETWORK, "test_images": 1_000, "epochs": 10},
            overrides=(
                ("samples-*", {"epochs": 60, "batch_size": 32}),
                ("retrieval-*", {"dataset": "cifar100", "train_images": 5_000, "test_images": 2_000}),
                ("neighbours-*", {"train_images": 2_000}),
                ("refresh-*", {"train_images": 2_000}),
                ("width-*", {"train_images": 2_000}),
            ),
            cells=("samples-*", "retrieval-cars-196-*", "neighbours-*", "refresh-*", "width-*"),
        ),
        "paper": Scale("folders birds-200/ and cars-196/ of class folders, VGG-16 with published weights, 50 epochs."),
    },
    run=run,
    note="The paper's rates and epochs are not in the review: those here are ours. NNGK trains with a share of a dense "
    "layer's cross-entropy (auxiliary 0.75), as nnheads does by default.",
)
