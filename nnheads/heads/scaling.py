"""What calibration does to probabilities: a temperature, and a share that all classes have alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled(log_probs: Tensor, temperature: Tensor | float, uniform_share: Tensor | float) -> Tensor:
    """``log((1 - e) softmax(log p / T) + e / C)``; no class changes its place.

    The temperature alone (Guo et al. 2017, section 4.2) cannot mend a vote: a class without a neighbour sits at the
    floor of its probabilities, and to raise it there the temperature would have to flatten all other answers.

    Args:
        log_probs: (..., C) log-probabilities or logits.
        temperature: T, above 0.
        uniform_share: e, the part of the probability that is shared equally over all classes, 0 up to below 1.

    Returns:
        (..., C) log-probabilities.
    """
    found = (log_probs / temperature).log_softmax(-1)
    # not asked whether it is 0, which on a GPU would wait for all that was queued; then the logarithm is -inf
    share = torch.as_tensor(uniform_share, dtype=found.dtype, device=found.device)
    equal = share.log() - math.log(found.shape[-1])
    return torch.logaddexp(found + torch.log1p(-share), equal)
