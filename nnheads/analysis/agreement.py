"""Whether two classifiers answer alike: MC, ME and P_SAME, and the divergence of their probabilities.

Source: Cohen, Sapiro and Giryes, "DNN or k-NN: That is the Generalize vs. Memorize Question", equations 1 to 3 of the
first version, equations 1 and 2 of the second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnheads.errors import ShapeError


class Agreement(NamedTuple):
    """What `agreement` found; shares from 0 to 1.

    Attributes:
        mc: mutually correct, the share of the model's right answers that the other gives too; 1 where the model has
            none right.
        me: mutually erroneous, the share of the model's wrong answers that the other gives too, the same wrong class;
            1 by definition where the model makes no error.
        p_same: the share of equal answers, ``mc * accuracy + me * (1 - accuracy)``.
        accuracy: of the model.
        other_accuracy: of the other.
    """

    mc: float
    me: float
    p_same: float
    accuracy: float
    other_accuracy: float


def agreement(model_predictions: Tensor, other_predictions: Tensor, labels: Tensor) -> Agreement:
    """How far another classifier answers as a model does.

    Args:
        model_predictions: (N,) int64 classes, the model's.
        other_predictions: (N,) int64 classes, for instance of a kNN vote on the model's embeddings.
        labels: (N,) int64.

    Returns:
        See `Agreement`. MC and ME are not symmetric in the two classifiers, P_SAME is.

    Raises:
        ShapeError: the three are not as long as each other, or empty.
    """
    _same_length(model_predictions, other_predictions, labels)
    model, other, truth = (vector.cpu() for vector in (model_predictions, other_predictions, labels))
    same, right = model == other, model == truth
    return Agreement(
        mc=_share(same, right),
        me=_share(same, ~right),
        p_same=float(same.double().mean()),
        accuracy=float(right.double().mean()),
        other_accuracy=float((other == truth).double().mean()),
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Mean over the samples of ``D_KL(p || q) = sum_c p_c (log p_c - log q_c)``, in nats.

    In the paper p is the model fitted on a layer (kNN, SVM, logistic regression) and q the network. A class to which p
    gives nothing contributes nothing; one to which q gives nothing and p something makes the divergence infinite.

    Args:
        log_p: (N, C) log-probabilities; -inf for 0.
        log_q: (N, C) log-probabilities.

    Raises:
        ShapeError: the two have different shapes, or are empty.
    """
    if log_p.shape != log_q.shape or log_p.ndim != 2 or not len(log_p):
        raise ShapeError(
            f"kl_divergence: both must be (N, C) with N of at least 1, got {tuple(log_p.shape)}, {tuple(log_q.shape)}"
        )
    p, q = log_p.detach().cpu().double(), log_q.detach().cpu().double()
    parts = torch.where(torch.isneginf(p), torch.zeros_like(p), p.exp() * (p - q))
    return float(parts.sum(1).mean())


def _share(what: Tensor, among: Tensor) -> float:
    return float(what[among].double().mean()) if bool(among.any()) else 1.0


def _same_length(*vectors: Tensor) -> None:
    shapes = [tuple(vector.shape) for vector in vectors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ShapeError(
            f"agreement: predictions and labels must be (N,) of one length, got {', '.join(map(str, shapes))}"
        )
