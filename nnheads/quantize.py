"""Product quantization of embeddings: a few bytes a row instead of four a dimension.

FAISS trains the codebooks; what it found is kept as torch tensors of our own, so that codes are written, decoded and
compared on any device and are saved and loaded bit for bit without FAISS.

Sources: Jegou et al., "Product quantization for nearest neighbor search" (2011); Ge et al., "Optimized product
quantization" (2013).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar, final

import torch
from torch import Tensor

from nnheads._codebooks import gather, parse_rotation, spread, train_codebooks, train_rotation
from nnheads.errors import CheckpointError, ConfigError, ShapeError

MIN_BYTES, MAX_BYTES = 4, 64

_CHUNK_NUMBERS = 2**24  # floats held at once beside the result, 64 MB

_log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _full_precision(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Products in the tensors' own precision also under autocast, under which memories are refreshed."""

    @functools.wraps(method)
    def precise(*args: _P.args, **options: _P.kwargs) -> _R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*args, **options)

    return precise


@final
@dataclass(frozen=True, eq=False)
class ProductQuantizer:
    """Trained codebooks: ``encode`` embeddings to bytes, ``decode`` bytes to embeddings.

    A row is centered and rotated (where there is a rotation), cut into M parts, and each part replaced by the number of
    its nearest codeword. Make one with :meth:`fit` or :meth:`from_state`.

    Attributes:
        width: d, the width of the embeddings.
        codebooks: (M, 2**bits, p) float32 or float16 codewords of the M parts.
        rotation: (r, d) orthonormal rows, float32 or float16; None for plain quantization.
        mean: (d,) float32 subtracted before rotating; None for plain quantization.
    """

    width: int
    codebooks: Tensor
    rotation: Tensor | None = None
    mean: Tensor | None = None

    @classmethod
    @_full_precision
    def fit(
        cls,
        keys: Tensor,
        bytes_per_row: int = 16,
        *,
        bits: Literal[4, 8] = 8,
        rotation: str = "none",
        seed: int = 0,
        half_codebooks: bool = False,
        rounds: int = 25,
        quiet: bool = False,
    ) -> ProductQuantizer | None:
        """Train codebooks on embeddings.

        Codebooks of 8 bits need 256 rows and those of 4 bits 16: with fewer rows the next smaller is trained, at the
        same bytes a row, and below 16 rows none is; a line in the log says so. More parts than dimensions are not made,
        so narrow embeddings may take fewer bytes than asked.

        Args:
            keys: (N, d) embeddings, finite.
            bytes_per_row: 4 to 64, 16 by default.
            bits: 8 (default) or 4 bits a part; 4 makes twice as many parts of 16 codewords.
            rotation: ``"none"`` (default); ``"pca"`` or ``"pca:DIM"``, the DIM leading principal directions (four a
                byte by default), dealt to the parts so that all have as much to say; ``"opq"``, a trained rotation that
                begins with these; ``"opq:DIM"``, the same of the DIM leading ones. With ``opq`` the dimensions are
                rounded down to a multiple of the number of parts.
            seed: of the k-means and of the rows drawn to train the rotation.
            half_codebooks: keep codebooks and rotation in float16, half as large (float32 where values need it).
            rounds: of k-means for the codebooks; 8 lose 1 % on the rows trained on, and nothing on others.
            quiet: say nothing of smaller codebooks; for a caller that says it itself.

        Returns:
            The quantizer, its tensors on the keys' device; None where there are fewer than 16 rows: keep them raw.

        Raises:
            ConfigError: an option out of range, or FAISS cannot be imported.
            ShapeError: keys of a wrong shape, or not finite.
        """
        if not MIN_BYTES <= bytes_per_row <= MAX_BYTES:
            raise ConfigError(f"bytes_per_row must be {MIN_BYTES} to {MAX_BYTES}, got {bytes_per_row}")
        if bits not in (4, 8):
            raise ConfigError(f"bits must be 4 or 8, got {bits}")
        if keys.ndim != 2 or not keys.is_floating_point() or not keys.shape[1]:
            raise ShapeError(f"keys must be a (N, d) floating tensor, got {tuple(keys.shape)} {keys.dtype}")
        rows, width = keys.shape
        kind, reduced = parse_rotation(rotation, width, bytes_per_row)
        points = keys.detach().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(points).all()):
            raise ShapeError("keys hold NaN or infinity: check the embeddings before quantizing them")
        level = logging.DEBUG if quiet else logging.WARNING
        if rows < 2**bits:
            fallback = "4-bit codebooks" if bits == 8 and rows >= 16 else "no quantization"
            _log.log(level, "%d-bit codebooks need %d rows, got %d: %s", bits, 2**bits, rows, fallback)
            if rows < 16:
                return None
            bits = 4
        parts = min(bytes_per_row * 8 // bits, reduced)
        if kind == "opq":
            reduced -= reduced % parts  # FAISS turns into equal parts only
            if rows < reduced:  # FAISS 1.15 corrupts its memory
                _log.log(level, "an OPQ rotation needs %d rows, got %d: principal directions instead", reduced, rows)
                kind = "pca"
        matrix = mean = None
        turned = points
        if kind != "none":
            mean = points.mean(0)
            matrix = train_rotation(kind, points - mean, reduced, parts, bits, seed)
            if half_codebooks:
                matrix = _half(matrix)
            turned = (points - mean) @ matrix.float().T
        codebooks = train_codebooks(spread(turned, parts), parts, bits, seed, rounds)
        if half_codebooks:
            codebooks = _half(codebooks)
        place = keys.device
        return cls(
            width=width,
            codebooks=codebooks.to(place),
            rotation=None if matrix is None else matrix.to(place),
            mean=None if mean is None else mean.to(place),
        )

    @property
    def parts(self) -> int:
        """M, the numbers a code holds."""
        return int(self.codebooks.shape[0])

    @property
    def bits(self) -> int:
        """Bits of each of them, 8 or 4."""
        return int(self.codebooks.shape[1]).bit_length() - 1

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one code."""
        return (self.parts * self.bits + 7) // 8

    @property
    def bytes_codebook(self) -> int:
        """Bytes of everything but the codes: codebooks, rotation, mean."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    def to(self, device: torch.device | str) -> ProductQuantizer:
        """The same quantizer with its tensors on ``device``."""
        return ProductQuantizer.from_state({name: tensor.to(device) for name, tensor in self.state().items()})

    @torch.no_grad()
    @_full_precision
    def encode(self, keys: Tensor) -> Tensor:
        """The codes of embeddings.

        Args:
            keys: (N, d) floating, on the quantizer's device.

        Returns:
            (N, bytes_per_row) uint8. 4-bit numbers are packed in pairs, the first in the low half of its byte.

        Raises:
            ShapeError: keys of another width.
        """
        books = self.codebooks.float()
        norms = books.square().sum(2)[:, None]  # (M, 1, K)
        chunk = max(1, _CHUNK_NUMBERS // (books.shape[0] * books.shape[1]))
        codes = [torch.empty(0, self.bytes_per_row, dtype=torch.uint8, device=keys.device)]
        for part in self._turn(keys).split(chunk):
            pieces = part.unflatten(1, (self.parts, -1)).transpose(0, 1)
            numbers = torch.baddbmm(norms, pieces, books.transpose(1, 2), alpha=-2).argmin(2).T
            codes.append(self._pack(numbers.to(torch.uint8)))
        return torch.cat(codes)

    @torch.no_grad()
    @_full_precision
    def decode(self, codes: Tensor) -> Tensor:
        """The embeddings that codes stand for.

        Args:
            codes: (N, bytes_per_row) uint8, on the quantizer's device.

        Returns:
            (N, d) float32.

        Raises:
            ShapeError: codes of another shape or dtype.
        """
        turned = gather(self.decode_turned(codes), self._turned_width, self.parts)
        if self.rotation is None:
            return turned
        decoded = turned @ self.rotation.float()
        return decoded if self.mean is None else decoded + self.mean

    @torch.no_grad()
    @_full_precision
    def decode_turned(self, codes: Tensor) -> Tensor:
        """Codes (N, bytes_per_row) as points (N, M * p) of the space of the codebooks, see `turn`; float32."""
        part = torch.arange(self.parts, device=codes.device)
        return self.codebooks.float()[part, self._unpack(codes)].flatten(1)

    @torch.no_grad()
    @_full_precision
    def turn(self, keys: Tensor) -> Tensor:
        """Embeddings (N, d) centered, rotated and spread over the parts, (N, M * p) float32.

        Squared distances from there to `decode_turned` are those to decoded rows, less a number for each embedding
        where the rotation reduces dimensions: the nearest codes are the same.
        """
        return self._turn(keys)

    @torch.no_grad()
    @_full_precision
    def adc_distances(self, queries: Tensor, codes: Tensor) -> Tensor:
        """Squared Euclidean distances from exact queries to decoded codes, by table look-up (asymmetric distances).

        Args:
            queries: (B, d) floating.
            codes: (N, bytes_per_row) uint8.

        Returns:
            (B, N) float32, equal to ``|q - decode(c)|^2`` up to rounding (and to float16's in a half rotation).

        Raises:
            ShapeError: queries or codes of another width.
        """
        numbers = self._unpack(codes)
        turned = self._turn(queries)
        pieces = turned.unflatten(1, (self.parts, -1)).transpose(0, 1)
        tables = torch.cdist(pieces, self.codebooks.float(), compute_mode="donot_use_mm_for_euclid_dist").square()
        words = tables.shape[2]
        flat = tables.transpose(1, 2).reshape(self.parts * words, len(queries))
        index = numbers + torch.arange(self.parts, device=codes.device) * words
        distances = torch.nn.functional.embedding_bag(index, flat.contiguous(), mode="sum").T
        if self.mean is not None:
            # the part of the query outside the rotated subspace is as far from every code
            centered = queries.float() - self.mean
            distances = distances + (centered.square().sum(1) - turned.square().sum(1)).clamp(min=0)[:, None]
        return distances

    def state(self) -> dict[str, Tensor]:
        """Everything needed to rebuild the quantizer, as tensors for safetensors."""
        state = {"width": torch.tensor(self.width, device=self.codebooks.device), "codebooks": self.codebooks}
        if self.rotation is not None:
            state["rotation"] = self.rotation
        if self.mean is not None:
            state["mean"] = self.mean
        return state

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ProductQuantizer:
        """The quantizer that :meth:`state` came from, bit for bit.

        Raises:
            CheckpointError: tensors that are missing or do not fit together.
        """
        try:
            width, books = int(state["width"]), state["codebooks"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"not a saved quantizer, width and codebooks needed, got {sorted(state)}") from error
        rotation, mean = state.get("rotation"), state.get("mean")
        fits = width > 0 and books.ndim == 3 and books.shape[1] in (16, 256) and books.is_floating_point()
        if fits and rotation is not None:
            fits = rotation.ndim == 2 and rotation.shape[1] == width and mean is not None and mean.shape == (width,)
        if fits:
            turned = width if rotation is None else int(rotation.shape[0])
            fits = 0 < books.shape[0] <= turned and books.shape[2] == -(-turned // books.shape[0])
        if not fits:
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            raise CheckpointError(f"the saved quantizer's tensors do not fit together: width {width}, {shapes}")
        return cls(width=width, codebooks=books, rotation=rotation, mean=mean)

    @property
    def _turned_width(self) -> int:
        return self.width if self.rotation is None else int(self.rotation.shape[0])

    def _turn(self, keys: Tensor) -> Tensor:
        if keys.ndim != 2 or keys.shape[1] != self.width:
            raise ShapeError(f"the quantizer takes (N, {self.width}) embeddings, got {tuple(keys.shape)}")
        keys = keys.detach().float()
        if self.rotation is not None and self.mean is not None:
            keys = (keys - self.mean) @ self.rotation.float().T
        return spread(keys, self.parts)

    def _pack(self, numbers: Tensor) -> Tensor:
        if self.bits == 8:
            return numbers.contiguous()
        even = torch.nn.functional.pad(numbers, (0, self.parts % 2))
        return even[:, ::2] | (even[:, 1::2] << 4)

    def _unpack(self, codes: Tensor) -> Tensor:
        if codes.ndim != 2 or codes.shape[1] != self.bytes_per_row or codes.dtype != torch.uint8:
            wanted = f"(N, {self.bytes_per_row}) uint8"
            raise ShapeError(f"the quantizer takes {wanted} codes, got {tuple(codes.shape)} {codes.dtype}")
        if self.bits == 8:
            return codes.long()
        return torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, : self.parts].long()


def _half(tensor: Tensor) -> Tensor:
    half = tensor.half()
    return half if bool(torch.isfinite(half).all()) else tensor
