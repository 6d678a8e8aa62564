"""Approximate search: FAISS finds candidates, torch ranks them exactly; rows come and go without a rebuild."""

from __future__ import annotations

import logging
import math
import time
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from nnheads._ann import KINDS, Candidates
from nnheads._exact import l1_nearest, products_at, products_nearest
from nnheads._faiss import faiss_available
from nnheads._index_base import Index, Metric, is_single
from nnheads._lasting import lasting
from nnheads.errors import ConfigError, unknown_name

_FEW: Final = 5_000  # rows below which exact search is as fast
_PROBES: Final = 256  # stored rows with which the effort is chosen
_WAITING: Final = 4_096  # changed rows that are searched one by one before they enter the index
_DEAD: Final = 0.3  # share of slots whose row has gone or changed from which all is built anew

_log = logging.getLogger(__name__)

Effort = tuple[int, float]
Kind = Literal["ivf", "hnsw", "pq"]


@final
class ApproximateIndex(Index):
    """Nearly the nearest rows, ranked by their exact distances.

    Changed rows are marked, and found exactly among themselves until they enter the index, some thousand at once; rows
    that left are marked, more candidates are fetched in their stead, and all is built anew, at the next search, when
    they are many. Keys on another device than the CPU, L1 distances, and few rows are searched exactly.

    Args:
        metric: ``"l2"`` or ``"cosine"``; ``"l1"`` is searched exactly.
        kind: ``"ivf"``, ``"hnsw"`` or ``"pq"``.
        recall: share of the exact neighbours to find. The effort is the one that takes least time among those with
            which stored rows, taken as queries, find as many; it is chosen at each build.

    Attributes:
        effort: lists or graph nodes visited, and candidates ranked for each neighbour asked (``"pq"`` alone). Setting
            it ends the choice by recall; None begins it again, at the next build.

    Raises:
        UnknownNameError: a kind or a metric that is none of these.
        ConfigError: ``recall`` outside (0, 1).
    """

    def __init__(self, metric: Metric = "l2", kind: Kind = "pq", *, recall: float = 0.95) -> None:
        super().__init__(metric)
        if kind not in KINDS:
            raise unknown_name("kind of approximate index", kind, KINDS)
        if not 0 < recall < 1:
            raise ConfigError(f"recall must be between 0 and 1, got {recall}")
        self.kind: Kind = kind
        self.recall = recall
        self.effort: Effort | None = None
        self._chosen: Effort = (1, 1.0)
        self._ann: Candidates | None = None
        self._row_of = torch.empty(0, dtype=torch.int64)  # slot -> row, -1 where the row has left or changed
        self._slot_of = torch.empty(0, dtype=torch.int64)  # row -> slot, -1 for none
        self._waiting = torch.empty(0, dtype=torch.int64)
        self._dead = 0
        self._whole = False  # whether slots are rows: no hidden ones between them, and none has changed

    def search(self, queries: Tensor, k: int) -> Tensor:
        """As :meth:`Index.search`."""
        ann = self._ann
        if ann is None or not self._whole or self.kind == "pq" or self.metric != "l2" or not 0 < k <= ann.count:
            return super().search(queries, k)
        # Nothing has changed: a single query of a graph takes as long as the checks would.
        rows = ann.nearest(queries, k, (self.effort or self._chosen)[0]) if is_single(queries, ann.width) else None
        return super().search(queries, k) if rows is None else rows

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        if not self._able():
            exact = l1_nearest if self.metric == "l1" else products_nearest
            return exact(queries, self._keys, self._offset, k)
        self._settle()
        return self._search(queries, k, self.effort or self._chosen)

    @property
    def efforts(self) -> list[Effort]:
        """All that `effort` may be, of an index that was searched once; the empty list before."""
        if self._ann is None:
            return []
        shares = (1.5, 3.0, 6.0, 12.0) if self.kind == "pq" else (1.0,)
        return [(visits, share) for visits in self._ann.efforts for share in shares]

    def _able(self) -> bool:
        keys = self._keys
        fits = keys.device.type == "cpu" and keys.dtype == torch.float32 and self.metric != "l1"
        return fits and self._findable >= _FEW and faiss_available()

    def _changed(self, rows: Tensor | None) -> None:
        super()._changed(rows)
        if rows is None:
            self._ann = None
        if self._ann is None or rows is None:
            return
        self._whole = False
        slots = self._slot_of[rows]
        self._row_of[slots[slots >= 0]] = -1
        self._dead += int((slots >= 0).sum())
        self._slot_of[rows] = -1
        waiting = torch.cat([self._waiting, rows]).unique()
        self._waiting = waiting[torch.isfinite(self._offset[waiting])]

    def _grown(self) -> None:
        more = len(self._offset) - len(self._slot_of)
        self._slot_of = torch.nn.functional.pad(self._slot_of, (0, more), value=-1)

    @lasting
    def _settle(self) -> None:
        """Bring the index up to date, as far as it is worth it."""
        if self._ann is not None and self._dead > _DEAD * self._ann.count:
            self._ann = None
        if self._ann is None:
            rows = torch.isfinite(self._offset).nonzero().flatten()
            self._ann = Candidates(self.kind, self._keys[rows])
            self._row_of, self._dead, self._whole = rows, 0, int(rows[-1]) == len(rows) - 1
            self._slot_of = torch.full((len(self._keys),), -1)
            self._slot_of[rows] = torch.arange(len(rows))
            self._waiting = rows[:0]
            if self.effort is None:
                self._chosen = self._tune(rows)
        elif len(self._waiting) > _WAITING:
            rows = self._waiting
            self._slot_of[rows] = torch.arange(self._ann.count, self._ann.count + len(rows))
            self._row_of = torch.cat([self._row_of, rows])
            self._ann.append(self._keys[rows])
            self._waiting = rows[:0]

    def _tune(self, rows: Tensor) -> Effort:
        """The effort that takes least time among those with which stored rows find enough of their neighbours."""
        assert self._ann is not None
        probes = self._keys[rows[torch.linspace(0, len(rows) - 1, _PROBES).long()]]
        exact = products_nearest(probes, self._keys, self._offset, 33)[:, 1:]
        wanted = self.recall + 0.3 * (1 - self.recall)  # queries are a little farther away than stored rows
        best, least, fastest = self.efforts[-1], 0.0, math.inf
        for effort in self.efforts:
            started = time.perf_counter()
            found = self._search(probes, 33, effort)[:, 1:]
            seconds = time.perf_counter() - started
            share = float((found.unsqueeze(2) == exact.unsqueeze(1)).any(1).double().mean())
            if share >= wanted and seconds < fastest:
                best, fastest = effort, seconds
            least = max(least, share)
            if seconds > 3 * fastest:
                break
        if fastest == math.inf:
            _log.info("%s finds %.3f of the neighbours at most, %.3f were asked for", self.kind, least, self.recall)
        return best

    def _search(self, queries: Tensor, k: int, effort: Effort) -> Tensor:
        assert self._ann is not None
        if self._whole and self.kind != "pq":  # FAISS ranked them by exact distances
            nearest = self._ann.search(queries.contiguous(), k, effort[0])
            if nearest.numpy().min() >= 0:
                return nearest
        alive = 1 - self._dead / max(1, self._ann.count)
        visits, share = effort
        count = k if self.kind != "pq" else round(share * (k + 8))
        count = min(self._ann.count, round(count / alive) + (8 if self._dead else 0))
        parts = []
        for some in queries.contiguous().split(max(1, 2**24 // max(count, len(self._waiting), 1))):
            slots = self._ann.search(some, count, visits)
            rows = torch.where(slots >= 0, self._row_of[slots.clamp_min(0)], -1)
            if len(self._waiting):
                rows = torch.cat([rows, self._waiting.expand(len(rows), -1)], 1)
            parts.append(self._ranked(some, rows, k))
        return torch.cat(parts)

    def _ranked(self, queries: Tensor, rows: Tensor, k: int) -> Tensor:
        """The k nearest of candidate rows (b, c); the exact ones where there are fewer than k candidates."""
        if not self._dead and self.kind != "pq" and not len(self._waiting) and bool((rows >= 0).all()):
            return rows[:, :k]  # FAISS ranked them by exact distances
        distances = self._offset[rows.clamp_min(0)] - 2 * products_at(queries, self._keys, rows)
        distances.masked_fill_(rows < 0, torch.inf)
        if distances.shape[1] < k:
            return products_nearest(queries, self._keys, self._offset, k)
        best = distances.topk(k, dim=1, largest=False)
        found = rows.gather(1, best.indices)
        short = torch.isinf(best.values[:, -1]).nonzero().flatten()
        if len(short):
            found[short] = products_nearest(queries[short], self._keys, self._offset, k)
        return found

    def __getstate__(self) -> dict[str, Any]:
        kept = ("metric", "kind", "recall", "effort")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        effort = state.pop("effort")
        self.__init__(**state)
        self.effort = effort
