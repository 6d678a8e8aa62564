"""From embeddings to classes: the head knn beside pytorch-metric-learning's FaissKNN and a vote."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nnheads.benchmarks.speed.embeddings import read_embeddings
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn, needs
from nnheads.heads import Head, build_head

PEER = "pytorch-metric-learning FaissKNN"
_K = 32


def rows(settings: Settings, report: Report) -> list[Row]:
    """Milliseconds for batches of 128 and 1,000 against 50,000 centers: drawn ones of 512 numbers, and real ones."""
    needs("pytorch-metric-learning")
    found = []
    for title, keys, labels, queries in _sets(settings):
        head = build_head("knn", keys.shape[1], int(labels.max()) + 1, k=_K)
        head.memorize(keys, labels)
        head.eval()
        theirs = _peer(keys, labels)
        for batch in (128, 1000):
            case = f"{title}, batch {batch:,}"
            if not settings.wants(case):
                continue
            some = queries[:batch].contiguous()

            ours, peer = partial(_classes, head, some), partial(theirs, some)
            for _ in range(3):
                ours()  # the index is built, and its bfloat16 copy once it has been missed
            same = float((ours() == peer()).double().mean())
            row = in_turn({OURS: ours, PEER: peer}, settings.rounds, warm_up=2).row(case)
            row |= {"times_faster": 1 / row["ratio"], "same_classes": same, "met": row["ratio"] <= 0.5}
            found.append(row)
            report(f"{case}: {row['ms'][OURS]:.2f} ms, {PEER} {row['ms'][PEER]:.2f} ms, {1 / row['ratio']:.2f} x")
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


def _peer(keys: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    from pytorch_metric_learning.utils.inference import FaissKNN

    knn = FaissKNN(reset_before=False, reset_after=False)
    knn.train(keys)

    def classes(queries: Tensor) -> Tensor:
        _, rows = knn(queries, _K)
        return labels[rows].mode(1).values

    return classes
