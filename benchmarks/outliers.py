"""How well a model tells images unlike its training images from others."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from nnheads.data import ImageSet
from nnheads.headed import HeadedModel
from nnheads.heads import MemoryHead
from nnheads.heads.outliers import OutlierScore
from nnheads.training import embed

__all__ = ["auroc"]


@torch.no_grad()
def auroc(model: HeadedModel, own: ImageSet, foreign: ImageSet, device: str = "auto") -> tuple[float, dict[str, float]]:
    """Area under the curve with which scores tell foreign images from a model's own: 0.5 is a guess, 1 is perfect.

    Args:
        model: in evaluation mode.
        own: test images of what it was trained on.
        foreign: images of something else.
        device: see `nnheads.devices.resolve_device`.

    Returns:
        That of the head's `outlier_scores`, and that of each score by name: ``max_probability``, and the kinds of a
        head with a memory.
    """
    parts = [embed(model, images, device=device)[0] for images in (own, foreign)]
    z = torch.cat(parts).to(model.device)
    is_foreign = torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])
    head = model.head
    scores = {"max_probability": torch.cat([1 - head(part).exp().amax(1) for part in z.split(1024)])}
    if isinstance(head, MemoryHead):
        scores |= {kind: head.outlier_scores(z, kind=kind) for kind in get_args(OutlierScore)}
    found = {name: float(binary_auroc(_ranks(score), is_foreign)) for name, score in scores.items()}
    return float(binary_auroc(_ranks(head.outlier_scores(z)), is_foreign)), found


def _ranks(scores: Tensor) -> Tensor:
    """Scores between 0 and 1 in the same order: torchmetrics would squash others, and make large ones equal."""
    unique, place = scores.double().cpu().unique(return_inverse=True)
    ranks: Tensor = place.double() / max(1, len(unique) - 1)
    return ranks
