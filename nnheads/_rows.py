"""Rows of samples in buffers that grow: where a sample's row is, what it is labelled, and which rows changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ShapeError

#: Width of an extra column: 0 for one number a row, n for a vector of n, "classes" for one number a class.
ColumnWidth = int | Literal["classes"]

NEXT_ID = "next_id"
"""In a state dict: the id that a new sample gets, so that no id of one that was dropped is given again."""


class Rows(nn.Module):
    """The buffers of a `nnheads.memory.Memory`, packed at the front, and what is read from them.

    Args:
        dim: width d of the keys.
        num_classes: number of classes C.
        columns: further numbers kept with each row, by name.
    """

    keys: Tensor
    active: Tensor
    labels: Tensor
    ids: Tensor
    soft_row: Tensor
    soft: Tensor

    def __init__(self, dim: int, num_classes: int, columns: Mapping[str, ColumnWidth] | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.num_classes = num_classes
        self.columns: dict[str, ColumnWidth] = dict(columns or {})
        self.register_buffer("keys", torch.zeros(0, dim))
        self.register_buffer("active", torch.zeros(0, dtype=torch.bool), persistent=False)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long))
        self.register_buffer("ids", torch.zeros(0, dtype=torch.long))
        # Row of `soft` that holds the soft label of a row; -1 where the label is the one given.
        self.register_buffer("soft_row", torch.zeros(0, dtype=torch.long))
        self.register_buffer("soft", torch.zeros(0, num_classes))
        for name, width in self.columns.items():
            self.register_buffer(f"column_{name}", torch.zeros(0, *self._column_shape(width)))
        self._count = 0
        self._next_id = 0
        self._sorted: tuple[Tensor, Tensor] | None = None  # ids in order and their rows
        self._changed: list[Tensor] | None = None  # rows changed since taken; None: all of them
        #: Identity of the keys of which `keys` is a longer copy, since `take_changes`; None where it is no such copy.
        self.grown_from: int | None = None
        #: Goes up whenever rows move, enter or leave; a row number is meaningful while it stays the same.
        self.layout = 0

    # ---- reading -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of samples held."""
        return self._count

    @property
    def capacity(self) -> int:
        """Rows the buffers have room for before they grow."""
        return self.labels.shape[0]

    @property
    def bytes(self) -> int:
        """Bytes of the rows held: keys or codes and codebooks, labels, ids, soft labels and columns; what a state dict
        holds."""
        return sum(t.numel() * t.element_size() for t in self._filled().values())

    def column(self, name: str) -> Tensor:
        """The (capacity, ...) buffer of an extra column, to be read or written by row."""
        return self.get_buffer(f"column_{name}")

    def rows_of(self, ids: Tensor) -> Tensor:
        """Row of each id, any shape, int64; -1 where the id is not held."""
        if self._count == 0:
            return torch.full_like(ids, -1)
        if self._sorted is None or self._sorted[0].device != self.ids.device:
            order = self.ids[: self._count].argsort()
            self._sorted = (self.ids[order], order)
        known, rows = self._sorted
        ids = ids.to(known.device).contiguous()
        at = torch.searchsorted(known, ids).clamp_max(self._count - 1)
        return torch.where(known[at] == ids, rows[at], -1)

    def values_at(self, rows: Tensor) -> Tensor:
        """Label of each row as a distribution over the classes: (...,) int64 -> (..., C). Row -1 gives zeros."""
        if not self.capacity:
            return self.keys.new_zeros(*rows.shape, self.num_classes)
        safe = rows.clamp_min(0)
        values = F.one_hot(self.labels[safe], self.num_classes).to(self.keys.dtype)
        if len(self.soft):
            at = self.soft_row[safe]
            values = torch.where((at >= 0).unsqueeze(-1), self.soft[at.clamp_min(0)], values)
        return values * (rows >= 0).unsqueeze(-1)

    def share_of(self, rows: Tensor, weights: Tensor) -> Tensor:
        """What each class has of the weights (B, k) of rows (B, k), as (B, C); row -1 gives nothing to any."""
        if len(self.soft):
            return torch.einsum("bk,bkc->bc", weights, self.values_at(rows).to(weights.dtype))
        share = weights.new_zeros(len(rows), self.num_classes)
        return share.scatter_add_(1, self.labels[rows.clamp_min(0)], weights * (rows >= 0))

    # ---- changes -------------------------------------------------------------------------------------------------

    def take_changes(self) -> Tensor | None:
        """Rows whose key changed, or that entered or left, since the last call; None stands for all of them."""
        changed, self._changed, self.grown_from = self._changed, [], None
        if changed is None:
            return None
        return torch.cat(changed).unique() if changed else self.labels.new_zeros(0)

    def touch(self, rows: Tensor) -> None:
        """Say that the keys of rows (n,) were changed in place, so that an index follows."""
        if self._changed is not None:
            self._changed.append(rows)

    def _moved(self) -> None:
        self._sorted = None
        self.layout += 1

    def _grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        capacity = max(needed, 2 * self.capacity)
        if self.grown_from is None:
            self.grown_from = id(self.keys)
        for name in self._row_buffers():
            old = self.get_buffer(name)
            new = old.new_full((capacity, *old.shape[1:]), -1 if name == "soft_row" else 0)
            new[: self._count] = old[: self._count]
            setattr(self, name, new)
        self.active = torch.arange(capacity, device=self.keys.device) < self._count

    def _forget_soft(self, rows: Tensor) -> None:
        if not len(self.soft):
            return
        self.soft_row[rows] = -1
        held = self.soft_row[: self._count]
        used = held >= 0
        self.soft = self.soft[held[used]]  # only what is still referred to stays, so that nothing dropped is saved
        held[used] = torch.arange(int(used.sum()), device=held.device)

    def _known_rows(self, ids: Tensor) -> Tensor:
        rows = self.rows_of(ids)
        missing = ids[rows < 0]
        if len(missing):
            named = ", ".join(str(int(i)) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ShapeError(f"memory: no sample with id {named} among the {self._count} held")
        return rows

    # ---- the buffers ---------------------------------------------------------------------------------------------

    def _column_shape(self, width: ColumnWidth) -> tuple[int, ...]:
        if width == "classes":
            return (self.num_classes,)
        return (width,) if width else ()

    def _row_buffers(self) -> list[str]:
        """Names of the buffers that hold something for each row, that of the keys first."""
        return ["keys", "labels", "ids", "soft_row", *(f"column_{name}" for name in self.columns)]

    def _filled(self) -> dict[str, Tensor]:
        """What a state dict holds, by name: the rows that hold a sample, the soft labels, and the next id."""
        filled = {name: self.get_buffer(name)[: self._count] for name in self._row_buffers()}
        return {**filled, "soft": self.soft, NEXT_ID: torch.tensor(self._next_id)}
