"""The tables and figures of "DNN or k-NN", first version, with their published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from nnheads.benchmarks.studies.knn_view import DATASETS, LAYER_KS, NETWORKS, vote_name
from nnheads.benchmarks.studies.study import Curves, Entry, Table

# published: k, with PCA or not: CIFAR-10 in L1 and L2, CIFAR-100 in L1 and L2
_TABLE_1: Final = {
    (1, False): (95.24, 95.23, 78.91, 78.91),
    (1, True): (95.25, 95.24, 78.87, 78.85),
    (5, False): (95.26, 95.25, 79.00, 78.99),
    (5, True): (95.23, 95.24, 78.96, 78.97),
    (30, False): (95.25, 95.23, 78.97, 78.98),
    (30, True): (95.20, 95.22, 78.97, 78.95),
    (150, False): (95.25, 95.21, 78.97, 78.98),
    (150, True): (95.20, 95.21, 78.96, 78.94),
    (1000, False): (95.24, 95.22, 76.58, 74.66),
    (1000, True): (95.19, 95.22, 71.38, 70.41),
}
_ACCURACY: Final = {("wrn-28-10", "cifar10"): 95.22, ("wrn-28-10", "cifar100"): 78.99}
# published: network: generalization error of the network and of kNN, for each data set
_TABLE_2: Final = {
    "wrn-28-10": ((0.6, 0.7), (4.8, 4.8), (21.1, 21.1)),
    "lenet-640": ((0.3, 0.2), (6.8, 7.9), (39.1, 39.7)),
    "mlp-640": ((0.8, 0.4), (5.0, 4.9), (2.6, 5.3)),
}
_P_SAME: Final = {
    ("wrn-28-10", "mnist"): 0.9998,
    ("wrn-28-10", "cifar10"): 0.9971,
    ("wrn-28-10", "cifar100"): 0.981,
}
_MC: Final = {("wrn-28-10", "cifar10"): 0.999, ("mlp-640", "mnist"): 0.997}
_ME: Final = {("wrn-28-10", "cifar10"): 0.965}
_RANDOM: Final = {"mnist": 100.0, "cifar10": 100.0, "cifar100": 99.972}


def tables() -> Iterator[Table]:
    """All of them, in the paper's order."""
    all_cells = tuple(f"{model}-{dataset}" for model in NETWORKS for dataset in DATASETS)
    pairs = (("network_test", "network"), ("knn_test", "kNN"))
    yield Table(
        "figure-1",
        "Test accuracy along training, network and kNN",
        curves=Curves(all_cells, "training", "step", pairs, "training step", "accuracy (%)", log_x=True),
    )
    by_layer = (("network", "network"), *((f"k={k}", f"kNN, k = {k}") for k in LAYER_KS))
    shown = tuple(name for name in all_cells if not name.startswith("mlp"))
    yield Table(
        "figure-2",
        "Test accuracy of kNN by layer",
        curves=Curves(shown, "layers", "layer", by_layer, "layer", "accuracy (%)"),
        note="Euclidean distances; maps are averaged over positions.",
    )
    yield Table(
        "figure-3",
        "Mutually correct and mutually erroneous, test images",
        curves=Curves(
            all_cells,
            "training",
            "step",
            (("mc_test", "MC"), ("me_test", "ME")),
            "training step",
            "share (%)",
            log_x=True,
        ),
    )
    entries = []
    for model, title in NETWORKS.items():
        for dataset, name in DATASETS.items():
            cell, key, row = f"{model}-{dataset}", (model, dataset), f"{title}, {name}"
            entries += [
                Entry(row, "network", cell, "network_test", _ACCURACY.get(key)),
                Entry(row, "kNN", cell, "knn_test"),
                Entry(row, "MC", cell, "mc_test", _MC.get(key), "share"),
                Entry(row, "ME", cell, "me_test", _ME.get(key), "share"),
                Entry(row, "P_SAME", cell, "p_same_test", _P_SAME.get(key), "share"),
            ]
    yield Table(
        "figure-4",
        "P_SAME at the end (text) and along training",
        tuple(entries),
        Curves(all_cells, "training", "step", (("p_same_test", "P_SAME"),), "training step", "P_SAME (%)", log_x=True),
        note="k = 30, L1.",
    )
    yield Table("table-1", "Wide-ResNet 28-10: kNN by k, metric and PCA to 64", tuple(_table_1()))
    errors = [
        Entry(title, f"{name} {who}", f"{model}-{dataset}", f"generalization_{measure}", value)
        for model, title in NETWORKS.items()
        for (dataset, name), values in zip(DATASETS.items(), _TABLE_2[model], strict=True)
        for who, measure, value in (("network", "network", values[0]), ("kNN", "knn", values[1]))
    ]
    title = "Generalization error: test error minus training error"
    yield Table("table-2", title, tuple(errors), quantity="generalization error")
    yield _random_table()
    lines = (*pairs, ("p_same_test", "P_SAME"))
    descent = "descent-mlp-640-mnist"
    yield Table(
        "figure-7",
        "Full-batch gradient descent, MLP-640 on MNIST",
        (
            Entry("end", "network", descent, "network_test"),
            Entry("end", "kNN", descent, "knn_test"),
            Entry("end", "P_SAME", descent, "p_same_test", None, "share"),
        ),
        Curves((descent,), "training", "step", lines, "training step", "accuracy, P_SAME (%)"),
    )


def _table_1() -> Iterator[Entry]:
    columns = (("cifar10", "l1"), ("cifar10", "l2"), ("cifar100", "l1"), ("cifar100", "l2"))
    for (k, pca), values in _TABLE_1.items():
        for (dataset, metric), value in zip(columns, values, strict=True):
            column = f"{DATASETS[dataset]} {metric.upper()}"
            measure = vote_name(k, metric, pca)
            yield Entry(f"k = {k}" + (", PCA" if pca else ""), column, f"wrn-28-10-{dataset}", measure, value)
    for dataset, metric in columns:
        column = f"{DATASETS[dataset]} {metric.upper()}"
        value = _ACCURACY["wrn-28-10", dataset]
        yield Entry("network", column, f"wrn-28-10-{dataset}", "network_test", value)


def _random_table() -> Table:
    entries = []
    for dataset, name in DATASETS.items():
        cell, value = f"random-{dataset}", _RANDOM[dataset]
        entries += [
            Entry(name, "network, train", cell, "network_train", value),
            Entry(name, "kNN, train", cell, "knn_train", value),
            Entry(name, "P_SAME, train", cell, "p_same_train", None, "share"),
            Entry(name, "P_SAME, test", cell, "p_same_test", None, "share"),
        ]
    lines = (
        ("network_train", "network, train"),
        ("knn_train", "kNN, train"),
        ("p_same_train", "P_SAME, train"),
        ("p_same_test", "P_SAME, test"),
    )
    shown = tuple(f"random-{dataset}" for dataset in DATASETS)
    mark = ("memorized_at", "memorized")
    curves = Curves(shown, "training", "step", lines, "training step", "accuracy, P_SAME (%)", mark=mark)
    return Table("figure-5", "Random labels", tuple(entries), curves)
