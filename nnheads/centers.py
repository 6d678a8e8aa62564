"""Adding and dropping centers with their labels redistributed by influence (review, section 4 and Algorithm 1).

When a center enters or leaves, the predictions around it change. The review moves the labels of the centers nearby so
as to compensate. How much each form of that compensation is worth is measured in ``benchmarks/README.md``.

All of it is done on a working copy of the centers and applied to the head at the end, so that an error changes nothing.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from nnheads._neighborhoods import Neighborhoods
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
    centers = CenterSet(kernel_head(head), redistribute, ridge)
    rows = centers.rows_of(ids)
    for row in rows.tolist():
        centers.drop(row)
    centers.apply_labels()
    kernel_head(head).memory.drop(ids)


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

    Raises:
        ConfigError: another kind of head or form.
        ShapeError: an id is held, or as `MemoryHead.add` says. No center is added, and no label moved, after any error.
    """
    voting = kernel_head(head)
    memory = voting.memory
    if ids is not None and bool((memory.rows_of(ids) >= 0).any()):
        raise ShapeError("add_centers: an id is held already; drop it first or leave ids out")
    _check_form(redistribute, ridge)
    before = len(memory)
    held = voting.add(z, y, ids)
    if redistribute == "none":
        return held
    try:
        centers = CenterSet(voting, redistribute, ridge, present=before)
        for row in range(before, len(memory)):
            centers.add(row)
        centers.apply_labels()
    except BaseException:
        memory.drop(held, reuse_ids=True)
        raise
    return held


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
        _check_form(redistribute, ridge)
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
        here = torch.arange(held, device=self.keys.device) < (held if present is None else present)
        self.near = None if redistribute == "none" else Neighborhoods(self.keys, self.k, here)
        self.present = here if self.near is None else self.near.present
        self.changed = torch.zeros(held, dtype=torch.bool, device=self.keys.device)

    def rows_of(self, ids: Tensor) -> Tensor:
        """Rows of ids; ShapeError names one that is not held."""
        rows = self.memory.rows_of(ids)
        if bool((rows < 0).any()):
            raise ShapeError(f"drop_centers: no center with id {int(ids[rows < 0][0])} is held")
        return rows

    def drop(self, row: int) -> None:
        """Take a center out and redistribute its label."""
        if self.near is None:
            self.present[row] = False
            return
        points = self.near.holding(row)
        weights, before = self._predict(points)
        share = (weights * (self.near.of(points)[0] == row)).sum(1)
        y0 = self.labels[row].clone()
        self.near.remove(row)
        if self.redistribute == "influence":
            change = -influence(share, torch.ones_like(share), y0, before)
        else:
            change = self._predict(points)[1] - before
        self._compensate(points, change)

    def add(self, row: int) -> None:
        """Let a center in and redistribute the labels around it; its own stays."""
        if self.near is None:
            self.present[row] = True
            return
        points, sq = self.near.reach(row)
        _, before = self._predict(points)
        total = self._kernel_sum(points)
        self.near.insert(row)
        if self.redistribute == "influence":
            ratio = (self._log_kernel(sq) + self.log_w[row] - total).exp()
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
        neighbors, _ = self._nearest(points)
        movable = neighbors >= 0
        if fixed is not None:
            movable &= neighbors != fixed
        rows, column = neighbors[movable].unique(return_inverse=True)
        w = weights.new_zeros(len(points), len(rows))
        point = torch.arange(len(points), device=w.device).unsqueeze(1).expand_as(neighbors)[movable]
        w[point, column] = weights[movable]
        gram = w @ w.T + self.ridge * torch.eye(len(points), dtype=w.dtype, device=w.device)
        if self.ridge:
            return rows, -w.T @ torch.linalg.solve(gram, change)
        return rows, -w.T @ torch.linalg.pinv(gram, hermitian=True) @ change  # the smallest of the solutions

    def _log_kernel(self, sq_distances: Tensor) -> Tensor:
        scaled: Tensor = sq_distances / (-2 * self.sigma * self.sigma)
        return scaled

    def _nearest(self, points: Tensor) -> tuple[Tensor, Tensor]:
        assert self.near is not None, "labels stay as they are"
        return self.near.of(points)

    def _scores(self, points: Tensor) -> Tensor:
        rows, sq = self._nearest(points)
        return (self._log_kernel(sq) + self.log_w[rows.clamp_min(0)]).masked_fill(rows < 0, float("-inf"))

    def _kernel_sum(self, points: Tensor) -> Tensor:
        """(n,) logarithm of S, the sum of the kernels at each point."""
        return self._scores(points).logsumexp(1)

    def _predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (n, k) of the neighbours at each point and the predictions (n, C) there."""
        weights = self._scores(points).softmax(1)
        return weights, torch.einsum("nk,nkc->nc", weights, self.labels[self._nearest(points)[0].clamp_min(0)])


def _check_form(redistribute: str, ridge: float) -> None:
    if redistribute not in get_args(Redistribution):
        raise ConfigError(f"redistribute must be one of {', '.join(get_args(Redistribution))}, got {redistribute!r}")
    if not 0 <= ridge < math.inf:
        raise ConfigError(f"ridge must be 0 or more, got {ridge}")


def kernel_head(head: Head) -> KernelVoteHead:
    """The head as one that votes with Gaussian kernels.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(head, KernelVoteHead):
        raise ConfigError(f"head {head.name!r} does not vote with Gaussian kernels: use 'impostor' or 'nngk'")
    return head
