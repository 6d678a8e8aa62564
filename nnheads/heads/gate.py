"""The gate of the biased head: how far to trust a kernel regression, and from where on to rely on it alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import one_of, positive


@final
class Gate(nn.Module):
    """``g = (mean_i k(c, c_i))^sharpness`` with a Gaussian kernel of its own width, and the threshold of g.

    c are codes of the projections, the square roots of class probabilities: their distance (Hellinger's, up to a
    factor) vanishes among samples that are surely of one class and grows where neighbours are of many minds. The
    density of the projections themselves, equation 14 of the review to the letter, says little about who is right.

    Args:
        sigma: width: a number, or ``"learned"``.
        threshold: a number, or ``"auto"``.
        tolerance: share of accuracy that an automatic threshold may cost.
        holdout: share of the samples, by id, that are kept for choosing the threshold.

    Attributes:
        threshold: g from which the regression alone answers; infinite until it is chosen.
        sharpness: exponent of g. It leaves the order of samples as it is and keeps the mixture from harm by neighbours
            that are only half trusted.
    """

    threshold: Tensor
    sharpness: Tensor

    def __init__(
        self,
        sigma: float | Literal["learned"],
        threshold: float | Literal["auto"],
        tolerance: float,
        holdout: float,
    ) -> None:
        super().__init__()
        if isinstance(sigma, str):
            one_of("biased", "gate_sigma", sigma, ("learned",))
        else:
            positive("biased", "gate_sigma", sigma)
        if isinstance(threshold, str) and threshold != "auto":
            raise ConfigError(f"head 'biased': threshold must be a number or auto, got {threshold!r}")
        if not isinstance(threshold, str):
            positive("biased", "threshold", threshold, zero=True)
        positive("biased", "tolerance", tolerance, zero=True)
        if not 0 <= holdout < 1:
            raise ConfigError(f"head 'biased': holdout must be 0 or more and below 1, got {holdout!r}")
        self.sigma = sigma
        self.option: float | Literal["auto"] = threshold
        self.tolerance = tolerance
        self.holdout = holdout
        log_sigma = torch.tensor(math.log(_FIRST_SIGMA if isinstance(sigma, str) else sigma))
        if isinstance(sigma, str):
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)
        self.register_buffer("threshold", torch.tensor(math.inf if isinstance(threshold, str) else float(threshold)))
        self.register_buffer("sharpness", torch.ones(()))

    def mean_kernel(self, sq_distances: Tensor, valid: Tensor) -> Tensor:
        """(B,) mean kernel from squared distances (B, k) of the codes; 0 where there are no neighbours."""
        kernels: Tensor = (sq_distances * (-0.5 * (-2 * self.log_sigma).exp())).exp() * valid
        return kernels.sum(-1) / valid.sum(-1).clamp_min(1)

    def forward(self, sq_distances: Tensor, valid: Tensor) -> Tensor:
        """g (B,) from squared distances (B, k) of the codes; 0 where there are no neighbours."""
        mean = self.mean_kernel(sq_distances, valid)
        # At 0 the gradient of a power is 0 times infinity.
        return mean.clamp_min(1e-12) ** self.sharpness * (mean > 0)

    @torch.no_grad()
    def choose(self, found: Mapping[float, Verdicts]) -> None:
        """Choose the exponent and the threshold with which most samples skip for no more than the tolerance.

        What is lost is known from so many samples only: with its standard error it must be within the tolerance.

        Args:
            found: the verdicts for each exponent; of equals the highest exponent is taken.
        """
        most = {exponent: self._most_skipped(each) for exponent, each in found.items()}
        exponent = max(found, key=lambda each: (most[each], each))
        self.sharpness.fill_(exponent)
        self.threshold.fill_(found[exponent].threshold_for(most[exponent]))

    def _most_skipped(self, found: Verdicts) -> int:
        skipped, lost, error = found.lost_by_skipped()
        fine = lost + error <= self.tolerance + 1e-9
        return int(skipped[fine].max()) if bool(fine.any()) else 0


_FIRST_SIGMA = 0.5
"""Codes of two certain and different classes are the root of 2 apart."""

SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Exponents that are tried."""


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

    def lost_by_skipped(self) -> tuple[Tensor, Tensor, Tensor]:
        """What skipping costs, for every number of samples that may skip, those with the highest g first.

        Returns:
            Numbers of skipped samples (m,) that a threshold can separate, 0 and n among them, rising; the accuracy lost
            against the network (m,), a share, and its standard error (m,), both float64.
        """
        order = self.gate.argsort(descending=True, stable=True)
        network = self.network[order].double()
        by_first, by_mixed = network - self.first[order].double(), network - self.mixed[order].double()
        count = torch.arange(len(order) + 1, device=order.device)
        total = max(1, len(order))
        lost = _sums(by_first, by_mixed) / total
        # The square of a difference of two verdicts is whether they differ.
        error = ((_sums(by_first.abs(), by_mixed.abs()) / total - lost.square()).clamp_min(0) / total).sqrt()
        ordered = self.gate[order]
        separable = torch.ones_like(count, dtype=torch.bool)
        separable[1:-1] = ordered[1:] < ordered[:-1]
        return count[separable], lost[separable], error[separable]

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


def _sums(head: Tensor, tail: Tensor) -> Tensor:
    """(n + 1,) sums of the first i values of ``head`` and the others of ``tail``, for i from 0 to n."""
    return torch.cat([head.new_zeros(1), (head - tail).cumsum(0)]) + tail.sum()


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
