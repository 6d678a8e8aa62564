"""The samples a head decides by: keys, labels and ids, added and dropped at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._coded_rows import QUANTIZER, CodedRows
from ._lasting import lasting
from ._rows import NEXT_ID, ColumnWidth
from .errors import CheckpointError, ShapeError
from .quantize import ProductQuantizer

__all__ = ["ColumnWidth", "Memory"]


class Memory(CodedRows):
    """Rows of (key, label, id), packed at the front of buffers that grow by doubling.

    Rows are positions and change when others are dropped (the last row moves into the hole); ids are for good. The
    label a sample was given is kept for ever in ``labels``. A row that was relabelled has a soft label beside it,
    stored only for such rows, so that many classes cost nothing until labels are redistributed.

    Everything is a buffer: nothing here is a parameter, a state dict holds the filled rows only and loads into a memory
    of any size.

    With a ``coding`` keys are kept as codes of a few bytes (`Coder`) and are read through `keys_at`, decoded. Between
    `expand` and `compress`, and below 16 samples, they are kept as they are.

    Args:
        dim: width d of the keys.
        num_classes: number of classes C; `widen` raises it.
        columns: further numbers kept with each row, by name, for instance ``{"log_weight": 0}``.
        coding: how keys are compressed; None: not at all.

    Attributes:
        keys: (capacity, d) float buffer; rows from ``len(memory)`` on are zero. (0, d) while keys are codes.
        codes: (capacity, bytes) uint8 buffer of a memory with a ``coding``; (0, 0) while keys are as they are.
        coder: what makes the codes; None without a ``coding``.
        labels: (capacity,) int64, the label given.
        ids: (capacity,) int64.
        active: (capacity,) bool, True for the rows that hold a sample; not saved, it is the first ``len(memory)``.
    """

    # ---- writing -------------------------------------------------------------------------------------------------

    @lasting
    def add(self, keys: Tensor, labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Add samples; an id that is already held, or stands twice, has its row replaced (the last one counts).

        Args:
            keys: (n, d) embeddings, finite; cast to the memory's dtype and device.
            labels: (n,) int64 class of each, 0 or more; a new class widens the memory. (n, C) gives soft labels, the
                largest of which becomes the label kept.
            ids: (n,) int64, 0 or more; by default new ones above every id there ever was, saved and loaded or not.

        Returns:
            (n,) the ids.

        Raises:
            ShapeError: a wrong size, a NaN, a negative label or id. Nothing is changed then.
        """
        keys, labels, soft = self._checked(keys, labels)
        if ids is None:
            ids = torch.arange(self._next_id, self._next_id + len(keys), device=self.ids.device)
        else:
            ids = ids.to(self.ids.device)
            if ids.shape != (len(keys),) or ids.dtype != torch.long:
                raise ShapeError(
                    f"memory: ids must be int64 of shape ({len(keys)},), got {ids.dtype} {tuple(ids.shape)}"
                )
            if len(ids) and int(ids.min()) < 0:
                raise ShapeError(f"memory: ids must be 0 or more, got {int(ids.min())}")
        if not len(ids):
            return ids
        given = ids
        # The last of equal ids counts, whatever order an indexed write would take them in.
        unique, place = ids.unique(return_inverse=True)
        if len(unique) < len(ids):
            last = torch.zeros_like(unique).scatter_reduce_(
                0, place, torch.arange(len(ids), device=ids.device), "amax", include_self=False
            )
            last = last.sort().values
            keys, labels, ids = keys[last], labels[last], ids[last]
            soft = soft[last] if soft is not None else None
        self.widen(soft.shape[1] if soft is not None else int(labels.max()) + 1)
        rows = self.rows_of(ids)
        new = rows < 0
        count = int(new.sum())
        if count:
            self._grow(self._count + count)
            rows = rows.clone()
            rows[new] = torch.arange(self._count, self._count + count, device=rows.device)
        self.labels[rows] = labels
        self.ids[rows] = ids
        self._put(rows, keys)
        self._forget_soft(rows)
        for name in self.columns:
            self.column(name)[rows] = 0
        if count:  # last: a row counts once all of it is there
            self._count += count
            self.active[rows] = True
            self._moved()
        self.touch(rows)
        self._next_id = max(self._next_id, int(ids.max()) + 1)
        if soft is not None:
            self.relabel(ids, F.pad(soft, (0, self.num_classes - soft.shape[1])))
        self._tend()
        return given

    @lasting
    def write(self, rows: Tensor, keys: Tensor) -> None:
        """Overwrite the keys of rows (n,) with (n, d) values; labels stay. For training loops: nothing is checked."""
        self._put(rows, keys.to(self.keys.dtype))
        self.touch(rows)
        self._tend()

    @lasting
    def drop(self, ids: Tensor, *, reuse_ids: bool = False) -> None:
        """Forget samples. Their rows are overwritten and the space behind the last row is zeroed.

        Args:
            ids: (n,) int64; an id given twice counts once.
            reuse_ids: whether these ids, the last given, may be given again: of samples that were held for a trial.

        Raises:
            ShapeError: an id is not held; it is named and nothing is changed.
        """
        rows = self._known_rows(ids.to(self.ids.device).unique())
        if not len(rows):
            return
        if self.coder is not None:
            self.coder.forget(ids)
        self._forget_soft(rows)
        keep = self._count - len(rows)
        dropped = torch.zeros(self._count, dtype=torch.bool, device=rows.device)
        dropped[rows] = True
        holes = dropped[:keep].nonzero().squeeze(1)
        movers = (~dropped[keep:]).nonzero().squeeze(1) + keep
        for name in self._row_buffers():
            buffer = self.get_buffer(name)
            buffer[holes] = buffer[movers]
            buffer[keep : self._count] = -1 if name == "soft_row" else 0
        self.active[keep : self._count] = False
        self.touch(torch.cat([holes, torch.arange(keep, self._count, device=rows.device)]))
        self._count = keep
        if reuse_ids:
            above_held = int(self.ids[: self._count].max()) + 1 if self._count else 0
            self._next_id = max(above_held, min(self._next_id, int(ids.min())))
        self._moved()

    @lasting
    def relabel(self, ids: Tensor, values: Tensor) -> None:
        """Give samples a soft label: ids (n,), values (n, C) distributions. The label first given is kept beside it.

        Raises:
            ShapeError: an id is not held, or a row is no distribution; nothing is changed then.
        """
        values = values.to(self.soft)
        rows = self._known_rows(ids.to(self.ids.device))
        if values.shape != (len(rows), self.num_classes):
            raise ShapeError(
                f"memory: soft labels must be ({len(rows)}, {self.num_classes}), got {tuple(values.shape)}"
            )
        self._check_soft(values)
        at = self.soft_row[rows]
        new = at < 0
        if bool(new.any()):
            at = at.clone()
            at[new] = torch.arange(len(self.soft), len(self.soft) + int(new.sum()), device=at.device)
            self.soft = torch.cat([self.soft, self.soft.new_zeros(int(new.sum()), self.num_classes)])
            self.soft_row[rows] = at
        self.soft[at] = values

    @lasting
    def clear(self) -> None:
        """Forget every sample, and codebooks, and release the space."""
        for name in [*self._row_buffers(), "active", "soft"]:
            buffer = self.get_buffer(name)
            setattr(self, name, buffer.new_zeros(0, *buffer.shape[1:]))
        if self.coder is not None:
            self.codes = self.codes.new_zeros(0, 0)
            self.coder.reset()
        self._count = 0
        self._moved()
        self._changed = None

    @lasting
    def widen(self, num_classes: int) -> None:
        """Make room for more classes; soft labels and per-class columns get zeros for the new ones."""
        more = num_classes - self.num_classes
        if more <= 0:
            return
        self.num_classes = num_classes
        self.soft = F.pad(self.soft, (0, more))
        for name, width in self.columns.items():
            if width == "classes":
                setattr(self, f"column_{name}", F.pad(self.column(name), (0, more)))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _checked(self, keys: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if keys.dim() != 2 or keys.shape[1] != self.dim:
            raise ShapeError(f"memory: keys must be (n, {self.dim}), got {tuple(keys.shape)}")
        keys = keys.detach().to(self.keys)
        if not bool(torch.isfinite(keys).all()):
            raise ShapeError("memory: keys hold NaN or infinity; check the backbone's output")
        labels = labels.detach().to(self.labels.device)
        soft = None
        if labels.dim() == 2:
            soft, labels = labels, labels.argmax(-1)
            self._check_soft(soft)
        if labels.shape != (len(keys),) or labels.is_floating_point():
            raise ShapeError(
                f"memory: labels must be integers of shape ({len(keys)},), got {labels.dtype} {tuple(labels.shape)}"
            )
        labels = labels.long()
        if len(labels) and int(labels.min()) < 0:
            raise ShapeError(f"memory: labels must be 0 or more, got {int(labels.min())}")
        return keys, labels, soft

    def _check_soft(self, values: Tensor) -> None:
        if not bool((values >= -1e-4).all()) or not bool(((values.sum(-1) - 1).abs() < 1e-3).all()):
            raise ShapeError("memory: each soft label must be 0 or more and sum to one")

    # ---- state ---------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._expanded:
            self.compress()  # in the middle of a refresh: keys that are to be codes are never saved as they are
        for name, tensor in self._filled().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    @lasting
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        missing = [name for name in self._saved_names() if name not in saved]
        if missing:
            missing_keys.extend(prefix + name for name in missing)
            return
        try:
            incoming = self._incoming(saved)
        except CheckpointError as error:
            error_msgs.append(f"memory: {error}")
            return
        self.widen(incoming["soft"].shape[1])
        more = self.num_classes - incoming["soft"].shape[1]
        for name in ["soft", *(f"column_{column}" for column, width in self.columns.items() if width == "classes")]:
            incoming[name] = F.pad(incoming[name], (0, more))
        for name, tensor in incoming.items():
            setattr(self, name, tensor.detach().to(self.get_buffer(name), copy=True))
        self._count, self._expanded = len(self.labels), False
        self._came = []
        if self.coder is not None:
            self.coder.load_state(
                {name: tensor.detach().clone() for name, tensor in _quantizer(saved).items()}, self.keys.device
            )
            if "codes" not in incoming:
                self.codes = self.codes.new_zeros(0, 0)
        self.active = torch.ones(self._count, dtype=torch.bool, device=self.keys.device)
        # Older files do not have it; then ids above those held may be those of samples that were dropped.
        counted = state_dict.get(prefix + NEXT_ID, self.ids.new_zeros(()))
        self._next_id = max(self._next_id, int(counted.max()), int(self.ids.max()) + 1 if self._count else 0)
        self._moved()
        self._changed = None
        if self.coder is not None and not self.coded:
            self.compress()  # saved by a memory without a coding
        known = {*self._saved_names(), NEXT_ID, "codes"}
        unexpected_keys.extend(
            prefix + name for name in saved if strict and name not in known and not name.startswith(QUANTIZER)
        )

    def _saved_names(self) -> list[str]:
        """What a state dict of any memory with these columns has."""
        return ["keys", "labels", "ids", "soft_row", *(f"column_{name}" for name in self.columns), "soft"]

    def _incoming(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors for the buffers; keys are decoded where this memory keeps none as codes.

        Raises:
            CheckpointError: they are of another width, or do not fit together.
        """
        incoming = {name: saved[name] for name in self._saved_names()}
        coded = "codes" in saved and saved["codes"].shape[1:] != (0,)
        keys = "keys"
        if coded and self.coder is None:
            incoming["keys"] = ProductQuantizer.from_state(_quantizer(saved)).decode(saved["codes"])
        elif coded:
            incoming["codes"], keys = saved["codes"], "codes"
        if incoming["keys"].shape[1:] != self.keys.shape[1:]:
            raise CheckpointError(f"saved keys are {incoming['keys'].shape[1]} wide, this memory takes {self.dim}")
        rows = {name: len(incoming[name]) for name in [keys, *self._saved_names()[1:-1]]}
        places = incoming["soft_row"]
        if len(set(rows.values())) > 1 or (len(places) and int(places.max()) >= len(incoming["soft"])):
            raise CheckpointError(f"the saved tensors do not fit together, they have these rows: {rows}")
        return incoming


def _quantizer(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codebooks among saved tensors."""
    return {name.removeprefix(QUANTIZER): saved[name] for name in saved if name.startswith(QUANTIZER)}
