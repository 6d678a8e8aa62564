"""Classical classifiers fitted on embeddings: a kNN vote on the project's index, linear SVM, logistic regression."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from nnheads.errors import ConfigError, ShapeError, unknown_name
from nnheads.functional import Metric
from nnheads.index import build_index

Kind = Literal["knn", "svm", "lr"]
KINDS: Final[tuple[Kind, ...]] = ("knn", "svm", "lr")

_CHUNK = 1024


class Probe(ABC):
    """A classifier on embeddings, made by `probe`.

    Attributes:
        kind: ``"knn"``, ``"svm"`` or ``"lr"``.
        num_classes: columns of `log_probs`.
    """

    kind: Kind
    num_classes: int

    @abstractmethod
    def log_probs(self, embeddings: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """(N, C) float64 log-probabilities; -inf for a class without any.

        Args:
            embeddings: (N, d).
            rows: (N,) int64, for the kNN vote on samples it was fitted on: which one each is, or -1; a sample then
                does not vote for itself. The others do not look at it.
        """

    def predict(self, embeddings: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """(N,) int64, the likeliest class of each; of classes with equal votes the one with the nearest neighbour."""
        return self.log_probs(embeddings, rows=rows).argmax(1)


def probe(
    embeddings: Tensor,
    labels: Tensor,
    kind: Kind = "knn",
    *,
    num_classes: int | None = None,
    k: int = 30,
    metric: Metric = "l1",
    pca: int | None = None,
    regularization: float = 1.0,
    iterations: int = 300,
    seed: int = 0,
) -> Probe:
    """Fits a classifier on embeddings, for instance of one layer of a network.

    Args:
        embeddings: (N, d) floating.
        labels: (N,) int64.
        kind: ``"knn"``, the majority vote; ``"svm"``, scikit-learn's linear SVM, its probabilities by Platt scaling on
            three folds; ``"lr"``, scikit-learn's logistic regression. The last two see features scaled to unit
            variance.
        num_classes: C; by default up to the largest label.
        k: neighbours of the vote ("DNN or k-NN" takes 30), at most N.
        metric: of the vote: ``"l1"`` (that paper's), ``"l2"`` or ``"cosine"``.
        pca: project to so many principal components before the vote; None for no projection.
        regularization: C of scikit-learn, for ``"svm"`` and ``"lr"``.
        iterations: at most so many, for ``"svm"`` and ``"lr"``.
        seed: of ``"svm"`` and of the folds.

    Raises:
        UnknownNameError: another kind.
        ShapeError: embeddings and labels do not fit together.
        ConfigError: a number that cannot work.
    """
    if kind not in KINDS:
        raise unknown_name("probe", kind, KINDS)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or not len(labels):
        raise ShapeError(
            f"probe: embeddings must be (N, d) and labels (N,), got {tuple(embeddings.shape)}, {tuple(labels.shape)}"
        )
    if k < 1 or iterations < 1 or regularization <= 0:
        raise ConfigError(
            f"probe: k, iterations and regularization must be above 0, got {k}, {iterations}, {regularization:g}"
        )
    if pca is not None and not 1 <= pca <= embeddings.shape[1]:
        raise ConfigError(f"probe: pca must be 1 to the embeddings' width {embeddings.shape[1]}, got {pca}")
    classes = max(int(labels.max()) + 1, num_classes or 0)
    embeddings, labels = embeddings.detach().float().cpu(), labels.cpu()
    if kind == "knn":
        return _Vote(embeddings, labels, classes, k, metric, pca)
    return _Linear(kind, embeddings, labels, classes, regularization, iterations, seed)


@final
class _Vote(Probe):
    kind = "knn"

    def __init__(
        self, embeddings: Tensor, labels: Tensor, num_classes: int, k: int, metric: Metric, pca: int | None
    ) -> None:
        self.labels, self.num_classes, self.k = labels, num_classes, min(k, len(labels))
        self.center: Tensor | None = None
        self.axes: Tensor | None = None
        if pca is not None:
            self.center, self.axes = _principal_axes(embeddings, pca)
        self.index = build_index(metric=metric)
        self.index.build(self._projected(embeddings).contiguous())

    def log_probs(self, embeddings: Tensor, *, rows: Tensor | None = None) -> Tensor:
        return self._shares(self.neighbors(embeddings, rows)).log()

    def predict(self, embeddings: Tensor, *, rows: Tensor | None = None) -> Tensor:
        return self.decide(self.neighbors(embeddings, rows))

    def decide(self, near: Tensor) -> Tensor:
        """(N,) answers to (N, k) labels of neighbours."""
        share = self._shares(near)
        best = share.max(1, keepdim=True).values
        # neighbours come nearest first: the first one of a class with the most votes decides
        tied = share.gather(1, near.clamp_min(0)) >= best - 1e-12
        return near.gather(1, (tied & (near >= 0)).long().argmax(1, keepdim=True)).squeeze(1)

    def neighbors(self, embeddings: Tensor, rows: Tensor | None) -> Tensor:
        """(N, k) labels of the neighbours, nearest first, -1 for none."""
        parts = []
        more = 0 if rows is None else 1
        for start in range(0, len(embeddings), _CHUNK):
            queries = self._projected(embeddings[start : start + _CHUNK].detach().float().cpu())
            near = self.index.search(queries, self.k + more)
            if rows is not None:
                near = _left_out(near, rows[start : start + _CHUNK].cpu())
            parts.append(torch.where(near >= 0, self.labels[near.clamp_min(0)], torch.tensor(-1)))
        return torch.cat(parts)

    def _shares(self, found: Tensor) -> Tensor:
        """(N, C) share of the votes of each class."""
        counts = torch.zeros(len(found), self.num_classes, dtype=torch.float64)
        counts.scatter_add_(1, found.clamp_min(0), (found >= 0).double())
        return counts / counts.sum(1, keepdim=True).clamp_min(1)

    def _projected(self, embeddings: Tensor) -> Tensor:
        return embeddings if self.center is None or self.axes is None else (embeddings - self.center) @ self.axes


def knn_predictions(
    embeddings: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    *,
    metric: Metric = "l1",
    pca: int | None = None,
) -> dict[int, Tensor]:
    """What kNN votes with several k answer, from one search: as ``probe(..., k=k).predict(queries)`` for each.

    Args:
        embeddings, labels: (N, d) and (N,), what votes.
        queries: (Q, d).
        ks: numbers of neighbours; one above N counts as N.
        metric, pca: as in `probe`.

    Returns:
        k to (Q,) int64.
    """
    vote = probe(embeddings, labels, "knn", k=max(ks), metric=metric, pca=pca)
    assert isinstance(vote, _Vote)
    near = vote.neighbors(queries, None)
    return {k: vote.decide(near[:, :k]) for k in ks}


@final
class _Linear(Probe):
    def __init__(
        self,
        kind: Literal["svm", "lr"],
        embeddings: Tensor,
        labels: Tensor,
        num_classes: int,
        regularization: float,
        iterations: int,
        seed: int,
    ) -> None:
        self.kind, self.num_classes = kind, num_classes
        self.center, scale = embeddings.mean(0), embeddings.std(0, correction=0)
        self.scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
        self.classes = labels.unique()
        self.svm: Any = None
        self.model: Any = None
        if len(self.classes) > 1:
            self._fit(self._scaled(embeddings), labels.numpy(), regularization, iterations, seed)

    def _fit(self, x: Any, y: Any, regularization: float, iterations: int, seed: int) -> None:
        import warnings

        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        with warnings.catch_warnings():
            # a probe that stops early is a probe all the same; the number of iterations is the caller's
            warnings.simplefilter("ignore", ConvergenceWarning)
            if self.kind == "lr":
                self.model = LogisticRegression(C=regularization, max_iter=iterations).fit(x, y)
                return
            svm = LinearSVC(C=regularization, dual="auto", max_iter=iterations, random_state=seed)
            self.svm = svm.fit(x, y)
            folds = min(3, int(torch.from_numpy(y).bincount()[self.classes].min()))
            if folds > 1:
                self.model = CalibratedClassifierCV(svm, method="sigmoid", cv=folds, ensemble=False).fit(x, y)

    def log_probs(self, embeddings: Tensor, *, rows: Tensor | None = None) -> Tensor:
        found = torch.full((len(embeddings), self.num_classes), -torch.inf, dtype=torch.float64)
        if len(self.classes) == 1:
            found[:, self.classes] = 0.0
        elif self.model is None:  # a class with a single sample cannot be calibrated
            raise ConfigError("probe: probabilities of an SVM need two samples or more of each class")
        else:
            shares = torch.from_numpy(self.model.predict_proba(self._scaled(embeddings))).double()
            found[:, self.classes] = shares.log()
        return found

    def predict(self, embeddings: Tensor, *, rows: Tensor | None = None) -> Tensor:
        if self.svm is None:
            return super().predict(embeddings)
        predicted: Tensor = torch.from_numpy(self.svm.predict(self._scaled(embeddings)))
        return predicted

    def _scaled(self, embeddings: Tensor) -> Any:
        return ((embeddings.detach().float().cpu() - self.center) / self.scale).numpy()


def _principal_axes(embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values = embeddings.double()
    center = values.mean(0)
    _, axes = torch.linalg.eigh((values - center).T @ (values - center))
    return center.float(), axes.flip(1)[:, :count].float()


def _left_out(near: Tensor, rows: Tensor) -> Tensor:
    """The neighbours of each sample without itself; where it is not among them, without the farthest."""
    own = near == rows.unsqueeze(1)
    last = near.shape[1] - 1
    place = torch.where(own.any(1), own.long().argmax(1), torch.tensor(last))
    keep = torch.ones_like(near, dtype=torch.bool)
    keep[torch.arange(len(near)), place] = False
    return near[keep].view(len(near), last)
