"""What the gate of a biased head trades: accuracy against share skipped against time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nnheads.devices import Precision, autocast_for, resolve_device
from nnheads.errors import DataError
from nnheads.evaluation import embed, target_for
from nnheads.headed import HeadedModel, evaluating
from nnheads.loaders import Data, ordered_batches


@dataclass(frozen=True)
class SweepPoint:
    """What a threshold gives.

    Attributes:
        threshold: g from which rows skip f2; infinite where none does.
        skipped: share of the samples that skip f2, 0 to 1.
        accuracy: share of right answers, 0 to 1.
        ms_per_sample: milliseconds for one sample of a whole batch, None where it was not timed.
    """

    threshold: float
    skipped: float
    accuracy: float
    ms_per_sample: float | None


@dataclass(frozen=True)
class Sweep:
    """Accuracy against share skipped against time.

    Attributes:
        points: one a threshold, the highest threshold first.
        network_accuracy: share of right answers of the whole network alone, its classifier on z2.
        network_ms_per_sample: its time; None where it was not timed.
    """

    points: tuple[SweepPoint, ...]
    network_accuracy: float
    network_ms_per_sample: float | None


def sweep_threshold(
    model: HeadedModel,
    data: Data,
    *,
    thresholds: Sequence[float] | None = None,
    batch_size: int = 128,
    timed_batches: int = 4,
    rounds: int = 3,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
) -> Sweep:
    """What the gate's threshold trades: accuracy, share of samples that skip f2, and time.

    Args:
        model: with a biased head that cuts the backbone in two; its threshold is not changed.
        data: labelled samples, as in ``evaluate``.
        thresholds: which to try; by default those at which 0, 10, ... 100 % of ``data`` skip, and the head's own.
        batch_size: of what is not a loader already, also of what is timed.
        timed_batches: batches to time, with conditional compute; 0 for no timing.
        rounds: times each is run; the median is reported. The network and all thresholds take turns.
        device, precision: as in ``evaluate``.

    Raises:
        ConfigError: the model is not cut in two.
        DataError: there are no samples.
    """
    head = model.gated_head()
    z, y, _ = embed(model, data, batch_size=batch_size, device=device, precision=precision)
    with evaluating(model):
        (found,) = head.verdicts(z.to(model.device), y.to(model.device))
    if thresholds is None:
        shares = [round(len(y) * tenth / 10) for tenth in range(11)]
        thresholds = [*(found.threshold_for(share) for share in shares), float(head.gate.threshold)]
    wanted = sorted(set(thresholds), reverse=True)
    batches = list(_some(model, data, batch_size, timed_batches, device, precision))
    times = _times(model, batches, wanted, rounds, precision) if batches else None
    points = []
    for place, threshold in enumerate(wanted):
        skips = found.gate >= threshold
        accuracy = torch.where(skips, found.first, found.mixed).double().mean()
        seconds = None if times is None else 1000 * times[place + 1]
        points.append(SweepPoint(threshold, float(skips.double().mean()), float(accuracy), seconds))
    network = None if times is None else 1000 * times[0]
    return Sweep(tuple(points), float(found.network.double().mean()), network)


@torch.no_grad()
def skipped_share(
    model: HeadedModel,
    data: Data,
    *,
    batch_size: int = 512,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
) -> float:
    """Share of samples, 0 to 1, that the gate answers without f2 at the threshold it has.

    Args:
        model: with a biased head that cuts the backbone in two.
        data, batch_size, device, precision: as in ``evaluate``.

    Raises:
        ConfigError: the model is not cut in two.
        DataError: there are no samples.
    """
    model.gated_head()
    where = resolve_device(device)
    model.to(where)
    skipped = samples = 0
    with evaluating(model), autocast_for(where, precision):
        for x, _, _ in ordered_batches(data, target_for(model, where, precision), batch_size=batch_size):
            skipped += int(model.gated(x).skipped.sum())
            samples += len(x)
    if not samples:
        raise DataError("there are no samples: the data set is empty")
    return skipped / samples


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample, as torch counts them (products and sums of matrices and convolutions).

    Attributes:
        first: of f1.
        second: of f2.
        projector: of the projector.
    """

    first: int
    second: int
    projector: int


@torch.no_grad()
def count_flops(model: HeadedModel, x: Tensor) -> Flops:
    """Operations of the parts of a model that the biased head cuts in two.

    Args:
        model: with such a head.
        x: a batch as the backbone takes it.

    Raises:
        ConfigError: the model is not cut in two.
    """
    head = model.gated_head()
    counts = []
    with evaluating(model):
        x = x.to(model.device)
        model.first_part(x)  # the first forward also runs the whole backbone once
        h = x
        for part in (model.first_part, head.project, model.second_part):
            with FlopCounterMode(display=False) as counter:
                result = part(x if part == model.first_part else h)
            counts.append(counter.get_total_flops() // len(x))
            h = result if part == model.first_part else h
    return Flops(counts[0], counts[2], counts[1])


def _some(
    model: HeadedModel, data: Data, batch_size: int, count: int, device: str | torch.device, precision: Precision
) -> Iterator[Tensor]:
    where = resolve_device(device)
    batches = ordered_batches(data, target_for(model, where, precision), batch_size=batch_size)
    found = [x for x, _, _ in islice(iter(batches), count)]
    if count and not found:
        raise DataError("there are no samples to time: the data set is empty")
    yield from found


@torch.no_grad()
def _times(
    model: HeadedModel, batches: list[Tensor], thresholds: Sequence[float], rounds: int, precision: Precision
) -> list[float]:
    """Seconds a sample: of the whole network with its classifier, then at each threshold."""
    head = model.gated_head()
    before = head.gate.threshold.clone()
    samples = sum(len(x) for x in batches)
    seconds: list[list[float]] = [[] for _ in range(len(thresholds) + 1)]

    def network(x: Tensor) -> Tensor:
        answer: Tensor = head.classifier.layer(model.second_part(model.first_part(x)).float()).log_softmax(-1)
        return answer

    try:
        with evaluating(model), autocast_for(model.device, precision):
            for number in range(rounds + 1):  # the first warms up
                for place, threshold in enumerate([math.nan, *thresholds]):
                    head.gate.threshold.fill_(threshold)
                    answer = model if place else network
                    _wait(model.device)
                    started = time.perf_counter()
                    for x in batches:
                        answer(x)
                    _wait(model.device)
                    if number:
                        seconds[place].append((time.perf_counter() - started) / samples)
    finally:
        head.gate.threshold.copy_(before)
    return [statistics.median(each) for each in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
