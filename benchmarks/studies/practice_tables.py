"""The tables of training practice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from nnheads.benchmarks.studies.study import Curves, Entry, Form, Picture, Table

HEADS: Final = ("dense", "knn")
AUGMENTS: Final = {"none": "none", "geometric": "geometric-flip", "photometric": "photometric", "mixup": "none"}
VIEWS: Final = (1, 4, 8, 16)
RARE: Final = ("plain", "augmented")
TRANSFERS: Final = {
    "scratch": "from scratch",
    "frozen": "frozen",
    "fine-tuned": "fine-tuned",
    "head-first": "head first",
}


def tables() -> Iterator[Table]:
    """All of them."""
    measures: tuple[tuple[str, str, Form], ...] = (
        ("test", "test", "percent"),
        ("calibration error", "ece", "percent"),
        ("log-loss", "log_loss", "nats"),
    )
    yield Table(
        "augmentation",
        "Accuracy by augmentation",
        tuple(
            Entry(name, f"{head}, {column}", f"augment-{name}-{head}", measure, None, form)
            for name in AUGMENTS
            for head in HEADS
            for column, measure, form in measures
        ),
        quantity="accuracy, calibration error",
    )
    views: list[Entry] = []
    for count in VIEWS:
        for head in HEADS:
            views += [
                Entry(f"{count} views", f"{head}, test", f"tta-{head}", f"views_{count}"),
                Entry(f"{count} views", f"{head}, time", f"tta-{head}", f"seconds_{count}", None, "seconds"),
            ]
    note = "The first view is the image itself. Seconds are for all test images."
    yield Table("tta", "Test-time augmentation: mean of the posteriors of several views", tuple(views), note=note)
    yield Table(
        "imbalance",
        "Three classes with a twentieth of their images; augmented: filled up with augmented copies of these alone",
        tuple(
            Entry(name, f"{head}, {column}", f"imbalance-{name}-{head}", measure)
            for name in RARE
            for head in HEADS
            for column, measure in (("all", "test"), ("rare classes", "rare"), ("others", "others"))
        ),
    )
    yield Table(
        "transfer",
        "Fifty images a class of the second half of the classes, after training on the first half",
        tuple(
            Entry(title, f"{head}, test", f"transfer-{name}-{head}", "test")
            for name, title in TRANSFERS.items()
            for head in HEADS
        ),
        note="Frozen: the head alone. Head first: then all, at a tenth of the rate. A kNN head on a frozen network "
        "only memorizes: its dense layer is trained to no effect.",
    )
    shown: tuple[tuple[str, str, Form], ...] = (
        ("accuracy", "test", "percent"),
        ("mean AUC, one class against the rest", "auc", "share"),
        ("lowest AUC", "auc_lowest", "share"),
        ("most frequent confusion", "most_confused", "percent"),
        ("1-NN in the latent space (L1)", "nearest_latent", "percent"),
        ("1-NN of the pixels (L1)", "nearest_pixels", "percent"),
    )
    yield Table(
        "measures",
        "ROC, confusion and the nearest training image",
        tuple(
            Entry(row, head, f"measures-{head}", measure, None, form) for row, measure, form in shown for head in HEADS
        ),
        quantity="accuracy, share of images",
        note="The threshold at which the ROC curve of each class is closest to (0, 1) is in the cells' JSON.",
    )
    cells = tuple(f"measures-{head}" for head in HEADS)
    classes = tuple((f"class {label}", f"class {label}") for label in range(10))
    rate = "false positive rate"
    curves = Curves(cells, "roc_curve", rate, classes, f"{rate} (%)", "true positive rate (%)")
    yield Table("roc", "ROC curves, each class against the rest", curves=curves)
    yield Table("confusion", "Confusion matrix, test images", picture=Picture("confusion", cells))
    title = "Test images (left) and the nearest training images in the latent space (L1)"
    yield Table("nearest", title, picture=Picture("nearest", cells))
