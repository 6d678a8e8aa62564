"""DNN or k-NN, second version: kNN, SVM and logistic regression at every layer and along training, and memorization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from nnheads.analysis import KINDS, kl_divergence, layer_embeddings, probe
from nnheads.analysis.probes import Kind
from nnheads.benchmarks.datasets import ImageData
from nnheads.benchmarks.studies.dnn_or_knn import recipe_of
from nnheads.benchmarks.studies.images import study_images
from nnheads.benchmarks.studies.knn_view import DATASETS, EMBEDDING, NETWORKS, accuracy, memorized_at, sample, trained
from nnheads.benchmarks.studies.networks import dnn_or_knn_network
from nnheads.benchmarks.studies.study import Cell, Curves, Entry, Job, Outcome, Scale, Settings, Study, Table
from nnheads.data import ImageSet

TITLES: Final[dict[Kind, str]] = {"knn": "kNN", "svm": "SVM", "lr": "LR"}


def run(job: Job) -> Outcome:
    """Trains a network and fits the three classifiers along the way, and at the end on every layer."""
    data = study_images(job)
    torch.manual_seed(job.seed)
    channels, side = data.train.images.shape[1], data.train.images.shape[2]
    network, layers = dnn_or_knn_network(job.settings["model"], channels, data.train.num_classes, side)
    view = _View(job, data, network)
    done = trained(job, data, network, lambda step: view.along())
    job.report("fitting classifiers on every layer", 0, 0)
    end = done.watched[-1]
    measures: dict[str, float | None] = {
        **{name: value for name, value in end.items() if name != "step"},
        "memorized_at": memorized_at(done),
        "train_seconds": done.seconds,
    }
    series: dict[str, dict[str, list[Any]]] = {
        "training": done.columns(),
        "layers": {"layer": list(layers), **view.by_layer(layers)},
    }
    return Outcome(measures, series)


class _View:
    """A network's answers beside those of the three classifiers fitted on its layers.

    Settings read: ``k``, ``metric``, ``watch_train``, ``watch_test`` (as in "DNN or k-NN") and ``iterations`` of SVM
    and logistic regression.
    """

    def __init__(self, job: Job, data: ImageData, network: nn.Module) -> None:
        self.job, self.data, self.network = job, data, network
        few, some = (job.settings.get(key) for key in ("watch_train", "watch_test"))
        self.known = sample(data.train, few, job.seed)
        self.judged = {"test": sample(data.test, some, job.seed), "train": sample(self.known, some, job.seed)}

    def along(self) -> dict[str, float]:
        """Accuracy, P_SAME and divergence of each classifier on the embeddings, test and training images."""
        fitted = self._embedded(self.known, [EMBEDDING])
        probes = {kind: self._probe(fitted[EMBEDDING], fitted["labels"], kind) for kind in KINDS}
        found: dict[str, float] = {}
        for part, images in self.judged.items():
            asked = self._embedded(images, [EMBEDDING])
            answers, truth = asked["output"].log_softmax(1), asked["labels"]
            found[f"network_{part}"] = accuracy(answers.argmax(1), truth)
            for kind, classifier in probes.items():
                predicted = classifier.predict(asked[EMBEDDING])
                found[f"{kind}_{part}"] = accuracy(predicted, truth)
                found[f"p_same_{kind}_{part}"] = accuracy(predicted, answers.argmax(1))
                found[f"kl_{kind}_{part}"] = kl_divergence(classifier.log_probs(asked[EMBEDDING]), answers)
        return found

    def by_layer(self, layers: list[str]) -> dict[str, list[float]]:
        """Accuracy of each classifier at each layer, test and training images; the network's as a constant."""
        fitted = self._embedded(self.known, layers)
        parts = {part: self._embedded(images, layers) for part, images in self.judged.items()}
        rows: dict[str, list[float]] = {}
        for layer in layers:
            for kind in KINDS:
                classifier = self._probe(fitted[layer], fitted["labels"], kind)
                for part, asked in parts.items():
                    right = accuracy(classifier.predict(asked[layer]), asked["labels"])
                    rows.setdefault(f"{kind}_{part}", []).append(right)
        for part, asked in parts.items():
            rows[f"network_{part}"] = [accuracy(asked["output"].argmax(1), asked["labels"])] * len(layers)
        return rows

    def _probe(self, embeddings: Tensor, labels: Tensor, kind: Kind) -> Any:
        settings = self.job.settings
        return probe(
            embeddings,
            labels,
            kind,
            num_classes=self.data.train.num_classes,
            k=int(settings["k"]),
            metric=settings["metric"],
            iterations=int(settings["iterations"]),
            seed=self.job.seed,
        )

    def _embedded(self, images: ImageSet, layers: list[str]) -> dict[str, Tensor]:
        found = layer_embeddings(
            self.network,
            images,
            layers,
            preprocessing=self.data.preprocessing,
            device=self.job.device,
            batch_size=500,
        )
        return {**found, "labels": found.labels}


# ---- cells and tables ---------------------------------------------------------------------------------------------

REAL: Final = tuple(f"{model}-{dataset}" for model in NETWORKS for dataset in DATASETS)
RANDOM: Final = tuple(f"random-{dataset}" for dataset in DATASETS)
OVERFIT: Final = tuple(f"overfit-{dataset}" for dataset in DATASETS)


def _cells() -> Iterator[Cell]:
    for model in NETWORKS:
        for dataset in DATASETS:
            yield Cell(f"{model}-{dataset}", _settings(model, dataset))
    for dataset in DATASETS:
        yield Cell(
            f"random-{dataset}", {**_settings("wrn-28-10", dataset), **_PLAIN, "labels": "random", "steps": 50_000}
        )
    for dataset in DATASETS:  # the size of the subset is not given: 5,000
        more = {"train_images": 5_000, "steps": 5_000}
        yield Cell(f"overfit-{dataset}", {**_settings("wrn-28-10", dataset), **_PLAIN, **more})


_PLAIN: Final[Settings] = {"augment": "none", "weight_decay": 0.0}


def _settings(model: str, dataset: str) -> dict[str, Any]:
    settings = {key: value for key, value in recipe_of(model, dataset).items() if key != "table_1"}
    return {**settings, "iterations": 300, "watch_train": 10_000, "watch_test": 10_000}


def _lines(pattern: str, *, network: bool) -> tuple[tuple[str, str], ...]:
    own = ((pattern.replace("{}", "network"), "network"),) if network else ()
    return (*own, *((pattern.replace("{}", kind), title) for kind, title in TITLES.items()))


def _divergences() -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"kl_{kind}_{part}", f"{title}, {part}") for kind, title in TITLES.items() for part in ("train", "test")
    )


def _tables() -> Iterator[Table]:
    entries = []
    for model, title in NETWORKS.items():
        for dataset, name in DATASETS.items():
            cell, row = f"{model}-{dataset}", f"{title}, {name}"
            entries += [Entry(row, "network", cell, "network_test")]
            entries += [Entry(row, who, cell, f"{kind}_test") for kind, who in TITLES.items()]
    lines = _lines("{}_test", network=True)
    yield Table(
        "figure-1",
        "Test accuracy along training: network, kNN, SVM, logistic regression",
        tuple(entries),
        Curves(REAL, "training", "step", lines, "training step", "accuracy (%)", log_x=True),
    )
    same = [
        Entry(f"{title}, {name}", who, f"{model}-{dataset}", f"p_same_{kind}_test", None, "share")
        for model, title in NETWORKS.items()
        for dataset, name in DATASETS.items()
        for kind, who in TITLES.items()
    ]
    yield Table(
        "figure-2",
        "P_SAME(M) along training",
        tuple(same),
        Curves(
            REAL, "training", "step", _lines("p_same_{}_test", network=False), "training step", "P_SAME (%)", log_x=True
        ),
    )
    curves = Curves(REAL, "layers", "layer", _lines("{}_test", network=True), "layer", "test accuracy (%)")
    yield Table("figure-4", "Test accuracy by layer, real labels", curves=curves)
    curves = Curves(RANDOM, "layers", "layer", _lines("{}_train", network=True), "layer", "train accuracy (%)")
    yield Table("figure-4-random", "Train accuracy by layer, random labels", curves=curves)
    for number, cells, what in (
        ("figure-5", tuple(name for name in REAL if name.startswith("wrn")), "real labels"),
        ("figure-6", RANDOM, "random labels"),
        ("figure-7", OVERFIT, "forced overfitting"),
    ):
        mark = ("memorized_at", "memorized")
        label = "D_KL(M || network) (nats)"
        lines = _divergences()
        curves = Curves(cells, "training", "step", lines, "training step", label, False, mark, log_x=True, log_y=True)
        rows = [
            Entry(cell, f"{title}, {part}", cell, f"kl_{kind}_{part}", None, "nats")
            for cell in cells
            for kind, title in TITLES.items()
            for part in ("train", "test")
        ]
        rows += [Entry(cell, "memorized at step", cell, "memorized_at", None, "count") for cell in cells]
        rows += [Entry(cell, "network, test", cell, "network_test") for cell in cells]
        yield Table(number, f"D_KL(M || network) along training, {what}", tuple(rows), curves)


_LITTLE: Final[Settings] = {"watch_train": 2_000, "watch_test": 1_000, "looks": 8, "iterations": 100}

STUDY: Final = Study(
    name="dnn-knn-svm-lr",
    title="kNN, SVM and logistic regression on the layers of a network, and memorization",
    source="DNN or k-NN: That is the Generalize vs. Memorize Question (second version)",
    cells=tuple(_cells()),
    tables=tuple(_tables()),
    scales={
        "smoke": Scale(
            "digits in place of all data, 200 training images, 20 steps.",
            {
                "dataset": "digits",
                "form": [1, 28],
                "model": "lenet-640",
                "train_images": 200,
                "test_images": 60,
                "steps": 20,
                "batch_size": 50,
                "looks": 1,
                "iterations": 10,
            },
            cells=("lenet-640-mnist", "random-mnist", "overfit-mnist"),
        ),
        "cpu": Scale(
            "LeNet-640 in place of Wide-ResNet for random labels and forced overfitting, on 1,000 MNIST images; "
            "classifiers fitted on 2,000 images and judged on 1,000.",
            _LITTLE,
            overrides=(
                (
                    "*-mnist",
                    {"model": "lenet-640"},
                ),
                ("mlp-640-mnist", {"model": "mlp-640"}),
                (
                    "random-mnist",
                    {"train_images": 1_000, "batch_size": 100, "steps": 4_000, "looks": 14},
                ),
                (
                    "overfit-mnist",
                    {"train_images": 1_000, "batch_size": 100, "steps": 2_000, "looks": 14},
                ),
            ),
            cells=("lenet-640-mnist", "mlp-640-mnist", "random-mnist", "overfit-mnist"),
        ),
        "paper": Scale(
            "all images and steps as published; classifiers are fitted on 10,000 images and judged on 10,000."
        ),
    },
    run=run,
    note="k = 30, L1. SVM and logistic regression are scikit-learn's, linear, with C = 1 on standardized embeddings, "
    "the SVM's probabilities come from Platt scaling on three folds. Memorized is the first look at which all training "
    "images judged are right.",
)
