"""The gate of the biased network: how far to trust a kernel regression, and from where on to rely on it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import positive
from .width import Width


@final
class Gate(nn.Module):
    """``g = mean_i k(phi, phi_i)`` with a Gaussian kernel of its own width (review, equation 14), and its threshold.

    Args:
        sigma: width: a number, ``"auto"`` or ``"learned"``. The automatic width gives half of the stored samples a g of
            about a half or more.
        threshold: a number, or ``"auto"``.
        tolerance: share of accuracy that an automatic threshold may cost.
        holdout: share of the samples, by id, that are kept for choosing the threshold.

    Attributes:
        threshold: g from which the regression alone answers; infinite until it is chosen.
    """

    threshold: Tensor

    def __init__(
        self,
        sigma: float | Literal["auto", "learned"],
        threshold: float | Literal["auto"],
        tolerance: float,
        holdout: float,
    ) -> None:
        super().__init__()
        if isinstance(threshold, str) and threshold != "auto":
            raise ConfigError(f"head 'biased': threshold must be a number or auto, got {threshold!r}")
        if not isinstance(threshold, str):
            positive("biased", "threshold", threshold, zero=True)
        positive("biased", "tolerance", tolerance, zero=True)
        if not 0 <= holdout < 1:
            raise ConfigError(f"head 'biased': holdout must be 0 or more and below 1, got {holdout!r}")
        self.option: float | Literal["auto"] = threshold
        self.tolerance = tolerance
        self.holdout = holdout
        self.width = Width("biased", sigma, rule=half_sigma)
        self.register_buffer("threshold", torch.tensor(math.inf if isinstance(threshold, str) else float(threshold)))

    def forward(self, sq_distances: Tensor, valid: Tensor) -> Tensor:
        """g (B,) from squared distances (B, k) to the neighbours; 0 where there are none."""
        sigma = self.width()
        kernels: Tensor = (sq_distances / (-2 * sigma * sigma)).exp() * valid
        return kernels.sum(-1) / valid.sum(-1).clamp_min(1)

    @torch.no_grad()
    def choose(self, found: Verdicts) -> None:
        """Choose the lowest threshold that costs no more than the tolerance."""
        skipped, accuracy = found.accuracy_by_skipped()
        fine = accuracy >= found.network.double().mean() - self.tolerance - 1e-9
        most = int(skipped[fine].max()) if bool(fine.any()) else 0
        self.threshold.fill_(found.threshold_for(most))


@dataclass(frozen=True)
class Verdicts:
    """How samples would be answered.

    Attributes:
        gate: (n,) values of g.
        first: (n,) bool, whether the regression alone answers right.
        mixed: (n,) bool, whether the mixture of both does.
        network: (n,) bool, whether the network alone does.
    """

    gate: Tensor
    first: Tensor
    mixed: Tensor
    network: Tensor

    def accuracy_by_skipped(self) -> tuple[Tensor, Tensor]:
        """Accuracy for every number of samples that may skip, those with the highest g first.

        Returns:
            Numbers of skipped samples (m,) that a threshold can separate, 0 and n among them, rising, and the
            accuracies (m,) float64.
        """
        order = self.gate.argsort(descending=True, stable=True)
        gain = (self.first[order].double() - self.mixed[order].double()).cumsum(0)
        right = torch.cat([gain.new_zeros(1), gain]) + self.mixed.double().sum()
        ordered = self.gate[order]
        separable = torch.ones(len(order) + 1, dtype=torch.bool, device=order.device)
        separable[1:-1] = ordered[1:] < ordered[:-1]
        count = torch.arange(len(order) + 1, device=order.device)
        return count[separable], (right / max(1, len(order)))[separable]

    def threshold_for(self, skipped: int) -> float:
        """The threshold at which so many of the samples skip (more where several share the last value of g)."""
        ordered = self.gate.sort(descending=True).values
        if skipped == 0:
            return math.inf
        if skipped == len(ordered):
            return 0.0
        last, following = ordered[skipped - 1], ordered[skipped]
        between = last.lerp(following, 0.5)
        return float(between if bool(between > following) else last)


def half_sigma(sq_distances: Tensor) -> Tensor:
    """Width at which the median of the mean squared distances (n, k) has a kernel of one half; 1 where all are 0."""
    middle = sq_distances.mean(-1).median()
    return torch.where(middle > 0, middle / (2 * math.log(2)), torch.ones_like(middle)).sqrt()


def held_out(ids: Tensor | None, batch: int, share: float) -> Tensor:
    """(B,) bool: which samples, by id (B, 1), are held out; the same ones whenever and in whatever order asked.

    Mixed samples, (B, 2), are where either is; without ids, or with ids of -1, none is.
    """
    if ids is None:
        return torch.zeros(batch, dtype=torch.bool)
    out = (scattered(ids) < share) & (ids >= 0)
    return out.any(-1)


def scattered(ids: Tensor) -> Tensor:
    """A number in [0, 1) for each id, the same whenever asked, that neighbouring ids do not share (Knuth's hash)."""
    mixed = (ids * 2654435761) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % 2**32
    return (mixed ^ (mixed >> 13)).double() / 2**32


def per_class_rank(labels: Tensor, ids: Tensor) -> Tensor:
    """(n,) place of each sample in its class, in an order that depends on the ids alone."""
    # The other end than `held_out` takes: centers are drawn from those that teach, as far as there are enough.
    order = scattered(ids).argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels, minlength=1)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[labels[order]]
    return rank
