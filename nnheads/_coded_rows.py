"""Rows whose keys are kept as codes of a few bytes: encoded as they are written, decoded as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ._lasting import lasting
from ._rows import ColumnWidth, Rows
from .coding import MIN_ROWS, Coder, Coding

QUANTIZER: Final = "quantizer_"
"""What the names of the codebooks' tensors begin with in a state dict."""


class CodedRows(Rows):
    """Rows whose keys are codes where a ``coding`` says so, and else lie in ``keys`` as they are.

    Writers call `_put` for keys and then `_tend`, which compresses and trains codebooks when it is time; readers call
    `keys_at`.

    Args:
        dim: width d of the keys.
        num_classes: number of classes C.
        columns: further numbers kept with each row, by name.
        coding: how keys are compressed; None: not at all.
    """

    codes: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        columns: Mapping[str, ColumnWidth] | None = None,
        coding: Coding | None = None,
    ) -> None:
        super().__init__(dim, num_classes, columns)
        self.coder = None if coding is None else Coder(coding, dim)
        if self.coder is not None:
            self.register_buffer("codes", torch.zeros(0, 0, dtype=torch.uint8))
        self._expanded = False  # until `compress`, rows are kept as they come
        self._came: list[Tensor] = []  # ids of those that came since

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def coded(self) -> bool:
        """Whether keys are kept as codes now."""
        return self.coder is not None and self.codes.shape[1] > 0

    @torch.no_grad()
    def keys_at(self, rows: Tensor) -> Tensor:
        """A copy of the keys of rows (...,) int64 as (..., d), decoded where they are codes. Row -1 gives any."""
        safe = rows.clamp_min(0)
        if self.coder is None or not self.coded:
            return F.embedding(safe, self.keys)  # twice as fast as indexing
        if safe.numel() > self._count:  # more than there are: each is decoded once
            return F.embedding(safe, self.coder.decode(self.codes[: self._count]).to(self.keys.dtype))
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

    # ---- writing -------------------------------------------------------------------------------------------------

    @lasting
    def expand(self) -> None:
        """Keep keys as they come until `compress`, as they are about to be written anew; nothing without a coding."""
        if self.coder is None:
            return
        if self.coded:
            keys = self.keys.new_zeros(self.capacity, self.dim)
            keys[: self._count] = self.all_keys()
            self._hold(keys, self.codes.new_zeros(0, 0))
        self._expanded, self._came = True, []

    @lasting
    def replace_keys(self, keys: Tensor) -> None:
        """Other keys (len, d) for all samples held; after `expand`, where there is a coding."""
        assert not self.coded, "codes are written one by one"
        held = self.keys.new_zeros(self.keys.shape)
        held[: self._count] = keys
        self.keys, self._changed = held, None

    @lasting
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

    # ---- the buffers ---------------------------------------------------------------------------------------------

    def _row_buffers(self) -> list[str]:
        keys = "codes" if self.coded else "keys"
        return [keys, *super()._row_buffers()[1:]]

    def _filled(self) -> dict[str, Tensor]:
        filled = super()._filled()
        if self.coder is not None:
            filled |= {"keys": self.keys[: self._count], "codes": self.codes[: self._count]}
            filled |= {QUANTIZER + name: tensor for name, tensor in self.coder.state().items()}
        return filled

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.coder is not None:
            self.coder.to(self.keys.device)
        return self
