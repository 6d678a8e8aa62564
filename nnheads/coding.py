"""Centers of a few bytes each: the codebooks of a memory, and when they are trained anew."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from nnheads._codebooks import parse_rotation
from nnheads.quantize import ProductQuantizer

MIN_ROWS: Final = 16
"""Fewer rows stay as they are: the smallest codebooks have as many words."""

ROTATION: Final = "pca"
"""At 4 to 32 bytes no other lost less on embeddings of CIFAR-10, and none is faster but plain quantization."""

_FIT_ROWS: Final = 16_384  # rows that codebooks are trained on, 64 a word
_RECENT: Final = 4096  # rows remembered as they came, to train on where embeddings have moved
_LOOK_AFTER: Final = (256, 8192)  # rows written between two looks at the error, at least and at most
_WORSE: Final = 1.25  # times the error that the codebooks had when they were new
_ROUNDS: Final = 8  # of k-means

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Coding:
    """How the rows of a memory are compressed, see `nnheads.quantize.ProductQuantizer.fit`.

    Attributes:
        bytes_per_row: 4 to 64.
        rotation: ``"pca"``, ``"pca:DIM"``, ``"opq"``, ``"opq:DIM"`` or ``"none"``.
        bits: 8 or 4.
    """

    bytes_per_row: int = 16
    rotation: str = ROTATION
    bits: Literal[4, 8] = 8

    def fixed_bytes(self, dim: int, rows: int) -> int:
        """Most bytes that codebooks, rotation and mean for so many rows take; for budgets."""
        if rows < MIN_ROWS:
            return 0
        bits = int(self.bits) if rows >= 2**self.bits else 4
        kind, turned = parse_rotation(self.rotation, dim, self.bytes_per_row)
        parts = min(self.bytes_per_row * 8 // bits, turned)
        books = (1 << bits) * parts * -(-turned // parts) * 2
        rotation = 0 if kind == "none" else turned * dim * 2 + dim * 4
        return books + rotation + 3 * 8

    def row_bytes(self, dim: int, rows: int) -> int:
        """Most bytes that the code of one of so many rows takes; rows that are too few stay in float32."""
        return 4 * dim if rows < MIN_ROWS else min(self.bytes_per_row, dim)


@final
class Coder:
    """Turns the rows of one memory into codes and back, and trains the codebooks.

    Codebooks are in half precision. They are trained on at most 16,384 rows when there are 16 (of 4 bits where there
    are fewer than 256, which the log says), again whenever there are twice as many, and where they have become wrong:
    after as many rows as are held were written (256 to 8,192), and at each refresh, the relative error of those rows
    is looked at, and codebooks with more than 1.25 times the error they began with are trained anew. All other changes
    are encoded with the codebooks there are. To train on embeddings that have moved, the last 4,096 rows written since
    the last refresh are kept as they came; they are never saved.

    Args:
        coding: what is wanted.
        dim: width of the rows.

    Attributes:
        quantizer: the codebooks; None before there are any.
    """

    def __init__(self, coding: Coding, dim: int) -> None:
        self.coding = coding
        self.dim = dim
        self.quantizer: ProductQuantizer | None = None
        self._fitted = 0  # rows there were when the codebooks were trained
        self._error = 0.0  # and what rows like those lose
        self._written = 0  # rows since the error was looked at
        self._recent: Tensor | None = None  # the rows written lately, in a ring
        self._recent_ids = torch.zeros(0, dtype=torch.long)
        self._at = 0  # where the next goes
        self._said: set[str] = set()

    def reset(self) -> None:
        """Forget the codebooks."""
        self.quantizer = None
        self._fitted, self._error = 0, 0.0
        self.forget_recent()

    # ---- codes ---------------------------------------------------------------------------------------------------

    def encode(self, keys: Tensor) -> Tensor:
        """(n, d) rows to (n, bytes) uint8 codes; with no codebooks (n, 0)."""
        if self.quantizer is None:
            return torch.zeros(len(keys), 0, dtype=torch.uint8, device=keys.device)
        return self.quantizer.encode(keys)

    def decode(self, codes: Tensor) -> Tensor:
        """(..., bytes) codes to (..., d) float32 rows."""
        assert self.quantizer is not None, "there are no codebooks"
        return self.quantizer.decode(codes.reshape(-1, codes.shape[-1])).view(*codes.shape[:-1], self.dim)

    # ---- training the codebooks ----------------------------------------------------------------------------------

    def fits(self, keys: Tensor) -> bool:
        """Whether there are codebooks that are as good for these rows as they were for those they were trained on."""
        if self.quantizer is None or self._outgrown(len(keys)):
            return False
        return self._loss(_some(keys)) <= _WORSE * self._error

    def fit(self, keys: Tensor, rows: int | None = None) -> None:
        """Train the codebooks on (n, d) rows, 16 or more; ``rows`` of them are held, n by default."""
        rows = len(keys) if rows is None else rows
        bits = self.coding.bits
        if len(keys) < 2**bits:
            self._say(f"{len(keys)} centers are too few for codebooks of {2**bits} words: of 16 for now")
            bits = 4
        sample = _some(keys)
        coding = self.coding
        self.quantizer = ProductQuantizer.fit(
            sample,
            coding.bytes_per_row,
            bits=bits,
            rotation=coding.rotation,
            half_codebooks=True,
            rounds=_ROUNDS,
            quiet=True,
        )
        self._fitted = rows
        # Where rows are few for so many words, others lose more than these.
        self._error = self._loss(sample) / max(1e-3, 1 - 2**bits / len(sample)) ** 2
        self._written = 0

    def due(self, held: int) -> bool:
        """Whether codebooks have to be trained anew before the next row is written, with so many rows held."""
        if self.quantizer is None:
            return False
        if self._outgrown(held):
            return True
        if self._written < min(max(held, _LOOK_AFTER[0]), _LOOK_AFTER[1]):
            return False
        return self.outdated()

    def outdated(self) -> bool:
        """Whether the rows written lately lose more in the codebooks than rows did when these were trained."""
        self._written = 0
        recent = self.recent()[1]
        return len(recent) >= MIN_ROWS and self._loss(recent) > _WORSE * self._error

    def too_few(self, held: int) -> None:
        """Say that rows stay as they are."""
        self._say(f"{held} centers are too few to compress: kept as they are until there are {MIN_ROWS}")

    def _outgrown(self, held: int) -> bool:
        assert self.quantizer is not None
        narrow = self.quantizer.bits < self.coding.bits and held >= 2**self.coding.bits
        return narrow or (held >= 2 * self._fitted and self._fitted < _FIT_ROWS)

    def _loss(self, keys: Tensor) -> float:
        """Squared error over variance."""
        assert self.quantizer is not None
        keys = keys.float()
        variance = (keys - keys.mean(0)).square().sum()
        error = (self.quantizer.decode(self.quantizer.encode(keys)) - keys).square().sum()
        return float(error / variance.clamp_min(1e-12))

    def _say(self, what: str) -> None:
        kind = what.partition(" ")[2]
        if kind not in self._said:  # once, not at each of the batches in which centers come
            self._said.add(kind)
            _log.warning("%s", what)

    # ---- the rows written lately ---------------------------------------------------------------------------------

    def note(self, ids: Tensor, keys: Tensor) -> None:
        """Remember rows (n, d) with their ids (n,) as they came."""
        self._written += len(ids)
        ids, keys = ids[-_RECENT:], keys[-_RECENT:].float()
        if self._recent is None:
            self._recent = keys.new_zeros(_RECENT, self.dim)
            self._recent_ids = ids.new_full((_RECENT,), -1)
        at = (torch.arange(len(ids), device=ids.device) + self._at) % _RECENT
        self._recent[at] = keys
        self._recent_ids[at] = ids
        self._at = (self._at + len(ids)) % _RECENT

    def recent(self) -> tuple[Tensor, Tensor]:
        """Ids (n,) and rows (n, d) remembered; an id may stand there several times, the last time counts."""
        if self._recent is None:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, self.dim)
        order = (torch.arange(_RECENT, device=self._recent_ids.device) + self._at) % _RECENT
        order = order[self._recent_ids[order] >= 0]
        return self._recent_ids[order], self._recent[order]

    def forget(self, ids: Tensor) -> None:
        """Remember nothing of these ids (n,)."""
        if self._recent is not None:
            gone = torch.isin(self._recent_ids, ids.to(self._recent_ids.device))
            self._recent_ids[gone] = -1
            self._recent[gone] = 0

    def forget_recent(self) -> None:
        """Remember no rows."""
        self._recent, self._recent_ids = None, torch.zeros(0, dtype=torch.long)
        self._at = self._written = 0

    # ---- state ---------------------------------------------------------------------------------------------------

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        if self.quantizer is not None and self.quantizer.codebooks.device != device:
            self.quantizer = self.quantizer.to(device)
        if self._recent is not None:
            self._recent, self._recent_ids = self._recent.to(device), self._recent_ids.to(device)

    def state(self) -> dict[str, Tensor]:
        """The codebooks and what tells when they are due; nothing before there are any."""
        if self.quantizer is None:
            return {}
        return {**self.quantizer.state(), "fit": torch.tensor([self._fitted, self._error], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of `state`; CheckpointError where the tensors do not fit together."""
        self.reset()
        if state:
            self.quantizer = ProductQuantizer.from_state({name: t for name, t in state.items() if name != "fit"})
            self._fitted, self._error = (int(state["fit"][0]), float(state["fit"][1])) if "fit" in state else (0, 0.0)
            self.to(device)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave the rows behind that are remembered as they came.
        return {**self.__dict__, "_recent": None, "_recent_ids": torch.zeros(0, dtype=torch.long), "_at": 0}


def _some(keys: Tensor) -> Tensor:
    """The rows, or as many of them as codebooks are trained on, drawn always alike."""
    if len(keys) <= _FIT_ROWS:
        return keys
    draw = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:_FIT_ROWS]
    return keys[draw.to(keys.device)]
