"""Nearest-neighbour Gaussian kernels (NNGK), Meyer, Harwood and Drummond 2017."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..coding import ROTATION
from ..index import Engine
from .base import positive
from .compressed import coding_of
from .kernel_vote import KernelVoteHead
from .registry import register_head


@register_head("nngk")
class NNGKHead(KernelVoteHead):
    """Kernel vote over centers tied to the embeddings, with a learned weight a sample (review, equation 7).

    ``y(z) = sum_i w_i y_i k(z, z_i) / sum_i w_i k(z, z_i)`` over the k nearest centers z_i = f(x_i). The gradient
    reaches z only, not the centers. Centers grow stale as the backbone learns: with ``track`` the embedding of each
    training sample replaces its center as it passes by, at no cost; `model.refresh` embeds all of them anew.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours; with 32 or more stale centers do little harm (the paper).
        sigma: width: a number, ``"auto"`` (chosen at each refresh) or ``"learned"``.
        weights: whether the per-sample weights w_i are trained, in log space, starting at one.
        weight_lr: step size of the log weights.
        track: whether a training step moves the centers of its batch to their new embeddings.
        floor: smallest probability of a class.
        auxiliary: share of a dense layer's cross-entropy in `loss`, see `KernelVoteHead`; 0 is the paper's own loss.
        normalize: scale embeddings to unit length.
        whiten: 0: Euclidean distances; above 0: Mahalanobis distances of the covariance within classes, shrunk by this
            share, see `KernelVoteHead`.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
        bytes_per_center, rotation, code_bits: compressed centers, see `coding_of`. Weights stay as they are.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int = 32,
        sigma: float | Literal["auto", "learned"] = "auto",
        weights: bool = True,
        weight_lr: float = 0.1,
        track: bool = True,
        floor: float = 1e-6,
        auxiliary: float = 0.75,
        normalize: bool = False,
        whiten: float = 0.0,
        engine: Engine = "auto",
        bytes_per_center: int | None = None,
        rotation: str = ROTATION,
        code_bits: Literal[4, 8] = 8,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            k=k,
            sigma=sigma,
            floor=floor,
            auxiliary=auxiliary,
            normalize=normalize,
            whiten=whiten,
            engine=engine,
            coding=coding_of(self.name, bytes_per_center, rotation, code_bits, in_features),
            columns={"log_weight": 0} if weights else {},
        )
        positive("nngk", "weight_lr", weight_lr, zero=True)
        self.weights = weights
        self.weight_lr = weight_lr
        self.track = track

    @property
    def tracks(self) -> bool:
        return self.track

    @property
    def follows(self) -> bool:
        return self.track

    def config(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "sigma": self.width.sigma,
            "weights": self.weights,
            "weight_lr": self.weight_lr,
            "track": self.track,
            "floor": self.floor,
            "auxiliary": self.auxiliary,
            "normalize": self.normalize,
            "whiten": self.whiten,
            "engine": self.engine,
            **self._coding_config(),
        }

    def _log_w(self, rows: Tensor) -> Tensor | None:
        if not self.weights:
            return None
        return self._step_rows(self.memory.column("log_weight"), rows, self.weight_lr)
