"""DNN or k-NN, first version: whether a network answers as a kNN vote on its embeddings does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from nnheads.benchmarks.studies.dnn_or_knn_tables import tables
from nnheads.benchmarks.studies.images import study_images
from nnheads.benchmarks.studies.knn_view import DATASETS, NETWORKS, View, memorized_at, trained
from nnheads.benchmarks.studies.networks import dnn_or_knn_network
from nnheads.benchmarks.studies.study import Cell, Job, Outcome, Scale, Settings, Study

_DECAY: Final = {
    "wrn-28-10": {"mnist": 8e-4, "cifar10": 8e-4, "cifar100": 8e-4},
    "lenet-640": {"mnist": 0.0, "cifar10": 8e-3, "cifar100": 1e-2},
    "mlp-640": {"mnist": 0.0, "cifar10": 0.0, "cifar100": 0.0},
}


def run(job: Job) -> Outcome:
    """Trains a network and looks at it along the way, layer by layer and at the end."""
    settings = job.settings
    data = study_images(job)
    torch.manual_seed(job.seed)
    channels, side = data.train.images.shape[1], data.train.images.shape[2]
    network, layers = dnn_or_knn_network(settings["model"], channels, data.train.num_classes, side)
    view = View(job, data, network)
    done = trained(job, data, network, lambda step: view.along())
    job.report("looking at the embeddings", 0, 0)
    measures, series = view.at_the_end(layers, settings["table_1"])
    series["training"] = done.columns()
    reached = memorized_at(done)
    return Outcome(
        {
            **measures,
            "memorized_at": reached,
            "steps": float(done.steps),
            "train_seconds": done.seconds,
        },
        series,
    )


# ---- cells and tables ---------------------------------------------------------------------------------------------


def recipe_of(model: str, dataset: str) -> dict[str, Any]:
    """The published optimizer: SGD with Nesterov momentum of 0.9 at a rate of 0.1, divided by five at 0.3, 0.6 and 0.8
    of 200 epochs; 1,000 steps for MNIST."""
    common: dict[str, Any] = {
        "model": model,
        "dataset": dataset,
        "batch_size": 200,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": _DECAY[model][dataset],
        "augment": "crop" if dataset == "mnist" else "crop-flip",
        "k": 30,
        "metric": "l1",
        "looks": 10,
        "watch_train": None,
        "watch_test": None,
        "table_1": False,
    }
    if dataset == "mnist":
        return {**common, "steps": 1000, "schedule": "constant"}
    return {**common, "steps": 50_000, "schedule": "milestones", "milestones": [0.3, 0.6, 0.8], "factor": 5.0}


def _cells() -> Iterator[Cell]:
    for model in NETWORKS:
        for dataset in DATASETS:
            table_1 = model == "wrn-28-10" and dataset != "mnist"
            yield Cell(f"{model}-{dataset}", {**recipe_of(model, dataset), "table_1": table_1})
    for dataset in DATASETS:
        plain = {"labels": "random", "augment": "none", "weight_decay": 0.0}
        yield Cell(f"random-{dataset}", {**recipe_of("wrn-28-10", dataset), **plain, "steps": 50_000})
    descent = {"batch_size": 0, "steps": 400, "lr": 10.0, "schedule": "milestones", "milestones": [0.5, 0.75]}
    whole = {**recipe_of("mlp-640", "mnist"), **descent, "factor": 5.0, "augment": "none", "momentum": 0.0}
    yield Cell("descent-mlp-640-mnist", whole)


_MEMORIZED: Final[Settings] = {
    "model": "lenet-640",
    "train_images": 1_000,
    "batch_size": 100,
    "steps": 4_000,
    "schedule": "milestones",
    "milestones": [0.6, 0.85],
    "factor": 10.0,
    "looks": 20,
}
"""Random labels on a CPU: few images, seen four hundred times."""

STUDY: Final = Study(
    name="dnn-or-knn",
    title="whether a network answers as a kNN vote on its embeddings",
    source="DNN or k-NN: That is the Generalize vs. Memorize Question (first version)",
    cells=tuple(_cells()),
    tables=tuple(tables()),
    scales={
        "smoke": Scale(
            "digits in place of all data, 300 training images, 30 steps.",
            {
                "dataset": "digits",
                "form": [1, 28],
                "train_images": 300,
                "test_images": 100,
                "steps": 30,
                "looks": 3,
                "batch_size": 50,
            },
            overrides=(("random-*", {"model": "mlp-640", "train_images": 60, "batch_size": 60, "steps": 40}),),
            cells=("lenet-640-mnist", "random-mnist"),
        ),
        "cpu": Scale(
            "MNIST with all images; CIFAR-10 with LeNet, all images, 5,000 steps; random labels on 1,000 MNIST images "
            "with LeNet, its rate divided by ten at 60 and 85 % of 4,000 steps. Along training, votes are over 10,000 "
            "training images, on 2,000 test images.",
            {"watch_train": 10_000, "watch_test": 2_000},
            overrides=(
                ("*-cifar10", {"steps": 5_000}),
                ("random-*", _MEMORIZED),
            ),
            cells=("lenet-640-mnist", "mlp-640-mnist", "random-mnist", "descent-*", "lenet-640-cifar10"),
        ),
        "paper": Scale("all images and steps as published."),
    },
    run=run,
    note="The training images judged are 10,000 drawn at random; a vote on a training image includes the image itself, "
    "as in the paper's random labels. LeNet's convolutions are not given by the paper: those of 1998 are taken.",
)
