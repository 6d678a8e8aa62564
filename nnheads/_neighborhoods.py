"""The nearest neighbours of centers that come and go one at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_SPARE = 2  # a list is longer than k by k over this, so that few need a search when a neighbour goes
_ROUNDING = 1e-4  # of squared distances by a matrix product, relative to squared norms
_BLOCK = 2**23  # numbers in the differences of a block of centers and their neighbours


class Neighborhoods:
    """For each center that is present, the nearest ones that are, itself included as for a query at that place.

    A list begins with the k nearest and may go on; whatever its length, it leaves out none that is nearer than its
    last. One that has become shorter than k is searched anew.

    Args:
        keys: (n, d) keys of all centers, those to come included.
        k: neighbours wanted.
        present: (n,) bool, which are there from the start.
    """

    def __init__(self, keys: Tensor, k: int, present: Tensor) -> None:
        self.keys = keys
        self.k = k
        self.present = present
        self._count = int(present.sum())
        length = max(1, min(k + k // _SPARE, len(keys)))
        self._rows = torch.full((len(keys), length), -1, dtype=torch.long, device=keys.device)
        self._sq = keys.new_full((len(keys), length), torch.inf)
        self._last = keys.new_full((len(keys),), -torch.inf)  # squared distance of the last in each list
        self._norms = keys.square().sum(1)
        self._search(present.nonzero().flatten())

    def of(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (m, k) of the k nearest of points (m,), -1 for none, and squared distances (m, k), then infinite."""
        return self._rows[points, : self.k], self._sq[points, : self.k]

    def holding(self, row: int) -> Tensor:
        """(m,) points among whose k nearest a center is, without itself."""
        points = self._listing(row)
        points = points[(self._rows[points, : self.k] == row).any(1)]
        return points[points != row]

    def reach(self, row: int) -> tuple[Tensor, Tensor]:
        """(m,) points among whose k nearest a center that is not there yet will be, and its squared distances."""
        near = self._distances(row)
        farthest = self._sq[:, self.k - 1] if self.k <= self._sq.shape[1] else torch.full_like(near, torch.inf)
        points = (self.present & (near < farthest)).nonzero().flatten()
        return points, near[points]

    def remove(self, row: int) -> None:
        """A center goes; nothing where it has gone before."""
        if not bool(self.present[row]):
            return
        self.present[row] = False
        self._count -= 1
        points = self._listing(row)
        points = points[points != row]
        self._rows[row], self._sq[row], self._last[row] = -1, torch.inf, -torch.inf
        if not len(points):
            return
        rows, sq = self._rows[points], self._sq[points]
        order = (rows == row).to(torch.int8).argsort(dim=1, stable=True)  # to the end with it, the others as they are
        rows, sq = rows.gather(1, order), sq.gather(1, order)
        rows[:, -1], sq[:, -1] = -1, torch.inf
        self._put(points, rows, sq)
        needed = min(self.k, self._count)
        if needed:
            self._search(points[rows[:, needed - 1] < 0])

    def insert(self, row: int) -> None:
        """A center comes."""
        near = self._distances(row)
        complete = self._rows[:, min(self._count, self._rows.shape[1]) - 1] >= 0 if self._count else self.present
        complete = complete & (self._count <= self._rows.shape[1])
        points = (self.present & (complete | (near < self._last))).nonzero().flatten()
        self.present[row] = True
        self._count += 1
        rows = torch.cat([self._rows[points], points.new_full((len(points), 1), row)], 1)
        sq, order = torch.cat([self._sq[points], near[points].unsqueeze(1)], 1).sort(dim=1, stable=True)
        length = self._rows.shape[1]
        self._put(points, rows.gather(1, order)[:, :length], sq[:, :length])
        self._search(points.new_tensor([row]))

    def _distances(self, row: int) -> Tensor:
        """(n,) squared distances of all centers to one."""
        return (self.keys - self.keys[row]).square().sum(1)

    def _listing(self, row: int) -> Tensor:
        """(m,) points in whose list a center is, itself included; looked for where lists reach as far."""
        near = self._norms - 2 * (self.keys @ self.keys[row]) + self._norms[row]
        points = (near <= self._last + _ROUNDING * (self._norms + self._norms[row])).nonzero().flatten()
        return points[(self._rows[points] == row).any(1)]

    def _put(self, points: Tensor, rows: Tensor, sq: Tensor) -> None:
        self._rows[points], self._sq[points] = rows, sq
        self._last[points] = sq.masked_fill(rows < 0, -torch.inf).amax(1)

    def _search(self, points: Tensor) -> None:
        here = self.present.nonzero().flatten()
        count = min(self._rows.shape[1], len(here))
        for part in points.split(max(1, _BLOCK // max(1, count * self.keys.shape[1]))):
            nearest = here[torch.cdist(self.keys[part], self.keys[here]).topk(count, dim=1, largest=False).indices]
            # The distances of a matrix product are too rough for kernels.
            sq = (self.keys[part].unsqueeze(1) - self.keys[nearest]).square().sum(-1)
            sq, order = sq.sort(dim=1, stable=True)
            missing = self._rows.shape[1] - count
            rows = pad(nearest.gather(1, order), (0, missing), value=-1)
            self._put(part, rows, pad(sq, (0, missing), value=torch.inf))
