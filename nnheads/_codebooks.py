"""Training of product quantization by FAISS: the rotation before it, and the codebooks of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnheads._faiss import load_faiss
from nnheads.errors import ConfigError

_OPQ_POINTS = 16_384  # training rows of the rotation; FAISS takes 65,536 by default
_OPQ_ROUNDS = 4  # FAISS: 50
_OPQ_FIRST_KMEANS = 4  # FAISS: 40


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


def parse_rotation(rotation: str, width: int, bytes_per_row: int) -> tuple[str, int]:
    """``"opq:64"`` as ``("opq", 64)``; without a number ``"pca"`` has four dimensions a byte, the others all."""
    kind, _, dimensions = rotation.partition(":")
    if kind not in ("none", "opq", "pca") or (kind == "none" and dimensions):
        raise ConfigError(
            f"unknown rotation {rotation!r}; known: none, pca, pca:DIM, opq, opq:DIM, for instance pca:64"
        )
    if not dimensions:
        return kind, min(width, 4 * bytes_per_row) if kind == "pca" else width
    if not dimensions.isdecimal() or not 1 <= int(dimensions) <= width:
        raise ConfigError(f"rotation {rotation!r}: DIM must be 1 to {width}, the width of the embeddings")
    return kind, int(dimensions)


def train_rotation(kind: str, centered: Tensor, reduced: int, parts: int, bits: int, seed: int) -> Tensor:
    """(reduced, d) orthonormal rows: principal directions dealt to the parts, or FAISS's OPQ that begins with these.

    OPQ with FAISS's own settings begins with a random rotation and takes 90 s on two cores for 50,000 x 512, most of it
    k-means at each of 50 rounds and over all rows. From here 16,384 rows and 4 rounds reach more.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randperm(len(centered), generator=generator)[:_OPQ_POINTS]
    sample = centered[draw]
    variances, directions = torch.linalg.eigh((sample.T @ sample).double())
    leading: Tensor = directions[:, -reduced:].flip(1).T.float()
    leading = leading[_dealt(variances[-reduced:].flip(0), parts)]
    if kind == "pca":
        return leading
    faiss = load_faiss()
    opq = faiss.OPQMatrix(reduced, parts)
    quantizer = faiss.ProductQuantizer(reduced, parts, bits)
    _settle(quantizer.cp, seed)
    opq.pq, opq.niter, opq.niter_pq_0 = quantizer, _OPQ_ROUNDS, _OPQ_FIRST_KMEANS
    faiss.copy_array_to_vector(torch.eye(reduced).flatten().numpy(), opq.A)  # else it begins with a random rotation
    opq.train((sample @ leading.T).contiguous().numpy())
    trained: Tensor = torch.from_numpy(faiss.vector_to_array(opq.A).copy())
    return trained.view(reduced, reduced) @ leading


def _dealt(variances: Tensor, parts: int) -> Tensor:
    """Order of principal directions, of falling variance, in which each part gets as large a product of variances as
    the others: what minimizes the error of Gaussian data (Ge et al. 2013, section 3.2).
    """
    count = len(variances)
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    logs = variances.clamp_min(1e-10 * float(variances[0].clamp_min(1e-30))).log().tolist()
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for direction, log in enumerate(logs):
        part = min((p for p in range(parts) if len(dealt[p]) < sizes[p]), key=totals.__getitem__)
        dealt[part].append(direction)
        totals[part] += log - logs[-1]  # not below zero, so that an empty part comes first
    return torch.tensor([direction for part in dealt for direction in part])


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
