"""Which centers go and which samples become centers: the two choices of Algorithm 1 (review, section 4)."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.center_choice import log_probs_of
from nnheads.centers import add_centers, drop_centers
from nnheads.heads.kernel_vote import KernelVoteHead
from nnheads.strategies.buffer import priorities
from nnheads.strategies.center_rules import CenterRules


class Exchange(NamedTuple):
    """What `exchange_centers` did: (n,) ids that went, (m,) positions in D_e that came, label mass moved."""

    dropped: Tensor
    added: Tensor
    label_mass: float


@torch.no_grad()
def drop_down_to(head: KernelVoteHead, quota: int, rules: CenterRules, ranks: Tensor | None) -> Exchange:
    """Drop what each class holds beyond a quota, and redistribute the labels.

    Args:
        head: its memory holds the centers.
        quota: centers that a class may keep.
        rules: how.
        ranks: (len(memory),) by row, for ``drop="random"``: the highest of a class go first.
    """
    memory = head.memory
    held = len(memory)
    excess = (_count(memory.labels[:held], head.num_classes) - quota).clamp_min(0)
    watch = _Labels(head)
    gone = [memory.ids[:0]]
    for r in range(rules.rounds if rules.drop == "best" else 1):
        share = _share(excess, r, rules.rounds if rules.drop == "best" else 1)
        rows = torch.arange(len(memory), device=memory.ids.device)
        ids = memory.ids[_first(_drop_order(head, rows, rules, ranks), memory.labels, share)]
        drop_in_turn(head, ids, rules)
        gone.append(ids)
    return Exchange(torch.cat(gone), rows[:0], watch.moved())


@torch.no_grad()
def exchange_centers(
    head: KernelVoteHead, z: Tensor, y: Tensor, ids: Tensor, rules: CenterRules, budget: int, seed: int = 0
) -> Exchange:
    """Drop the best predicted centers, add the worst predicted samples of D_e, and redistribute labels at each change.

    S_d is taken from the centers that were there before and S_a from the samples that were not. In each round both are
    chosen first, then centers are dropped before any is added, so that the budget holds all the time.

    Args:
        head: its memory holds the centers; their keys are as fresh as they can be.
        z: (N, d) embeddings of D_e.
        y: (N,) int64 labels.
        ids: (N,) ids, each once.
        rules: how many, which and how.
        budget: centers that there may be.
        seed: of what is random.
    """
    memory = head.memory
    held = len(memory)
    before = memory.ids[:held].clone()
    is_center = memory.rows_of(ids) >= 0
    candidates = (~is_center).nonzero().flatten()
    came_in = ids[is_center]
    classes = max(head.num_classes, int(y.max()) + 1)
    available = _count(y[candidates], classes)
    holds = _count(memory.labels[:held], classes)
    add_share: int | Tensor
    drop_share: int | Tensor
    if rules.n_a is None:
        part = _count(y[is_center], classes)
        add_share = torch.minimum((part * rules.fraction).round().long(), available)
        droppable, drop_share = came_in, add_share
    else:
        n_a = min(rules.n_a, len(candidates), budget)
        n_d = min(held, max(rules.n_d or 0, held + n_a - budget))
        add_share, drop_share, droppable = n_a, n_d, before
        if rules.balanced:
            add_share = _deal(n_a, available)
            drop_share = _level(n_d, holds, add_share)
    watch = _Labels(head)
    gone, came = [ids[:0]], [candidates[:0]]
    for r in range(rules.rounds):
        rows = memory.rows_of(droppable)
        rows = rows[rows >= 0]
        # Early, so that at no time more are added than have room, whatever the classes' shares are.
        share = _share(drop_share, r, rules.rounds, early=True)
        ranks = _random_ranks(memory.ids[: len(memory)], seed)
        out = memory.ids[_first(_drop_order(head, rows, rules, ranks), memory.labels, share)]
        taken = torch.cat(came)
        left = candidates[~torch.isin(candidates, taken)]
        share = _share(add_share, r, rules.rounds)
        # Both are chosen before anything is changed: once a class has gone, all its samples would tie.
        into = _first(_add_order(head, z, y, ids, left, taken, rules, seed), y, share)
        drop_in_turn(head, out, rules)
        _add_in_turn(head, z[into], y[into], ids[into], rules)
        gone.append(out)
        came.append(into)
    return Exchange(torch.cat(gone), torch.cat(came), watch.moved())


def drop_in_turn(head: KernelVoteHead, ids: Tensor, rules: CenterRules) -> None:
    """Drop centers by id; the label of the very last one has nowhere to go."""
    redistributed = ids[:-1] if len(ids) == len(head.memory) else ids
    if len(redistributed):
        drop_centers(head, redistributed, rules.redistribute, rules.ridge)
    if len(redistributed) < len(ids):
        drop_centers(head, ids[-1:], "none")


def _add_in_turn(head: KernelVoteHead, z: Tensor, y: Tensor, ids: Tensor, rules: CenterRules) -> None:
    """Add centers; the first of all has no label to move."""
    first = int(not len(head.memory))
    if len(ids):
        add_centers(head, z[:first], y[:first], ids[:first], "none")
        add_centers(head, z[first:], y[first:], ids[first:], rules.redistribute, rules.ridge)


def classes_of(labels: Tensor) -> dict[int, int]:
    """How many of each class there are, those with none left out."""
    found, counts = labels.unique(return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


# ---- the order in which they go and come -------------------------------------------------------------------------


def _drop_order(head: KernelVoteHead, rows: Tensor, rules: CenterRules, ranks: Tensor | None) -> Tensor:
    """Rows in the order in which they go."""
    memory = head.memory
    if rules.drop == "random":
        assert ranks is not None
        return rows[ranks[rows].argsort(descending=True, stable=True)]
    # each is scored without itself
    scores = log_probs_of(head, head.embeddings_of(memory.keys_at(rows)), memory.labels[rows], memory.ids[rows])
    return rows[scores.argsort(descending=True, stable=True)]


def _add_order(
    head: KernelVoteHead,
    z: Tensor,
    y: Tensor,
    ids: Tensor,
    left: Tensor,
    taken: Tensor,
    rules: CenterRules,
    seed: int,
) -> Tensor:
    """Those positions of D_e that are left, in the order in which they come after those taken before."""
    if rules.kind == "random":
        return left[_random_ranks(ids[left], seed).argsort(stable=True)]
    if rules.kind == "herding":
        return _herded(z, y, left, taken)
    return left[log_probs_of(head, z[left], y[left]).argsort(stable=True)]


def _herded(z: Tensor, y: Tensor, left: Tensor, taken: Tensor) -> Tensor:
    """Each next one of a class moves the mean of those taken as near as it can to the mean of all of the class."""
    order = [left[:0]]
    for c in y[left].unique():
        of_class = left[y[left] == c]
        points = z[of_class]
        before = z[taken[y[taken] == c]]
        mean, total = z[y == c].mean(0), before.sum(0)
        free = torch.ones(len(points), dtype=torch.bool, device=z.device)
        picked = []
        for n in range(len(before) + 1, len(before) + len(points) + 1):
            distance = ((total + points) / n - mean).square().sum(1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best] = False
            total = total + points[best]
            picked.append(best)
        order.append(of_class[torch.tensor(picked, device=z.device)])
    return torch.cat(order)


def _random_ranks(ids: Tensor, seed: int) -> Tensor:
    """A pseudo-random order of ids that does not depend on where they stand."""
    ranks = np.argsort(np.argsort(priorities(ids.cpu().numpy(), seed)))
    return torch.from_numpy(ranks).to(ids.device)


# ---- how many ----------------------------------------------------------------------------------------------------


def _first(order: Tensor, labels: Tensor, share: int | Tensor) -> Tensor:
    """The first ``share`` of an order, or the first ``share[c]`` of each class c."""
    if isinstance(share, int):
        return order[:share]
    of = labels[order]
    keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    for c in share.nonzero().flatten().tolist():
        keep[(of == c).nonzero().flatten()[: int(share[c])]] = True
    return order[keep]


def _share(total: int | Tensor, part: int, parts: int, *, early: bool = False) -> int | Tensor:
    """One of several nearly equal whole parts; ``early`` where the larger ones come first."""
    if early:
        return -(-total * (part + 1) // parts) + (-total * part // parts)
    return total * (part + 1) // parts - total * part // parts


def _count(labels: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels.cpu(), minlength=classes)


def _deal(n: int, available: Tensor) -> Tensor:
    """n dealt out to the classes one by one, as far as each has any."""
    given, limits = [0] * len(available), available.tolist()
    while n > 0:
        open_ = [c for c, limit in enumerate(limits) if given[c] < limit]
        for c in open_[:n]:
            given[c] += 1
        n -= min(n, len(open_))
    return torch.tensor(given)


def _level(n: int, holds: Tensor, added: Tensor) -> Tensor:
    """n taken one by one from the class that will have the most centers."""
    counts = (holds + added).tolist()
    left, taken = holds.tolist(), [0] * len(holds)
    for _ in range(n):
        c = max((c for c in range(len(left)) if left[c]), key=lambda c: (counts[c], c))
        counts[c] -= 1
        left[c] -= 1
        taken[c] += 1
    return torch.tensor(taken)


@final
class _Labels:
    """Labels of the centers at a moment."""

    def __init__(self, head: KernelVoteHead) -> None:
        self.memory = head.memory
        held = len(self.memory)
        self.ids = self.memory.ids[:held].clone()
        self.values = self.memory.values_at(torch.arange(held, device=self.ids.device))

    def moved(self) -> float:
        """Label mass that moved since, over the centers that are still there."""
        rows = self.memory.rows_of(self.ids)
        now = self.memory.values_at(rows)[rows >= 0]
        was = F.pad(self.values, (0, now.shape[1] - self.values.shape[1]))[rows >= 0]
        return float((now - was).abs().sum()) / 2
