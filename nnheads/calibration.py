"""Probabilities that mean what they say, and a limit beyond which an input is unlike the training samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nnheads.devices import Precision
from nnheads.errors import ConfigError, DataError, ShapeError
from nnheads.evaluation import Evaluation, embed
from nnheads.headed import HeadedModel, evaluating
from nnheads.heads import MemoryHead
from nnheads.heads.scaling import scaled
from nnheads.io import load, save
from nnheads.loaders import Data
from nnheads.storage import editing

_LEAST = 20
"""Held-out samples below which a temperature would be noise."""

_LOWEST, _HIGHEST, _STEP = math.log(0.02), math.log(50), 0.25
"""Where the logarithm of the temperature is looked for."""

_MOST_SHARED = 0.5
"""Of the probability, equally over all classes."""

_ONE_MORE = 0.5
"""Of a sample whose class has no probability: few held-out samples may have none by chance, and new ones will. Of some
hundred it changes nothing."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted on held-out samples.

    Attributes:
        temperature: by which log-probabilities are divided.
        uniform_share: part of the probability that is then shared equally over all classes.
        outlier_threshold: `outlier_scores` that the given share of the samples stays below.
        samples: held-out samples.
        before: the answers as they were without.
        after: the answers of each half of the samples, calibrated on the other half: no sample is judged by what was
            fitted to it.
    """

    temperature: float
    uniform_share: float
    outlier_threshold: float
    samples: int
    before: Evaluation
    after: Evaluation


class Scaling(NamedTuple):
    """How probabilities are calibrated, see `nnheads.heads.scaling.scaled`.

    Attributes:
        temperature: by which log-probabilities are divided.
        uniform_share: part of the probability that is then shared equally over all classes.
    """

    temperature: float
    uniform_share: float


def fit_scaling(log_probs: Tensor, labels: Tensor) -> Scaling:
    """The temperature and the uniform share with which log-probabilities have the smallest log-loss.

    Half a sample more is counted, whose class has no probability at all: from few samples, none of which may be at the
    floor of a vote, the share is not chosen too small. At any temperature the log-loss is convex in the share, which
    bisection of its slope finds; over temperatures, from 0.02 to 50, a grid is searched and the best of it refined. The
    share is at most a half.

    Args:
        log_probs: (N, C) log-probabilities or logits.
        labels: (N,) int64.

    Raises:
        ShapeError: the shapes do not fit, there are no samples, or a label is no class.
    """
    if log_probs.dim() != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise ShapeError(f"calibration: needs (N, C) and (N,), got {tuple(log_probs.shape)} and {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= log_probs.shape[1]:
        raise ShapeError(f"calibration: labels must be 0 to {log_probs.shape[1] - 1}")
    precise, equal = log_probs.double(), 1 / log_probs.shape[1]

    def best(log_temperature: float) -> tuple[float, float]:
        """Log-loss at a temperature with the best share, and that share."""
        scores = precise / math.exp(log_temperature)
        right = (scores.gather(1, labels.unsqueeze(1)).squeeze(1) - scores.logsumexp(1)).exp()
        share = _best_share(right, equal)
        own = -float(torch.lerp(right, torch.full_like(right, equal), share).log().mean())
        return own - _ONE_MORE / len(right) * math.log(share), share

    grid = [_LOWEST + _STEP * step for step in range(round((_HIGHEST - _LOWEST) / _STEP) + 1)]
    middle = min(grid, key=lambda at: best(at)[0])
    low, high = max(_LOWEST, middle - _STEP), min(_HIGHEST, middle + _STEP)
    section = (math.sqrt(5) - 1) / 2
    left, right = high - section * (high - low), low + section * (high - low)
    at_left, at_right = best(left)[0], best(right)[0]
    while high - low > 1e-4:  # golden section
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - section * (high - low)
            at_left = best(left)[0]
        else:
            low, left, at_left = left, right, at_right
            right = low + section * (high - low)
            at_right = best(right)[0]
    found = (low + high) / 2
    return Scaling(math.exp(found), best(found)[1])


def _best_share(right: Tensor, equal: float) -> float:
    """The share e, up to a half, with the smallest mean of ``-log((1 - e) p + e / C)``; p (N,) is the right class's."""

    def slope(share: float) -> float:
        own = float(((right - equal) / torch.lerp(right, torch.full_like(right, equal), share)).mean())
        return own - _ONE_MORE / len(right) / share

    low, high = 0.0, _MOST_SHARED
    if slope(high) <= 0:
        return high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def cross_fitted(found: Evaluation, seed: int = 0) -> Evaluation:
    """The answers of each half of the samples, calibrated on the other half."""
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(seed))
    halves = order[::2], order[1::2]
    log_probs = found.log_probs.clone()
    for here, other in (halves, halves[::-1]):
        if len(here) and len(other):
            log_probs[here] = scaled(found.log_probs[here], *fit_scaling(found.log_probs[other], found.labels[other]))
    return Evaluation(log_probs, found.labels, found.seconds)


@torch.no_grad()
def calibrate(
    model: HeadedModel,
    data: Data,
    *,
    accepted: float = 0.95,
    batch_size: int = 512,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
) -> Calibration:
    """Fits how certain the head is and the limit of what counts as like the training samples, on held-out samples.

    The probabilities become ``(1 - e) softmax(log p / T) + e / C``, with the temperature T and the uniform share e of
    the smallest log-loss. Both and the limit are in the head from then on, and saved with it. No answer changes, only
    how certain it is. After more training, or many samples added or forgotten, calibrate again.

    Args:
        model: what ``attach_head`` returned.
        data: labelled samples, as `nnheads.evaluate` takes them, that the model was not trained on and does not store.
        accepted: share of them that stays below the limit.
        batch_size, device, precision: as in `nnheads.evaluate`.

    Raises:
        ConfigError: ``accepted`` is not between 0 and 1.
        DataError: there are fewer than 20 samples, or samples of a class that the model does not know, or the head
            stores none. The model is as it was then.
    """
    if not 0 < accepted < 1:
        raise ConfigError(f"calibrate: accepted must be between 0 and 1, got {accepted}")
    z, labels, _ = embed(model, data, batch_size=batch_size, device=device, precision=precision)
    head = model.head
    if len(z) < _LEAST:
        raise DataError(f"calibrate needs {_LEAST} held-out samples or more, got {len(z)}")
    if isinstance(head, MemoryHead) and not len(head.memory):
        raise DataError(f"calibrate: head {head.name!r} stores no samples yet: train it or memorize some first")
    if int(labels.max()) >= head.num_classes:
        raise DataError(f"calibrate: label {int(labels.max())} is no class of the model, which has {head.num_classes}")
    was = float(head.temperature), float(head.uniform_share)
    with evaluating(model):
        head.set_scaling(1.0, 0.0)
        try:
            log_probs = torch.cat([head(part.to(model.device)).float().cpu() for part in z.split(1024)])
            scaling = fit_scaling(log_probs, labels)
            head.set_scaling(*scaling)
            scores = head.outlier_scores(z.to(model.device)).double().cpu()
        except BaseException:
            head.set_scaling(*was)
            raise
    threshold = float(scores.sort().values[min(len(scores) - 1, math.ceil(accepted * len(scores)))])
    head.outlier_threshold.fill_(threshold)
    found = Evaluation(log_probs, labels, 0.0)
    return Calibration(*scaling, threshold, len(labels), found, cross_fitted(found))


def calibrate_saved(path: str | Path, data: Data, *, accepted: float = 0.95, device: str = "auto") -> Calibration:
    """`calibrate` for a saved model, whose folder is replaced as a whole or stays as it is.

    Raises:
        CheckpointError: see `nnheads.load` and `nnheads.save`.
        DataError: see `calibrate`.
    """
    with editing(Path(path)):
        model = load(path)
        found = calibrate(model, data, accepted=accepted, device=device)
        save(model.to("cpu"), path)
    return found
