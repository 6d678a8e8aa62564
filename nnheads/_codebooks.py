"""Training of product quantization by FAISS: the rotation before it, and the codebooks of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnheads._faiss import load_faiss
from nnheads.errors import ConfigError

_OPQ_POINTS = 16_384  # training rows of the rotation; FAISS takes 65,536 by default
_OPQ_ROUNDS = 10  # FAISS: 50
_OPQ_FIRST_KMEANS = 10  # FAISS: 40


def _slots(width: int, parts: int) -> Tensor:
    """Where each dimension goes when ``width`` is cut into equal parts: a part short of one ends with a zero."""
    size = -(-width // parts)
    sizes = [width // parts + (part < width % parts) for part in range(parts)]
    return torch.cat([torch.arange(count) + part * size for part, count in enumerate(sizes)])


def spread(keys: Tensor, parts: int) -> Tensor:
    """(N, w) rows cut into equal parts: (N, M * p), where a part that is short of a dimension ends with a zero."""
    width = keys.shape[1]
    if width % parts == 0:
        return keys
    parted = keys.new_zeros(len(keys), -(-width // parts) * parts)
    parted[:, _slots(width, parts).to(keys.device)] = keys
    return parted


def gather(parted: Tensor, width: int, parts: int) -> Tensor:
    """The inverse of :func:`spread`: (N, M * p) to (N, width)."""
    return parted if parted.shape[1] == width else parted[:, _slots(width, parts).to(parted.device)]


def parse_rotation(rotation: str, width: int) -> tuple[str, int]:
    """``"opq:64"`` as ``("opq", 64)``; the whole width where no number is given."""
    kind, _, dimensions = rotation.partition(":")
    if kind not in ("none", "opq", "pca") or (kind == "none" and dimensions) or (kind == "pca" and not dimensions):
        raise ConfigError(f"unknown rotation {rotation!r}; known: none, opq, opq:DIM, pca:DIM, for instance pca:64")
    if not dimensions:
        return kind, width
    if not dimensions.isdecimal() or not 1 <= int(dimensions) <= width:
        raise ConfigError(f"rotation {rotation!r}: DIM must be 1 to {width}, the width of the embeddings")
    return kind, int(dimensions)


def train_rotation(kind: str, centered: Tensor, reduced: int, parts: int, bits: int, seed: int) -> Tensor:
    """(reduced, d) orthonormal rows: a random turn of the principal directions, or FAISS's OPQ of them.

    OPQ with FAISS's own settings takes 90 s on two cores for 50,000 x 512, most of it k-means at each of 50 rounds and
    over all rows; 16,384 rows and 10 rounds take a ninth of that.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randperm(len(centered), generator=generator)[:_OPQ_POINTS]
    sample = centered[draw]
    covariance = (sample.T @ sample).double()
    leading: Tensor = torch.linalg.eigh(covariance).eigenvectors[:, -reduced:].flip(1).T.float()
    if kind == "pca":
        turn: Tensor = torch.linalg.qr(torch.randn(reduced, reduced, generator=generator, dtype=torch.float64)).Q
        return (turn @ leading.double()).float()
    faiss = load_faiss()
    opq = faiss.OPQMatrix(reduced, parts)
    quantizer = faiss.ProductQuantizer(reduced, parts, bits)
    _settle(quantizer.cp, seed)
    opq.pq, opq.niter, opq.niter_pq_0 = quantizer, _OPQ_ROUNDS, _OPQ_FIRST_KMEANS
    opq.train((sample @ leading.T).contiguous().numpy())
    trained: Tensor = torch.from_numpy(faiss.vector_to_array(opq.A).copy())
    return trained.view(reduced, reduced) @ leading


def _settle(clustering: Any, seed: int) -> None:
    clustering.seed = seed
    clustering.min_points_per_centroid = 1  # below 39 FAISS prints a warning a part, straight to stderr


def train_codebooks(points: Tensor, parts: int, bits: int, seed: int, rounds: int) -> Tensor:
    """(M, 2**bits, p) codewords of spread-out rows, by so many rounds of FAISS's k-means."""
    faiss = load_faiss()
    quantizer = faiss.ProductQuantizer(points.shape[1], parts, bits)
    _settle(quantizer.cp, seed)
    quantizer.cp.niter = rounds
    quantizer.train(points.contiguous().numpy())
    trained: Tensor = torch.from_numpy(faiss.vector_to_array(quantizer.centroids).copy())
    return trained.view(parts, 2**bits, -1)
