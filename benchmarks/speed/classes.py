"""From embeddings to classes: the head knn beside pytorch-metric-learning's FaissKNN, its CustomKNN, and a vote."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nnheads.benchmarks.speed.embeddings import read_embeddings
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn, needs
from nnheads.heads import Head, build_head

PEER, CUSTOM = "pytorch-metric-learning FaissKNN", "pytorch-metric-learning CustomKNN"
_K = 32


def rows(settings: Settings, report: Report) -> list[Row]:
    """Milliseconds for batches of 128 and 1,000 against 50,000 centers: drawn ones of 512 numbers, and real ones."""
    needs("pytorch-metric-learning")
    found = []
    for title, keys, labels, queries in _sets(settings):
        head = build_head("knn", keys.shape[1], int(labels.max()) + 1, k=_K)
        head.memorize(keys, labels)
        head.eval()
        theirs = {PEER: _faiss(keys, labels), CUSTOM: _custom(keys, labels)}
        for batch in (128, 1000):
            case = f"{title}, batch {batch:,}"
            if not settings.wants(case):
                continue
            some = queries[:batch].contiguous()

            ours, peers = partial(_classes, head, some), {name: partial(call, some) for name, call in theirs.items()}
            for _ in range(3):
                ours()  # the index is built, and its bfloat16 copy once it has been missed
            mine = ours()
            timings = in_turn({OURS: ours, **peers}, settings.rounds, warm_up=2, patient=True)
            row = timings.row(case)
            row |= {
                "times_faster": {name: timings.ratio(name, OURS) for name in peers},
                "same_classes": {name: float((mine == call()).double().mean()) for name, call in peers.items()},
            }
            row["met"] = row["times_faster"][PEER] >= 2
            found.append(row)
            beside = ", ".join(f"{name} {row['ms'][name]:.2f} ms, {row['times_faster'][name]:.2f} x" for name in peers)
            report(f"{case}: {row['ms'][OURS]:.2f} ms; {beside}")
    return found


def _classes(head: Head, z: Tensor) -> Tensor:
    with torch.inference_mode():
        return head(z).argmax(1)  # type: ignore[no-any-return]


def _sets(settings: Settings) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    count = 5000 if settings.quick else 50_000
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(100, 512, generator=generator)
    labels = torch.randint(0, 100, (count,), generator=generator)
    keys = (centers[labels] + torch.randn(count, 512, generator=generator)).relu()
    other = torch.randint(0, 100, (1000,), generator=generator)
    queries = (centers[other] + torch.randn(1000, 512, generator=generator)).relu()
    sets = [(f"{count:,} x 512 drawn in clusters", keys, labels, queries)]
    if settings.embeddings is not None:
        kept, _ = read_embeddings(settings.embeddings, "train", "train_labels", "test")
        keys = kept["train"][:count].contiguous()
        title = f"{len(keys):,} x {keys.shape[1]} of CIFAR-100"
        sets.append((title, keys, kept["train_labels"][:count], kept["test"]))
    return sets


def _faiss(keys: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    from pytorch_metric_learning.utils.inference import FaissKNN

    knn = FaissKNN(reset_before=False, reset_after=False)
    knn.train(keys)

    def classes(queries: Tensor) -> Tensor:
        _, rows = knn(queries, _K)
        return labels[rows].mode(1).values

    return classes


def _custom(keys: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.inference import CustomKNN

    knn = CustomKNN(LpDistance(normalize_embeddings=False))

    def classes(queries: Tensor) -> Tensor:
        _, rows = knn(queries, _K, keys)
        return labels[rows].mode(1).values

    return classes
