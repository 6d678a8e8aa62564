"""Hard k-nearest-neighbour vote over stored embeddings, trained through a dense layer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .._lasting import lasting
from ..coding import ROTATION
from ..errors import ConfigError, ShapeError
from ..functional import Metric, Vote
from ..index import Engine
from .base import positive
from .compressed import coding_of
from .dense_objective import DenseObjective
from .registry import register_head
from .voting import VotingHead


@register_head("knn")
class KNNHead(VotingHead):
    """Majority vote of the k nearest stored samples (review, equation 3).

    The backbone is trained through a dense layer that only `loss` uses; the output is the vote, in training and in
    evaluation.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours; the papers use 1, 5, 30, 100, 150 and 1000.
        metric: ``"l2"``, ``"l1"`` or ``"cosine"``.
        vote, sigma, smoothing: see `VotingHead`.
        pca: project to this many principal components, fitted at each refresh on the samples stored then; the memory
            holds the projections, so a refresh must cover all of them. None for no projection.
        normalize: scale embeddings to unit length.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
        bytes_per_center, rotation, code_bits: compressed centers, see `coding_of`.
    """

    components: Tensor
    center: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int = 30,
        metric: Metric = "l2",
        vote: Vote = "uniform",
        sigma: float | Literal["auto"] = "auto",
        pca: int | None = None,
        smoothing: float = 1.0,
        normalize: bool = False,
        engine: Engine = "auto",
        bytes_per_center: int | None = None,
        rotation: str = ROTATION,
        code_bits: Literal[4, 8] = 8,
    ) -> None:
        if pca is not None:
            positive("knn", "pca", pca, integer=True)
            if pca > in_features:
                raise ConfigError(f"head 'knn': pca must be at most the embedding's width {in_features}, got {pca}")
        super().__init__(
            in_features,
            num_classes,
            k=k,
            vote=vote,
            sigma=sigma,
            smoothing=smoothing,
            metric=metric,
            normalize=normalize,
            engine=engine,
            coding=coding_of(self.name, bytes_per_center, rotation, code_bits, pca or in_features),
            dim=pca,
        )
        self.pca = pca
        self.dense = DenseObjective(in_features, num_classes)
        self.register_buffer("components", torch.zeros(in_features, pca or 0))
        self.register_buffer("center", torch.zeros(in_features if pca else 0))
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] | None = None

    def config(self) -> dict[str, Any]:
        return {"k": self.k, "metric": self.metric, "pca": self.pca, **self._vote_config(), **self._coding_config()}

    def loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of the dense layer that trains the backbone; arguments as in `Head.loss`."""
        z = self._check(z)
        self._check_labels(y, len(z))
        with torch.autocast(z.device.type, enabled=False):
            loss: Tensor = self.dense(z, y)
            return loss

    def add(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Store samples; with ``pca`` the first ones stored outside a refresh also fit the projection, and must be more
        than its components.

        Raises:
            ShapeError: as in `MemoryHead.add`; or they are too few to fit the projection.
        """
        if not self.pca or not isinstance(z, Tensor) or not len(z) or bool(self.components.any()):
            return super().add(z, y, ids)
        if len(z) <= self.pca:
            raise ShapeError(
                f"head 'knn': {len(z)} samples are too few for the axes of pca={self.pca}: store {self.pca + 1} or "
                "more first, at once"
            )
        try:
            self._fit_components(self._check(z.detach()))
            return super().add(z, y, ids)
        except BaseException:
            self.components.zero_()  # the next ones fit it
            raise

    def memorize(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> None:
        if self._waiting is None:
            super().memorize(z, y, ids=ids)
        else:  # the projection needs all of them first
            self._check_labels(y, len(z), seen=False)
            self._waiting.append((self._check(z.detach()), y, ids))

    def begin_refresh(self, *, replace: bool = False) -> None:
        super().begin_refresh(replace=replace)
        if self.pca:
            self._waiting = []

    def abandon_refresh(self) -> None:
        self._waiting = None
        super().abandon_refresh()

    @torch.no_grad()
    def refreshed(self) -> None:
        """Fit the projection and choose the width of the vote from the samples stored."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            if waiting:
                self._fit_components(torch.cat([z for z, _, _ in waiting]))
            for z, y, ids in waiting:
                self.memorize(z, y, ids=ids)
        super().refreshed()

    @lasting
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        self.dense.widen(self.num_classes)

    @torch.no_grad()
    def _fit_components(self, z: Tensor) -> None:
        """Principal axes of the embeddings, from their covariance."""
        z = super()._embed(z).double()
        center = z.mean(0)
        _, axes = torch.linalg.eigh((z - center).T @ (z - center))
        self.center.copy_(center)
        self.components.copy_(axes.flip(1)[:, : self.pca])

    def _embed(self, z: Tensor) -> Tensor:
        z = super()._embed(z)
        if not self.pca:
            return z
        return (z.to(self.center.dtype) - self.center) @ self.components
