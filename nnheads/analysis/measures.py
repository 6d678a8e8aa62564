"""What the answers of a classifier are worth: confusion, ROC, calibration, retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnheads.errors import ConfigError, ShapeError
from nnheads.evaluation import calibration_error
from nnheads.index import Metric, build_index


class Roc(NamedTuple):
    """The curve of one class against all others.

    Attributes:
        false_positive_rate, true_positive_rate: (P,) float64 points of the curve, from (0, 0) to (1, 1).
        auc: the area under it.
        threshold: the score from which on samples are taken for the class, at the point of the curve that comes
            closest to (0, 1).
        closest: that point, (false positive rate, true positive rate).
    """

    false_positive_rate: Tensor
    true_positive_rate: Tensor
    auc: float
    threshold: float
    closest: tuple[float, float]


class Calibration(NamedTuple):
    """Confidence against accuracy.

    Attributes:
        ece: expected calibration error, the mean over the samples of the gap of their bin.
        confidence, accuracy: (bins,) float64 means of each bin; NaN where it is empty.
        samples: (bins,) int64, how many in each.
    """

    ece: float
    confidence: Tensor
    accuracy: Tensor
    samples: Tensor


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each class is taken for which.

    Args:
        predictions, labels: (N,) int64.
        num_classes: C.

    Returns:
        (C, C) int64: row the true class, column the predicted one.

    Raises:
        ShapeError: predictions and labels differ in length, or hold a class of C or more.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    if predictions.shape != labels.shape or predictions.ndim != 1:
        raise ShapeError(f"confusion: both must be (N,), got {tuple(predictions.shape)} and {tuple(labels.shape)}")
    for vector in (predictions, labels):
        if len(vector) and (int(vector.min()) < 0 or int(vector.max()) >= num_classes):
            raise ShapeError(
                f"confusion: classes must be 0 to {num_classes - 1}, got {int(vector.min())} to {int(vector.max())}"
            )
    if not len(labels):
        return torch.zeros(num_classes, num_classes, dtype=torch.int64)
    counts: Tensor = multiclass_confusion_matrix(predictions.cpu(), labels.cpu(), num_classes)
    return counts


def roc(scores: Tensor, labels: Tensor) -> dict[int, Roc]:
    """One-vs-rest ROC curves.

    Args:
        scores: (N, C) scores, higher for the likelier class: probabilities or their logarithms.
        labels: (N,) int64.

    Returns:
        The curve of each class that occurs in the labels beside another one.

    Raises:
        ShapeError: scores and labels do not fit together.
    """
    from sklearn.metrics import auc, roc_curve

    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ShapeError(
            f"roc: scores must be (N, C) and labels (N,), got {tuple(scores.shape)}, {tuple(labels.shape)}"
        )
    found = {}
    for label in range(scores.shape[1]):
        own = (labels == label).cpu()
        if not bool(own.any()) or bool(own.all()):
            continue
        fpr, tpr, thresholds = roc_curve(own.numpy(), scores[:, label].detach().double().cpu().numpy())
        best = int((fpr**2 + (1 - tpr) ** 2).argmin())
        found[label] = Roc(
            torch.from_numpy(fpr),
            torch.from_numpy(tpr),
            float(auc(fpr, tpr)),
            float(thresholds[best]),
            (float(fpr[best]), float(tpr[best])),
        )
    return found


def calibration(log_probs: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """The confidence of the likeliest class against how often it is right, in bins of equal width.

    Args:
        log_probs: (N, C) log-probabilities; where rounding puts a probability above 1, it counts as 1.
        labels: (N,) int64; one that is no class of the C is never right.
        bins: how many.

    Raises:
        ShapeError: the two do not fit together, or a label is negative.
        ConfigError: ``bins`` is below 1.
    """
    if log_probs.ndim != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise ShapeError(
            f"calibration: log_probs must be (N, C) and labels (N,), got {tuple(log_probs.shape)}, "
            f"{tuple(labels.shape)}"
        )
    if bins < 1:
        raise ConfigError(f"calibration: bins must be 1 or more, got {bins}")
    labels = labels.cpu()
    if int(labels.min()) < 0:
        raise ShapeError(f"calibration: labels must be 0 or more, got {int(labels.min())}")
    confidence, predicted = log_probs.detach().cpu().double().exp().clamp_max(1).max(1)
    # the bins of torchmetrics: closed above, so that a confidence of 1 is in the last
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    means = [
        torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values) / count
        for values in (confidence, (predicted == labels).double())
    ]
    return Calibration(calibration_error(log_probs.detach().cpu(), labels, bins), means[0], means[1], count)


def embedding_neighbors(embeddings: Tensor, queries: Tensor, k: int, *, metric: Metric = "l1") -> Tensor:
    """The nearest samples of each query, as in a picture of the nearest training images.

    Args:
        embeddings: (N, d) where to look.
        queries: (Q, d).
        k: how many, at most N.
        metric: ``"l1"``, ``"l2"`` or ``"cosine"``.

    Returns:
        (Q, k) int64 rows of ``embeddings``, nearest first.
    """
    if not 1 <= k <= len(embeddings):
        raise ConfigError(f"embedding_neighbors: k must be 1 to {len(embeddings)}, the number of embeddings, got {k}")
    index = build_index(metric=metric)
    index.build(embeddings.detach().float().contiguous())
    return torch.cat([index.search(part, k) for part in queries.detach().float().split(1024)])


def retrieval(
    embeddings: Tensor,
    labels: Tensor,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    metric: Metric = "l2",
) -> dict[int, float]:
    """Recall@K: the share of queries with at least one sample of their class among the K nearest.

    Args:
        embeddings: (N, d) the queries.
        labels: (N,) int64.
        ks: the numbers of neighbours.
        gallery, gallery_labels: (M, d) and (M,) where to look; by default among the queries themselves, each without
            itself, as in Cars-196 and CUB-200 retrieval.
        metric: ``"l2"``, ``"l1"`` or ``"cosine"``.

    Returns:
        K to Recall@K, 0 to 1.

    Raises:
        ShapeError: embeddings and labels do not fit together, or there is nothing to retrieve.
        ConfigError: a K below 1, or a gallery without labels.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"retrieval: ks must be 1 or more, got {tuple(ks)}")
    if (gallery is None) != (gallery_labels is None):
        raise ConfigError("retrieval: give both gallery and gallery_labels, or neither")
    itself = gallery is None
    keys, key_labels = (embeddings, labels) if gallery is None or gallery_labels is None else (gallery, gallery_labels)
    if len(embeddings) != len(labels) or len(keys) != len(key_labels) or len(keys) <= int(itself) or not len(labels):
        raise ShapeError(
            f"retrieval: {len(embeddings)} queries with {len(labels)} labels among {len(keys)} samples with "
            f"{len(key_labels)}: nothing to retrieve, or they do not fit together"
        )
    index = build_index(metric=metric)
    index.build(keys.detach().float())
    rows = torch.cat(
        [index.search(part, max(ks) + int(itself)) for part in embeddings.detach().float().split(1024)]
    ).cpu()
    if itself:
        rows = _without_self(rows)
    hits = (key_labels.cpu()[rows.clamp_min(0)] == labels.cpu().unsqueeze(1)) & (rows >= 0)
    ranks = torch.where(hits.any(1), hits.long().argmax(1), torch.tensor(math.inf))
    return {k: float((ranks < k).double().mean()) for k in ks}


def _without_self(rows: Tensor) -> Tensor:
    """The neighbours of each sample without the sample itself: among copies of it, it need not come first."""
    own = rows == torch.arange(len(rows)).unsqueeze(1)
    last = rows.shape[1] - 1
    place = torch.where(own.any(1), own.long().argmax(1), torch.tensor(last))
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep[torch.arange(len(rows)), place] = False
    return rows[keep].view(len(rows), last)
