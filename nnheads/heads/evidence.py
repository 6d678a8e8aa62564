"""What a head that decides by stored samples can say about a decision."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .scaling import scaled

Scale = Literal["probability", "logit"]


@final
@dataclass(frozen=True)
class Neighbors:
    """The stored samples that decided, nearest first; slots beyond the samples held have id -1 and weight 0.

    Attributes:
        rows: (B, k) int64 rows of the memory, -1 in an empty slot; meaningful until the memory changes.
        ids: (B, k) int64 ids of the samples.
        labels: (B, k) int64 labels they were given.
        distances: (B, k) in the head's metric; infinite in an empty slot.
        weights: (B, k) share of each in the decision; a row sums to one.
    """

    rows: Tensor
    ids: Tensor
    labels: Tensor
    distances: Tensor
    weights: Tensor


@final
@dataclass(frozen=True)
class Explanation:
    """Which stored samples decided, nearest first, and what each contributed to each class.

    The contributions and the rest add up to the head's answer: `probabilities` is that of ``forward``, to rounding.

    Attributes:
        rows, ids, labels, distances, weights: as in `Neighbors`; weights are shares in the decision, zero where more
            neighbours were asked for than decide.
        shares: (B, k, C) what each neighbour contributes to the score of each class.
        rest: (B, C) what the score has from elsewhere: smoothing, floor, bias, neighbours beyond those listed, and what
            calibration shares equally over all classes.
        scale: ``"probability"`` where scores are probabilities; ``"logit"`` where their softmax is.
        uniform_share: part of the probability that calibration shares equally over all classes, of which each has
            ``uniform_share / C``; no sample contributed it. It is in the rest: as it is where scores are
            probabilities, and where they are logits as the change of the logit that it makes.
    """

    rows: Tensor
    ids: Tensor
    labels: Tensor
    distances: Tensor
    weights: Tensor
    shares: Tensor
    rest: Tensor
    scale: Scale
    uniform_share: float = 0.0

    @property
    def scores(self) -> Tensor:
        """(B, C) sum of all contributions."""
        return self.shares.sum(1) + self.rest

    @property
    def probabilities(self) -> Tensor:
        """(B, C) probabilities of the classes, from the contributions."""
        return self.scores if self.scale == "probability" else self.scores.softmax(-1)


def listing(
    found: Neighbors,
    shares: Tensor,
    rest: Tensor,
    scale: Scale,
    k: int | None = None,
    more: Neighbors | None = None,
    uniform_share: float = 0.0,
) -> Explanation:
    """An explanation that lists as many neighbours as wanted.

    Args:
        found: the neighbours that decide.
        shares: (B, m, C) what they contribute.
        rest: (B, C) what the scores have from elsewhere.
        scale: of both.
        k: neighbours listed; those that decide by default.
        more: the k nearest, where k is above m.
        uniform_share: see `Explanation`.
    """
    decide = shares.shape[1]
    listed = {field.name: getattr(found, field.name) for field in fields(Neighbors)}
    if k is not None and k < decide:
        rest = rest + shares[:, k:].sum(1)
        shares, listed = shares[:, :k], {name: part[:, :k] for name, part in listed.items()}
    elif more is not None:
        # Searched again, samples at the same distance may come in another order.
        again = (more.rows.unsqueeze(-1) == found.rows.unsqueeze(1)).any(-1) & (more.rows >= 0)
        order = again.to(torch.int8).argsort(dim=1, stable=True)[:, : more.rows.shape[1] - decide]
        listed = {name: torch.cat([part, getattr(more, name).gather(1, order)], 1) for name, part in listed.items()}
        listed["weights"] = F.pad(found.weights, (0, order.shape[1]))
        shares = F.pad(shares, (0, 0, 0, order.shape[1]))
    return Explanation(**listed, shares=shares, rest=rest, scale=scale, uniform_share=uniform_share)


def calibrated_shares(
    shares: Tensor, rest: Tensor, scale: Scale, temperature: Tensor, uniform_share: float
) -> tuple[Tensor, Tensor]:
    """Contributions (B, k, C) and rest (B, C) to the calibrated scores, see `nnheads.heads.scaling.scaled`.

    The temperature divides logits; of probabilities it changes the sum for a class, and everyone's part in it stays
    what it was. Contributions then make up what is not shared equally over all classes; that is added to the rest.
    """
    scores = shares.sum(1) + rest
    if scale == "logit":
        shares = shares / temperature
        return shares, scaled(scores, temperature, uniform_share) - shares.sum(1)
    log_scores = scores.log()
    change = (1 - uniform_share) * ((log_scores / temperature).log_softmax(-1) - log_scores).exp()
    return shares * change.unsqueeze(1), rest * change + uniform_share / scores.shape[-1]
