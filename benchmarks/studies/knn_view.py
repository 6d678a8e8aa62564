"""A network of "DNN or k-NN" in training, looked at along the way: its answers beside those of kNN votes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from nnheads.analysis import agreement, knn_predictions, layer_embeddings
from nnheads.benchmarks.datasets import ImageData
from nnheads.benchmarks.studies.fitting import Recipe, Training, cross_entropy, moments, train
from nnheads.benchmarks.studies.study import Job
from nnheads.data import ImageSet
from nnheads.functional import Metric

NETWORKS: Final = {"wrn-28-10": "Wide-ResNet 28-10", "lenet-640": "LeNet-640", "mlp-640": "MLP-640"}
DATASETS: Final = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
EMBEDDING: Final = "embedding"
KS: Final = (1, 5, 30, 150, 1000)  # table 1
LAYER_KS: Final = (1, 5, 30, 100)  # figure 2
PCA: Final = 64


def trained(job: Job, data: ImageData, network: nn.Module, watch: Callable[[int], Mapping[str, float]]) -> Training:
    """Trains a network by the recipe in a cell's settings, watched ``looks`` times."""
    recipe = Recipe.of(job.settings)
    per_epoch = max(1, len(data.train) // (recipe.batch_size or len(data.train)))
    return train(
        network,
        cross_entropy,
        data.train,
        data.preprocessing,
        recipe,
        seed=job.seed,
        device=job.device,
        report=job.report,
        watch=watch,
        watch_at=moments(recipe.length(per_epoch), int(job.settings["looks"])),
    )


def memorized_at(done: Training) -> float | None:
    """The first step watched at which the network had all training images right; None where it never had."""
    return next((entry["step"] for entry in done.watched if entry["network_train"] >= 1), None)


class View:
    """A network's answers beside those of kNN votes.

    Args:
        job: what is run; ``k``, ``metric``, ``watch_train`` and ``watch_test`` of its settings are read: how many
            images the votes along training are over, and how many are judged.
        data: the images.
        network: in training.
    """

    def __init__(self, job: Job, data: ImageData, network: nn.Module) -> None:
        self.job, self.data, self.network = job, data, network
        self.k, self.metric = int(job.settings["k"]), job.settings["metric"]
        few, some = (job.settings.get(key) for key in ("watch_train", "watch_test"))
        self.few_train = sample(data.train, few, job.seed)
        self.few_test = sample(data.test, some, job.seed)
        self.judged_train = sample(self.few_train, some, job.seed)

    def along(self) -> dict[str, float]:
        """Accuracies and agreement on test and training images, with the few images of a look along the way."""
        known, labels, _ = self.embedded(self.few_train)
        found: dict[str, float] = {}
        for part, images in (("test", self.few_test), ("train", self.judged_train)):
            z, truth, answers = self.embedded(images)
            votes = knn_predictions(known, labels, z, (self.k,), metric=self.metric)[self.k]
            same = agreement(answers.argmax(1), votes, truth)
            found |= {f"network_{part}": same.accuracy, f"knn_{part}": same.other_accuracy}
            found |= {f"mc_{part}": same.mc, f"me_{part}": same.me, f"p_same_{part}": same.p_same}
        return found

    def at_the_end(
        self, layers: list[str], table_1: bool
    ) -> tuple[dict[str, float | None], dict[str, dict[str, list[Any]]]]:
        """Measures with all images (the training images judged are a sample), and accuracy by layer."""
        device = self.job.device
        options: dict[str, Any] = {"preprocessing": self.data.preprocessing, "device": device, "batch_size": 500}
        judged = sample(self.data.train, 10_000, self.job.seed)
        with (
            layer_embeddings(self.network, self.data.train, layers, **options) as known,
            layer_embeddings(self.network, self.data.test, layers, **options) as asked,
            layer_embeddings(self.network, judged, [EMBEDDING], **options) as own,
        ):
            rows: dict[str, list[float]] = {f"k={k}": [] for k in LAYER_KS}
            for layer in layers:
                votes = knn_predictions(known[layer], known.labels, asked[layer], LAYER_KS, metric="l2")
                for k, predicted in votes.items():
                    rows[f"k={k}"].append(accuracy(predicted, asked.labels))
            parts = {}
            for part, found in (("test", asked), ("train", own)):
                votes = knn_predictions(known[EMBEDDING], known.labels, found[EMBEDDING], (self.k,), metric=self.metric)
                parts[part] = agreement(found["output"].argmax(1), votes[self.k], found.labels)
            measures: dict[str, float | None] = {}
            for part, same in parts.items():
                measures |= {f"network_{part}": same.accuracy, f"knn_{part}": same.other_accuracy}
                measures |= {f"mc_{part}": same.mc, f"me_{part}": same.me, f"p_same_{part}": same.p_same}
            for who in ("network", "knn"):
                gap = (measures[f"{who}_train"] or 0.0) - (measures[f"{who}_test"] or 0.0)
                measures[f"generalization_{who}"] = gap
            if table_1:
                measures |= _votes_of_table_1(known[EMBEDDING], known.labels, asked[EMBEDDING], asked.labels)
        rows["network"] = [measures["network_test"] or 0.0] * len(layers)
        return measures, {"layers": {"layer": list(layers), **rows}}

    def embedded(self, images: ImageSet) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, labels and log-probabilities."""
        found = layer_embeddings(
            self.network,
            images,
            [EMBEDDING],
            preprocessing=self.data.preprocessing,
            device=self.job.device,
            batch_size=500,
        )
        return found[EMBEDDING], found.labels, found["output"].log_softmax(1)


def _votes_of_table_1(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    metrics: tuple[Metric, Metric] = ("l1", "l2")
    for metric in metrics:
        for pca in (None, PCA) if known.shape[1] > PCA else (None,):
            votes = knn_predictions(known, labels, asked, KS, metric=metric, pca=pca)
            for k, predicted in votes.items():
                found[vote_name(k, metric, pca is not None)] = accuracy(predicted, truth)
    return found


def vote_name(k: int, metric: str, pca: bool) -> str:
    """The measure of table 1 that a vote gives."""
    return f"knn_{k}_{metric}" + ("_pca" if pca else "")


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Share of right answers."""
    return float((predicted == truth).double().mean())


def sample(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """So many images drawn at random, in their order; all where ``count`` is None."""
    if count is None or count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[:count].sort().values)
