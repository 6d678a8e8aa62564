"""Impostor networks (Lebedev et al. 2018): kinds of centers, neighbours, tie, bytes a center, size of what is saved."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from nnheads.benchmarks.studies.head_training import SMALL_NETWORK, trained_model
from nnheads.benchmarks.studies.images import study_images
from nnheads.benchmarks.studies.study import Cell, Entry, Form, Job, Outcome, Scale, Settings, Study, Table
from nnheads.heads import MemoryHead, build_head
from nnheads.io import save
from nnheads.training import evaluate

KINDS: Final = ("tied", "loose", "fixed")
_NEIGHBOURS: Final = (1, 4, 8, 16, 32, 64, 128)
_TIES: Final = (0.0, 0.0002, 0.002, 0.02, 0.2)
_BYTES: Final = (4, 8, 16, 32, 64, None)
_BIRDS: Final = {"centers": 5_994, "width": 512, "classes": 200}


def run(job: Job) -> Outcome:
    """Trains a backbone with an impostor head, measures accuracy and sizes; or the sizes alone, of random centers."""
    settings = job.settings
    if settings["kind"] == "size":
        return Outcome(_sizes_of_random_centers(job))
    data = study_images(job)
    model, history = trained_model(job, data)
    found = evaluate(model, data.test, device=job.device)
    head = model.head
    assert isinstance(head, MemoryHead)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        saved = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    weights = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
    return Outcome(
        {
            "test": found.accuracy,
            "log_loss": found.log_loss,
            "centers": float(len(head.memory)),
            "center_bytes": float(head.memory.bytes),
            "backbone_bytes": float(weights),
            "saved_bytes": float(sum(saved.values())),
            "train_seconds": history.seconds,
        }
    )


def _sizes_of_random_centers(job: Job) -> dict[str, float | None]:
    count, width, classes = (int(job.settings[key]) for key in ("centers", "width", "classes"))
    generator = torch.Generator().manual_seed(job.seed)
    z = torch.randn(count, width, generator=generator)
    torch.manual_seed(job.seed)
    head = build_head("impostor", width, classes, **dict(job.settings["head_options"]))
    assert isinstance(head, MemoryHead)
    head.begin_refresh()
    head.memorize(z, torch.arange(count) % classes, ids=torch.arange(count))
    head.refreshed()
    codes = getattr(head.memory, "codes", torch.empty(0))
    keys = codes if codes.numel() else head.memory.keys
    return {
        "code_bytes": float(keys[:count].numel() * keys.element_size()),
        "center_bytes": float(head.memory.bytes),
    }


_PAPER: Final[Settings] = {
    "kind": "train",
    "dataset": "images:birds-200",
    "form": [3, 224],
    "backbone": "torchvision:squeezenet1_1",
    "pretrained": True,
    "head": "impostor",
    "epochs": 50,
    "batch_size": 32,
    "lr": 1e-3,
    "optimizer": "sgd",
    "augment": "crop-flip",
}


def _cells() -> Iterator[Cell]:
    for kind in KINDS:
        yield Cell(f"centers-{kind}", {**_PAPER, "head_options": {"centers": kind}})
    for k in _NEIGHBOURS:
        yield Cell(f"neighbours-{k}", {**_PAPER, "head_options": {"k": k}})
    for tie in _TIES:
        yield Cell(f"tie-{tie:g}", {**_PAPER, "head_options": {"tie": tie}})
    for size in _BYTES:
        yield Cell(f"bytes-{_named(size)}", {**_PAPER, "head_options": {"bytes_per_center": size}})
        options = {"bytes_per_center": size, "centers": "tied"}
        yield Cell(f"size-{_named(size)}", {"kind": "size", **_BIRDS, "head_options": options})


def _named(size: int | None) -> str:
    return "none" if size is None else str(size)


def _tables() -> Iterator[Table]:
    columns: tuple[tuple[str, str, Form], ...] = (
        ("test", "test", "percent"),
        ("log-loss", "log_loss", "nats"),
        ("training", "train_seconds", "seconds"),
    )
    for name, title, values in (
        ("centers", "Kinds of centers", KINDS),
        ("neighbours", "Number of neighbours k", tuple(map(str, _NEIGHBOURS))),
        ("tie", "Lambda of the tie of centers and samples (equation 8), loose centers", tuple(f"{t:g}" for t in _TIES)),
    ):
        entries = [
            Entry(value, column, f"{name}-{value}", measure, None, form)
            for value in values
            for column, measure, form in columns
        ]
        yield Table(name, title, tuple(entries), quantity="test accuracy")
    sizes: tuple[tuple[str, str, Form], ...] = (
        ("test", "test", "percent"),
        ("centers", "center_bytes", "bytes"),
        ("backbone", "backbone_bytes", "bytes"),
        ("all that is saved", "saved_bytes", "bytes"),
    )
    entries = [
        Entry(_row(size), column, f"bytes-{_named(size)}", measure, None, form)
        for size in _BYTES
        for column, measure, form in sizes
    ]
    yield Table("bytes", "Bytes a center: accuracy, and the size of centers, backbone and checkpoint", tuple(entries))
    rows: list[Entry] = []
    for size in _BYTES:
        cell, published = f"size-{_named(size)}", 92_000 if size == 16 else None
        rows += [
            Entry(_row(size), "codes", cell, "code_bytes", published, "bytes"),
            Entry(_row(size), "codes, codebooks, labels, ids", cell, "center_bytes", None, "bytes"),
        ]
    note = "The review: 92 KB for 16 bytes each, beside a SqueezeNet of 4.8 MB. The sizes do not depend on the values."
    yield Table("size", "Memory of 5,994 centers of 512 numbers", tuple(rows), note=note)


def _row(size: int | None) -> str:
    return "uncompressed" if size is None else f"{size} bytes"


STUDY: Final = Study(
    name="impostor",
    title="centers that mimic samples, and what they weigh",
    source="Impostor Networks for Fast Fine-Grained Recognition, as reviewed by Chervontsev",
    cells=tuple(_cells()),
    tables=tuple(_tables()),
    scales={
        "smoke": Scale(
            "digits in place of Birds-200, 300 images, 1 epoch of a small convolutional network.",
            {
                **SMALL_NETWORK,
                "dataset": "digits",
                "backbone": "convnet",
                "backbone_options": {"width": 8},
                "train_images": 300,
                "test_images": 100,
                "epochs": 1,
                "augment": "none",
            },
            overrides=(("size-*", {"centers": 600, "width": 64}),),
            cells=("centers-*", "neighbours-8", "tie-0.002", "bytes-4", "bytes-none", "size-16"),
        ),
        "cpu": Scale(
            "CIFAR-10 in place of Birds-200: 5,000 training and 2,000 test images, 10 epochs of a ResNet-9 of width 16 "
            "from scratch.",
            {**SMALL_NETWORK, "train_images": 5_000, "test_images": 2_000, "epochs": 10},
            overrides=(("size-*", {"epochs": None}),),
        ),
        "paper": Scale("the folder birds-200/ of class folders, SqueezeNet 1.1 with published weights, 50 epochs."),
    },
    run=run,
    note="The paper's widths, neighbours, lambda, rates and epochs are not in the review: those here are ours.",
)
