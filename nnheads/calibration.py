"""Probabilities that mean what they say, and a limit beyond which an input is unlike the training samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nnheads.devices import Precision
from nnheads.errors import ConfigError, DataError, ShapeError
from nnheads.evaluation import Evaluation, embed
from nnheads.headed import HeadedModel, evaluating
from nnheads.heads import MemoryHead
from nnheads.io import load, save
from nnheads.loaders import Data
from nnheads.storage import editing

_LEAST = 20
"""Held-out samples below which a temperature would be noise."""


@dataclass(frozen=True)
class Calibration:
    """What was fitted on held-out samples.

    Attributes:
        temperature: by which log-probabilities are divided.
        outlier_threshold: `outlier_scores` that the given share of the samples stays below.
        samples: held-out samples.
        before: the answers without a temperature.
        after: the answers of each half of the samples at the temperature that the other half asks for: no sample is
            judged by what was fitted to it.
    """

    temperature: float
    outlier_threshold: float
    samples: int
    before: Evaluation
    after: Evaluation


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The temperature at which log-probabilities have the smallest log-loss (Guo et al. 2017, section 4.2).

    The log-loss is convex in one over the temperature, so there is one minimum; it is looked for from 0.02 to 50.

    Args:
        log_probs: (N, C) log-probabilities or logits.
        labels: (N,) int64.

    Raises:
        ShapeError: the shapes do not fit, there are no samples, or a label is no class.
    """
    if log_probs.dim() != 2 or labels.shape != log_probs.shape[:1] or not len(labels):
        raise ShapeError(f"temperature: needs (N, C) and (N,), got {tuple(log_probs.shape)} and {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= log_probs.shape[1]:
        raise ShapeError(f"temperature: labels must be 0 to {log_probs.shape[1] - 1}")
    precise = log_probs.double()

    def log_loss(log_temperature: float) -> float:
        scaled = (precise / math.exp(log_temperature)).log_softmax(1)
        return float(-scaled.gather(1, labels.unsqueeze(1)).mean())

    low, high = math.log(0.02), math.log(50)
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = log_loss(left), log_loss(right)
    while high - low > 1e-4:  # golden section
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = log_loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = log_loss(right)
    return math.exp((low + high) / 2)


def cross_fitted(found: Evaluation, seed: int = 0) -> Evaluation:
    """The answers of each half of the samples at the temperature that fits the other half."""
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(seed))
    halves = order[::2], order[1::2]
    log_probs = found.log_probs.clone()
    for here, other in (halves, halves[::-1]):
        if len(here) and len(other):
            temperature = fit_temperature(found.log_probs[other], found.labels[other])
            log_probs[here] = (found.log_probs[here] / temperature).log_softmax(1)
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
    """Fits the head's temperature and the limit of what counts as like the training samples, on held-out samples.

    Both are in the head from then on, and saved with it. No answer changes, only how certain it is. After more
    training, or many samples added or forgotten, calibrate again.

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
    was = float(head.temperature)
    with evaluating(model):
        head.set_temperature(1.0)
        try:
            log_probs = torch.cat([head(part.to(model.device)).float().cpu() for part in z.split(1024)])
            temperature = fit_temperature(log_probs, labels)
            head.set_temperature(temperature)
            scores = head.outlier_scores(z.to(model.device)).double().cpu()
        except BaseException:
            head.set_temperature(was)
            raise
    threshold = float(scores.sort().values[min(len(scores) - 1, math.ceil(accepted * len(scores)))])
    head.outlier_threshold.fill_(threshold)
    found = Evaluation(log_probs, labels, 0.0)
    return Calibration(temperature, threshold, len(labels), found, cross_fitted(found))


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
