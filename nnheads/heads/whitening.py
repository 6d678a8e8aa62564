"""Mahalanobis distances: embeddings whitened by the covariance within classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

LEAST: Final = 1e-6
"""Smallest shrinkage: with less, a direction without variance would leave the range of half precision."""


class Whitening(nn.Module):
    """Linear map ``z W`` after which Euclidean distances are Mahalanobis distances.

    ``W = sqrt((1 + r) v) (S + r v I)^(-1/2)`` with the pooled covariance S of the stored embeddings within their
    classes, its mean variance ``v = tr(S) / d`` and the shrinkage r: directions in which samples of one class differ
    anyway count less, as in linear discriminant analysis (Fisher 1936; the shrinkage is Friedman's of 1989). The factor
    before it leaves distances as they are where S is a multiple of the identity.

    The matrix is in half precision, and rounded before it is used, so that a saved head answers as it did. Before
    `fit` it is the identity.

    Args:
        dim: width d of the embeddings.
        shrinkage: r, `LEAST` or more.
    """

    matrix: Tensor

    def __init__(self, dim: int, shrinkage: float) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.register_buffer("matrix", torch.eye(dim, dtype=torch.float16))

    @property
    def bytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.numel() * self.matrix.element_size()

    @torch.no_grad()
    def fit(self, z: Tensor, y: Tensor) -> None:
        """Take the covariance of embeddings (n, d) within their classes (n,); the identity where none differ."""
        z = z.double()
        counts = torch.bincount(y)
        means = z.new_zeros(len(counts), z.shape[1]).index_add_(0, y, z) / counts.clamp_min(1).unsqueeze(1)
        within = z - means[y]
        covariance = within.T @ within / max(1, len(z))
        variance = covariance.diagonal().mean()
        if not float(variance) > 0:
            self.matrix.copy_(torch.eye(len(self.matrix)))
            return
        values, vectors = torch.linalg.eigh(covariance)
        scale = ((1 + self.shrinkage) * variance / (values.clamp_min(0) + self.shrinkage * variance)).sqrt()
        self.matrix.copy_((vectors * scale) @ vectors.T)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = self.matrix
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.matrix.dtype != torch.float16:  # whatever its model is cast to: other bytes would not be those saved,
            self.matrix = before.to(self.matrix.device, torch.float16)  # nor would those that bfloat16 leaves
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Embeddings (n, d) to keys (n, d)."""
        return z @ self.matrix.to(z.dtype)

    @torch.no_grad()
    def inverse(self, keys: Tensor) -> Tensor:
        """Keys (n, d) to the embeddings that they are of."""
        z: Tensor = torch.linalg.solve(self.matrix.double(), keys.double(), left=False)
        return z.to(keys.dtype)
