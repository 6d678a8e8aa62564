"""The samples a head decides by: keys, labels and ids, added and dropped at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coding import MIN_ROWS, Coder, Coding
from .errors import ShapeError

#: Width of an extra column: 0 for one number a row, n for a vector of n, "classes" for one number a class.
ColumnWidth = int | Literal["classes"]

_QUANTIZER: Final = "quantizer_"  # what the names of the codebooks' tensors begin with in a state dict


class Memory(nn.Module):
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

    keys: Tensor
    codes: Tensor
    active: Tensor
    labels: Tensor
    ids: Tensor
    soft_row: Tensor
    soft: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        columns: Mapping[str, ColumnWidth] | None = None,
        coding: Coding | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_classes = num_classes
        self.columns: dict[str, ColumnWidth] = dict(columns or {})
        self.register_buffer("keys", torch.zeros(0, dim))
        self.coder = None if coding is None else Coder(coding, dim)
        if self.coder is not None:
            self.register_buffer("codes", torch.zeros(0, 0, dtype=torch.uint8))
        self._expanded = False  # until `compress`, rows are kept as they come
        self._came: list[Tensor] = []  # ids of those that came since
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

    @property
    def coded(self) -> bool:
        """Whether keys are kept as codes now."""
        return self.coder is not None and self.codes.shape[1] > 0

    @torch.no_grad()
    def keys_at(self, rows: Tensor) -> Tensor:
        """Keys of rows (...,) int64 as (..., d), decoded where they are codes. Row -1 gives any."""
        safe = rows.clamp_min(0)
        if self.coder is None or not self.coded:
            return self.keys[safe]
        return self.coder.decode(self.codes[safe]).to(self.keys.dtype)

    def keys_as_they_came(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids (n,) and keys (n, d) of at most ``count`` samples, of a memory with a coding: of those whose key came
        since `expand`, or else lately, and is known as it came, no decoded code. None after `compress`.
        """
        if self.coder is not None and self.coded:
            ids, keys = self.coder.recent()
            return ids[-count:], keys[-count:].to(self.keys.dtype)
        rows = self.rows_of(torch.cat([self.ids[:0], *self._came]).unique())
        rows = rows[rows >= 0]
        rows = rows[torch.linspace(0, max(0, len(rows) - 1), min(len(rows), count), device=rows.device).long()]
        return self.ids[rows], self.keys[rows]

    def all_keys(self) -> Tensor:
        """Keys (len, d) of all samples held, decoded where they are codes."""
        return self.keys_at(torch.arange(self._count, device=self.ids.device))

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

    def take_changes(self) -> Tensor | None:
        """Rows whose key changed, or that entered or left, since the last call; None stands for all of them."""
        changed, self._changed, self.grown_from = self._changed, [], None
        if changed is None:
            return None
        return torch.cat(changed).unique() if changed else self.labels.new_zeros(0)

    # ---- writing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, keys: Tensor, labels: Tensor, ids: Tensor | None = None) -> Tensor:
        """Add samples; an id that is already held, or stands twice, has its row replaced (the last one counts).

        Args:
            keys: (n, d) embeddings, finite; cast to the memory's dtype and device.
            labels: (n,) int64 class of each, 0 or more; a new class widens the memory. (n, C) gives soft labels, the
                largest of which becomes the label kept.
            ids: (n,) int64, 0 or more; new ones above every id seen so far by default.

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
            self._count += count
            self.active[rows] = True
            self._moved()
        self.labels[rows] = labels
        self.ids[rows] = ids
        self._put(rows, keys)
        self._forget_soft(rows)
        for name in self.columns:
            self.column(name)[rows] = 0
        self.touch(rows)
        self._next_id = max(self._next_id, int(ids.max()) + 1)
        if soft is not None:
            self.relabel(ids, F.pad(soft, (0, self.num_classes - soft.shape[1])))
        self._tend()
        return given

    @torch.no_grad()
    def write(self, rows: Tensor, keys: Tensor) -> None:
        """Overwrite the keys of rows (n,) with (n, d) values; labels stay. For training loops: nothing is checked."""
        self._put(rows, keys.to(self.keys.dtype))
        self.touch(rows)
        self._tend()

    @torch.no_grad()
    def expand(self) -> None:
        """Keep keys as they come until `compress`, as they are about to be written anew; nothing without a coding."""
        if self.coder is None:
            return
        if self.coded:
            keys = self.keys.new_zeros(self.capacity, self.dim)
            keys[: self._count] = self.all_keys()
            self._hold(keys, self.codes.new_zeros(0, 0))
        self._expanded, self._came = True, []

    @torch.no_grad()
    def compress(self) -> None:
        """Turn keys into codes; nothing without a coding. Codebooks that do not fit any more are trained anew."""
        if self.coder is None:
            return
        self._expanded, self._came = False, []
        if self.coded:
            if self.coder.outdated():
                self._retrain()
        elif self._count >= MIN_ROWS:
            keys = self.keys[: self._count]
            if not self.coder.fits(keys):
                self.coder.fit(keys)
            self._encode(keys)
        elif self._count:
            self.coder.too_few(self._count)
        self.coder.forget_recent()

    @torch.no_grad()
    def drop(self, ids: Tensor) -> None:
        """Forget samples. Their rows are overwritten and the space behind the last row is zeroed.

        Args:
            ids: (n,) int64; an id given twice counts once.

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
        self._moved()

    @torch.no_grad()
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

    @torch.no_grad()
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

    @torch.no_grad()
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

    def _column_shape(self, width: ColumnWidth) -> tuple[int, ...]:
        if width == "classes":
            return (self.num_classes,)
        return (width,) if width else ()

    def _row_buffers(self) -> list[str]:
        keys = "codes" if self.coded else "keys"
        return [keys, "labels", "ids", "soft_row", *(f"column_{name}" for name in self.columns)]

    def _filled(self) -> dict[str, Tensor]:
        filled = {name: self.get_buffer(name)[: self._count] for name in self._row_buffers()}
        if self.coder is not None:
            filled |= {"keys": self.keys[: self._count], "codes": self.codes[: self._count]}
            filled |= {_QUANTIZER + name: tensor for name, tensor in self.coder.state().items()}
        return {**filled, "soft": self.soft}

    def _put(self, rows: Tensor, keys: Tensor) -> None:
        """Write keys (n, d), as codes where keys are codes."""
        if self.coder is None or not self.coded:
            self.keys[rows] = keys
            if self._expanded:
                self._came.append(self.ids[rows])
            return
        self.codes[rows] = self.coder.encode(keys)
        self.coder.note(self.ids[rows], keys)

    def _tend(self) -> None:
        """After rows were written: compress them, or train the codebooks anew, where it is time."""
        if self.coder is None or self._expanded:
            return
        if not self.coded and self._count >= MIN_ROWS:
            keys = self.keys[: self._count]
            self.coder.fit(keys)
            self.coder.note(self.ids[: self._count], keys)
            self._encode(keys)
        elif self.coder.due(self._count):
            self._retrain()

    def _retrain(self) -> None:
        """Codebooks for the embeddings as they are now. Rows written lately are encoded as they came, others as they
        were decoded."""
        assert self.coder is not None
        keys = self.all_keys()
        ids, recent = self.coder.recent()
        rows = self.rows_of(ids)
        keys[rows[rows >= 0]] = recent[rows >= 0].to(keys.dtype)
        # Where most rows are stale, what was written lately is what the next will be like.
        fresh = len(recent) >= max(2**self.coder.coding.bits * 8, self._count // 16)
        self.coder.fit(recent if fresh else keys, self._count)
        self._encode(keys)

    def _encode(self, keys: Tensor) -> None:
        assert self.coder is not None
        codes = self.coder.encode(keys)
        buffer = codes.new_zeros(self.capacity, codes.shape[1])
        buffer[: self._count] = codes
        self._hold(self.keys.new_zeros(0, self.dim), buffer)

    def _hold(self, keys: Tensor, codes: Tensor) -> None:
        self.keys, self.codes = keys, codes
        self._changed = None

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

    def _known_rows(self, ids: Tensor) -> Tensor:
        rows = self.rows_of(ids)
        missing = ids[rows < 0]
        if len(missing):
            named = ", ".join(str(int(i)) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ShapeError(f"memory: no sample with id {named} among the {self._count} held")
        return rows

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

    def touch(self, rows: Tensor) -> None:
        """Say that the keys of rows (n,) were changed in place, so that an index follows."""
        if self._changed is not None:
            self._changed.append(rows)

    def _moved(self) -> None:
        self._sorted = None
        self.layout += 1

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Memory:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.coder is not None:
            self.coder.to(self.keys.device)
        return self

    # ---- state ---------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._expanded:
            self.compress()  # in the middle of a refresh: keys that are to be codes are never saved as they are
        for name, tensor in self._filled().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

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
        own = [*self._row_buffers(), "soft"]
        codes = ["codes"] if self.coder is not None and prefix + "codes" in state_dict else []
        names = ["keys", *codes, *own[1:]]
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        incoming = {name: state_dict[prefix + name] for name in names}
        if incoming["keys"].shape[1:] != self.keys.shape[1:]:
            error_msgs.append(f"memory: saved keys are {incoming['keys'].shape[1]} wide, this memory takes {self.dim}")
            return
        self.widen(incoming["soft"].shape[1])
        more = self.num_classes - incoming["soft"].shape[1]
        for name in ["soft", *(f"column_{column}" for column, width in self.columns.items() if width == "classes")]:
            incoming[name] = F.pad(incoming[name], (0, more))
        for name, tensor in incoming.items():
            setattr(self, name, tensor.detach().to(self.get_buffer(name), copy=True))
        self._count, self._expanded = len(self.labels), False
        self._came = []
        quantizer = [key for key in state_dict if key.startswith(prefix + _QUANTIZER)]
        if self.coder is not None:
            state = {key.removeprefix(prefix + _QUANTIZER): state_dict[key].detach().clone() for key in quantizer}
            self.coder.load_state(state, self.keys.device)
            if not codes:
                self.codes = self.codes.new_zeros(0, 0)
        self.active = torch.ones(self._count, dtype=torch.bool, device=self.keys.device)
        self._next_id = max(self._next_id, int(self.ids.max()) + 1 if self._count else 0)
        self._moved()
        self._changed = None
        if self.coder is not None and not self.coded:
            self.compress()  # saved by a memory without a coding
        known = {prefix + name for name in names} | set(quantizer if self.coder is not None else [])
        unexpected_keys.extend(k for k in state_dict if strict and k.startswith(prefix) and k not in known)
