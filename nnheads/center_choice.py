"""Which centers to drop and which samples to add: the least needed and the worst predicted (review, Algorithm 1)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from nnheads.centers import kernel_head
from nnheads.errors import ConfigError
from nnheads.heads.base import Head


@torch.no_grad()
def log_probs_of(head: Head, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
    """(n,) log-probability of the label ``y`` (n,) that a head gives at each embedding ``z`` (n, d), in evaluation.

    ``ids`` (n,) leaves a sample's own center out. A class the head does not know yet has probability zero.
    """
    training = head.training
    head.eval()
    try:
        parts = [
            head(z[at], ids=None if ids is None else ids[at])
            for at in torch.arange(len(z), device=z.device).split(2048)
        ]
    finally:
        head.train(training)
    log_probs = torch.cat(parts) if parts else z.new_zeros(0, head.num_classes)
    picked = log_probs.gather(1, y.clamp_max(head.num_classes - 1).unsqueeze(1)).squeeze(1)
    return picked.masked_fill(y >= head.num_classes, float("-inf"))


def best_predicted(head: Head, n: int, *, balanced: bool = False) -> Tensor:
    """Ids of the ``n`` centers whose label the others predict best: the least needed (Algorithm 1, S_d).

    Each is scored without itself. Two centers that predict each other well are both least needed, until one is gone:
    pick and drop in rounds where that matters.

    Args:
        head: a head that votes with Gaussian kernels.
        n: number of centers, at most as many as are held.
        balanced: take from the classes with the most centers, so that no class is emptied before the others.
    """
    voting = kernel_head(head)
    memory = voting.memory
    held = len(memory)
    _at_most(n, held, "best_predicted")
    ids, labels = memory.ids[:held], memory.labels[:held]
    scores = log_probs_of(head, voting.embeddings_of(memory.all_keys()), labels, ids)
    if not balanced:
        return ids[scores.argsort(descending=True, stable=True)[:n]]
    counts = torch.bincount(labels, minlength=memory.num_classes)
    keep = _level(counts, held - n)
    order = scores.argsort(descending=True, stable=True)
    surplus = [
        of_class[: int(counts[c] - keep[c])]
        for c in counts.nonzero().flatten()
        if len(of_class := order[labels[order] == c])
    ]
    return ids[torch.cat(surplus)]


def worst_predicted(
    head: Head, z: Tensor, y: Tensor, n: int, *, ids: Tensor | None = None, rounds: int = 1, balanced: bool = False
) -> Tensor:
    """Positions of the ``n`` samples whose label the centers predict worst (Algorithm 1, S_a).

    All samples of a class that has no center tie at the lowest score: choose in rounds, each of which counts the
    samples chosen before as centers, or balanced over the classes, or both. Ties are broken by position.

    Args:
        head: a head that votes with Gaussian kernels; left as it is, for with several rounds those chosen become
            centers of a copy.
        z: (N, d) embeddings of the candidates.
        y: (N,) int64 labels.
        n: number to choose, at most N.
        ids: (N,) ids that the chosen would have as centers; needed only where a candidate may be held already.
        rounds: in how many steps.
        balanced: choose equally many of each class.

    Returns:
        (n,) int64 positions in ``z``, in the order in which they were chosen.
    """
    voting = kernel_head(head)
    _at_most(n, len(z), "worst_predicted")
    if rounds < 1:
        raise ConfigError(f"worst_predicted: rounds must be 1 or more, got {rounds}")
    chosen = torch.zeros(0, dtype=torch.long, device=z.device)
    left = torch.ones(len(z), dtype=torch.bool, device=z.device)
    trial = copy.deepcopy(voting) if rounds > 1 else voting
    for part in _shares(n, min(rounds, max(n, 1))):
        candidates = left.nonzero().flatten()
        scores = log_probs_of(trial, z[candidates], y[candidates], None if ids is None else ids[candidates])
        order = candidates[scores.argsort(stable=True)]
        picked = _balanced_first(order, y, chosen, part) if balanced else order[:part]
        chosen = torch.cat([chosen, picked])
        left[picked] = False
        if trial is not voting:
            trial.add(z[picked], y[picked])
    return chosen


def _at_most(n: int, held: int, where: str) -> None:
    if not 0 <= n <= held:
        raise ConfigError(f"{where}: n must be 0 to {held}, the number there is, got {n}")


def _shares(n: int, rounds: int) -> list[int]:
    """n in nearly equal whole parts."""
    return [n * (i + 1) // rounds - n * i // rounds for i in range(rounds)]


def _level(counts: Tensor, total: int) -> Tensor:
    """How many of each class remain when ``total`` do and the largest classes give first."""
    keep = counts.clone()
    while int(keep.sum()) > total:
        surplus = int(keep.sum()) - total
        largest = keep == keep.max()
        second = int(keep[~largest].max()) if bool((~largest).any()) else 0
        step = min(int(keep.max()) - second, max(1, surplus // int(largest.sum())))
        if surplus < int(largest.sum()):
            last = largest.nonzero().flatten()[-surplus:]
            keep[last] -= 1
        else:
            keep[largest] -= step
    return keep


def _balanced_first(order: Tensor, y: Tensor, chosen: Tensor, n: int) -> Tensor:
    """The first n of ``order`` such that, with those chosen before, the classes have as equal a share as can be."""
    taken = torch.bincount(y[chosen], minlength=int(y.max()) + 1)
    rank = torch.zeros_like(order)
    for c in y[order].unique():
        of_class = (y[order] == c).nonzero().flatten()
        rank[of_class] = torch.arange(len(of_class), device=y.device) + taken[c]
    return order[rank.argsort(stable=True)[:n]]
