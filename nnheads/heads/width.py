"""The width of a Gaussian kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..functional import auto_sigma
from .base import one_of, positive


class Width(nn.Module):
    """Width sigma of a Gaussian kernel: a fixed number, learned, or chosen from the stored samples.

    Args:
        head: name of the head, for messages.
        sigma: a positive number; ``"learned"``, a parameter in log space that starts at the automatic width; or
            ``"auto"``.
        rule: the automatic width, from squared distances (n, k) of samples to their neighbours, nearest first; rows of
            NaN are left out, and NaN is what nothing else gives.
    """

    value: Tensor

    def __init__(
        self,
        head: str,
        sigma: float | Literal["auto", "learned"],
        rule: Callable[[Tensor], Tensor] = auto_sigma,
    ) -> None:
        super().__init__()
        self.rule = rule
        if isinstance(sigma, str):
            one_of(head, "sigma", sigma, ("auto", "learned"))
        else:
            positive(head, "sigma", sigma)
        self.sigma = sigma
        self._chosen_for = 0  # samples stored when it was last chosen
        self.register_buffer("value", torch.tensor(math.nan if isinstance(sigma, str) else float(sigma)))
        if sigma == "learned":
            # Times the automatic width, so that the parameter has no unit and weight decay pulls it to that width.
            self.log_factor = nn.Parameter(torch.zeros(()))

    def wanted(self, held: int) -> bool:
        """Whether to choose it now: it never was, or twice as many samples are stored as when it was."""
        return isinstance(self.sigma, str) and held >= max(2, 2 * self._chosen_for)

    def choose(self, sq_distances: Tensor, held: int) -> None:
        """Choose the width from squared distances (n, k) of stored samples to their neighbours, nearest first."""
        if isinstance(self.sigma, str) and sq_distances.numel():
            self.value.copy_(self.rule(sq_distances))
            self._chosen_for = held

    def get_extra_state(self) -> Tensor:
        """What keeps a loaded head from choosing the width anew at its first question."""
        return torch.tensor(self._chosen_for)

    def set_extra_state(self, state: Tensor) -> None:
        self._chosen_for = int(state)

    def follow(self, sq_distances: Tensor, valid: Tensor, momentum: float = 0.05) -> None:
        """Move towards the width that a training batch's neighbours (B, k) ask for, as batch norm follows its mean.

        Embeddings change their scale between two refreshes; a width that stays behind makes the vote too flat or too
        sharp to learn from.
        """
        if isinstance(self.sigma, str) and len(valid):
            # Nothing is asked of the numbers on the way: a GPU would be waited for.
            full = sq_distances.masked_fill(~valid.all(1, keepdim=True), math.nan)
            wanted = self.rule(full).to(self.value)
            moved = torch.where(self.value.isnan(), wanted, self.value.lerp(wanted, momentum))
            self.value.copy_(torch.where(wanted.isnan(), self.value, moved))

    def forward(self) -> Tensor:
        """The width, a scalar in units of distance; 1 as long as nothing was stored."""
        value = torch.where(self.value.isnan(), 1.0, self.value)
        return value * self.log_factor.exp() if self.sigma == "learned" else value
