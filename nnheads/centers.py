"""Adding and dropping centers with their labels redistributed by influence (review, section 4 and Algorithm 1).

When a center enters or leaves, the predictions around it change. The review moves the labels of the centers nearby so
as to compensate. How much each form of that compensation is worth is measured in ``benchmarks/README.md``.

All of it is done on a working copy of the centers and applied to the head at the end, so that an error changes nothing.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nnheads.errors import ConfigError, ShapeError
from nnheads.functional import influence, project_to_simplex
from nnheads.heads.base import Head
from nnheads.heads.kernel_vote import KernelVoteHead

Redistribution = Literal["none", "influence", "exact", "least-squares"]


def drop_centers(head: Head, ids: Tensor, redistribute: Redistribution = "none", ridge: float = 1.0) -> None:
    """Drop centers one after the other, each time redistributing its label over its neighbours.

    The affected points of a center z_0 are its reverse neighbours, the centers z_j with z_0 among their k nearest. With
    Delta_j the change of the prediction at z_j, the forms of redistribution are

    - ``"none"``;
    - ``"influence"``: ``y_j -= Delta_j`` with Delta_j from equation 13, to first order;
    - ``"exact"``: the same with Delta_j exact, from the predictions before and after, the neighbour taking the place
      of z_0 included;
    - ``"least-squares"``: label changes d of all centers near the affected points that minimize
      ``||W d + Delta||^2 + ridge ||d||^2``, with W their weights in the predictions there: a label moves predictions by
      its weight, which the other two leave out.

    Labels are projected onto the simplex after each change.

    Args:
        head: a head that votes with Gaussian kernels.
        ids: (n,) ids of the centers, in the order in which they go.
        redistribute: see above.
        ridge: weight of the size of the label changes, in units of squared probability; least squares only.

    Raises:
        ConfigError: another kind of head or form.
        ShapeError: an id is not held; nothing is changed then.
    """
    centers = CenterSet(_kernel_head(head), redistribute, ridge)
    rows = centers.rows_of(ids)
    for row in rows.tolist():
        centers.drop(row)
    centers.apply_labels()
    _kernel_head(head).memory.drop(ids)


def add_centers(
    head: Head,
    z: Tensor,
    y: Tensor,
    ids: Tensor | None = None,
    redistribute: Redistribution = "none",
    ridge: float = 1.0,
) -> Tensor:
    """Add centers one after the other, each time redistributing labels; see `drop_centers`.

    Args:
        head: a head that votes with Gaussian kernels.
        z: (n, d) embeddings.
        y: (n,) int64 labels.
        ids: (n,) ids, not held yet; new ones by default.
        redistribute: form of redistribution. The new center keeps its label.
        ridge: see `drop_centers`.

    Returns:
        (n,) ids of the new centers.
    """
    kernel_head = _kernel_head(head)
    memory = kernel_head.memory
    if ids is not None and bool((memory.rows_of(ids) >= 0).any()):
        raise ShapeError("add_centers: an id is held already; drop it first or leave ids out")
    before = len(memory)
    held = kernel_head.add(z, y, ids)
    if redistribute == "none":
        return held
    centers = CenterSet(kernel_head, redistribute, ridge, present=before)
    for row in range(before, len(memory)):
        centers.add(row)
    centers.apply_labels()
    return held


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
    memory = _kernel_head(head).memory
    held = len(memory)
    _at_most(n, held, "best_predicted")
    ids, labels = memory.ids[:held], memory.labels[:held]
    scores = log_probs_of(head, memory.all_keys(), labels, ids)
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
        head: a head that votes with Gaussian kernels; unchanged afterwards.
        z: (N, d) embeddings of the candidates.
        y: (N,) int64 labels.
        n: number to choose, at most N.
        ids: (N,) ids that the chosen would have as centers; needed only where a candidate may be held already.
        rounds: in how many steps.
        balanced: choose equally many of each class.

    Returns:
        (n,) int64 positions in ``z``, in the order in which they were chosen.
    """
    kernel_head = _kernel_head(head)
    _at_most(n, len(z), "worst_predicted")
    if rounds < 1:
        raise ConfigError(f"worst_predicted: rounds must be 1 or more, got {rounds}")
    chosen = torch.zeros(0, dtype=torch.long, device=z.device)
    added: list[Tensor] = []
    left = torch.ones(len(z), dtype=torch.bool, device=z.device)
    try:
        for part in _shares(n, min(rounds, max(n, 1))):
            candidates = left.nonzero().flatten()
            scores = log_probs_of(kernel_head, z[candidates], y[candidates], None if ids is None else ids[candidates])
            order = candidates[scores.argsort(stable=True)]
            picked = _balanced_first(order, y, chosen, part) if balanced else order[:part]
            chosen = torch.cat([chosen, picked])
            left[picked] = False
            if rounds > 1:
                added.append(kernel_head.add(z[picked], y[picked]))
    finally:
        if added:
            kernel_head.memory.drop(torch.cat(added))
    return chosen


class CenterSet:
    """Working copy of a head's centers: keys, labels and neighbours, changed one center at a time. For `drop_centers`.

    Args:
        head: the head.
        redistribute: form of redistribution.
        ridge: for least squares.
        present: how many rows count as present from the start; all by default.
    """

    def __init__(
        self, head: KernelVoteHead, redistribute: Redistribution, ridge: float, present: int | None = None
    ) -> None:
        if redistribute not in get_args(Redistribution):
            raise ConfigError(
                f"redistribute must be one of {', '.join(get_args(Redistribution))}, got {redistribute!r}"
            )
        if ridge < 0:
            raise ConfigError(f"ridge must be 0 or more, got {ridge}")
        memory = head.memory
        held = len(memory)
        self.memory = memory
        self.redistribute = redistribute
        self.ridge = ridge
        self.k = head.k
        self.keys = memory.all_keys()
        self.labels = memory.values_at(torch.arange(held, device=self.keys.device))
        self.sigma = head.width().detach()
        log_w = head.log_weights_of_rows(torch.arange(held, device=self.keys.device))
        self.log_w = self.keys.new_zeros(held) if log_w is None else log_w
        self.present = torch.arange(held, device=self.keys.device) < (held if present is None else present)
        self.changed = torch.zeros(held, dtype=torch.bool, device=self.keys.device)
        # Neighbours of every center among the present ones, itself included as for a query at that place; -1 for none.
        self.neighbors = torch.full((held, self.k), -1, dtype=torch.long, device=self.keys.device)
        self.radius = self.keys.new_full((held,), float("inf"))  # distance beyond which a new center is no neighbour
        if redistribute != "none":
            self._search(self.present.nonzero().flatten())

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows of ids; ShapeError names one that is not held."""
        rows = self.memory.rows_of(ids)
        if bool((rows < 0).any()):
            raise ShapeError(f"drop_centers: no center with id {int(ids[rows < 0][0])} is held")
        return rows

    def drop(self, row: int) -> None:
        """Take a center out and redistribute its label."""
        if self.redistribute == "none":
            self.present[row] = False
            return
        affected = (self.neighbors == row).any(1) & self.present
        affected[row] = False
        points = affected.nonzero().flatten()
        weights, before = self._predict(points)
        share = (weights * (self.neighbors[points] == row)).sum(1)
        y0 = self.labels[row].clone()
        self.present[row] = False
        self._search(points)
        if self.redistribute == "influence":
            change = -influence(share, torch.ones_like(share), y0, before)
        else:
            change = self._predict(points)[1] - before
        self._compensate(points, change)

    def add(self, row: int) -> None:
        """Let a center in and redistribute the labels around it; its own stays."""
        near = (self.keys - self.keys[row]).square().sum(1)
        points = (self.present & (near < self.radius)).nonzero().flatten()
        _, before = self._predict(points)
        total = self._kernel_sum(points)
        self.present[row] = True
        self._search(torch.cat([points, points.new_tensor([row])]))
        if self.redistribute == "influence":
            ratio = (self._log_kernel(near[points]) + self.log_w[row] - total).exp()
            change = influence(ratio, torch.ones_like(ratio), self.labels[row], before)
        else:
            change = self._predict(points)[1] - before
        self._compensate(points, change, fixed=row)

    def apply_labels(self) -> None:
        """Give the head the labels that changed, of the centers that are still there."""
        rows = (self.changed & self.present).nonzero().flatten()
        if len(rows):
            self.memory.relabel(self.memory.ids[rows], self.labels[rows])

    def _compensate(self, points: Tensor, change: Tensor, fixed: int | None = None) -> None:
        if not len(points):
            return
        if self.redistribute == "least-squares":
            rows, shift = self._least_squares(points, change, fixed)
        else:
            rows, shift = points, -change
        self.labels[rows] = project_to_simplex(self.labels[rows] + shift)
        self.changed[rows] = True

    def _least_squares(self, points: Tensor, change: Tensor, fixed: int | None) -> tuple[Tensor, Tensor]:
        """Centers near the points and the ridge solution of ``W d = -change`` for their labels, in its dual form."""
        weights, _ = self._predict(points)
        neighbors = self.neighbors[points]
        movable = neighbors >= 0
        if fixed is not None:
            movable &= neighbors != fixed
        rows, column = neighbors[movable].unique(return_inverse=True)
        w = weights.new_zeros(len(points), len(rows))
        point = torch.arange(len(points), device=w.device).unsqueeze(1).expand_as(neighbors)[movable]
        w[point, column] = weights[movable]
        gram = w @ w.T + self.ridge * torch.eye(len(points), dtype=w.dtype, device=w.device)
        return rows, -w.T @ torch.linalg.solve(gram, change)

    def _log_kernel(self, sq_distances: Tensor) -> Tensor:
        scaled: Tensor = sq_distances / (-2 * self.sigma * self.sigma)
        return scaled

    def _scores(self, points: Tensor) -> Tensor:
        neighbors = self.neighbors[points]
        near = self.keys[neighbors.clamp_min(0)]
        scores = self._log_kernel((self.keys[points].unsqueeze(1) - near).square().sum(-1))
        return (scores + self.log_w[neighbors.clamp_min(0)]).masked_fill(neighbors < 0, float("-inf"))

    def _kernel_sum(self, points: Tensor) -> Tensor:
        """(n,) logarithm of S, the sum of the kernels at each point."""
        return self._scores(points).logsumexp(1)

    def _predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (n, k) of the neighbours at each point and the predictions (n, C) there."""
        weights = self._scores(points).softmax(1)
        return weights, torch.einsum("nk,nkc->nc", weights, self.labels[self.neighbors[points].clamp_min(0)])

    def _search(self, points: Tensor) -> None:
        """Find the neighbours of points (n,) among the centers that are present."""
        here = self.present.nonzero().flatten()
        k = min(self.k, len(here))
        for part in points.split(2048):
            sq = torch.cdist(self.keys[part], self.keys[here]).square()
            nearest = sq.topk(k, dim=1, largest=False)
            self.neighbors[part, :k] = here[nearest.indices]
            self.neighbors[part, k:] = -1
            full = nearest.values[:, -1] if k == self.k else torch.full_like(sq[:, 0], float("inf"))
            self.radius[part] = full


def _kernel_head(head: Head) -> KernelVoteHead:
    if not isinstance(head, KernelVoteHead):
        raise ConfigError(f"head {head.name!r} does not vote with Gaussian kernels: use 'impostor' or 'nngk'")
    return head


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
