"""What the heads that decide by stored samples share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from .._lasting import lasting
from ..coding import Coding
from ..errors import EmptyMemoryError, ShapeError
from ..functional import neighbor_distances
from .base import sample_ids
from .evidence import Explanation, Neighbors, Scale, calibrated_shares, listing
from .outliers import OutlierScore, outlier_scores
from .searching import SAMPLED, SearchingHead

MAX_NEW_CLASSES: Final = 10_000
"""Most classes that one call adds: a label beyond is a mistake (an id, a pixel), not a wish for that many columns."""


class MemoryHead(SearchingHead):
    """A head that decides by the k nearest of the samples it stores. Abstract.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k, metric, normalize, engine, columns, dim, coding: see `SearchingHead`.
    """

    #: What `_shares` are in: parts of probabilities, or of logits.
    evidence_scale: ClassVar[Scale] = "probability"

    _refreshing = False  # whether samples that come are those stored, embedded anew

    @property
    def follows(self) -> bool:
        """Whether training keeps the centers near their samples, by tracking or because they are trained."""
        return False

    @property
    def moves(self) -> bool:
        """Whether a refresh moves the centers that are stored."""
        return True

    @property
    def anchored(self) -> bool:
        """Whether trained centers are held near their samples, and are put back to them when training ends."""
        return False

    @property
    def _learning(self) -> bool:
        """Whether what is asked is a step of training. In training mode without gradients the head is watched (for a
        metric, say): what follows the batches of training must not follow those too."""
        return self.training and torch.is_grad_enabled()

    @property
    def bytes(self) -> int:
        """Bytes of the memory, and of what maps embeddings to its keys where that depends on the samples stored."""
        return self.memory.bytes

    def keys_of(self, z: Tensor) -> Tensor:
        """Keys of embeddings (n, d): what is stored of them, and what is searched with."""
        return self._embed(self._check(z))

    # ---- storing -------------------------------------------------------------------------------------------------

    def memorize(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> None:
        """Store samples as centers; an id already stored is replaced, or moved during a refresh. See `add`."""
        if self._refreshing and ids is not None and len(self.memory) and y.dim() == 1:
            rows = self.memory.rows_of(ids)
            same = (rows >= 0) & (self.memory.labels[rows.clamp_min(0)] == y.to(rows.device))
            self._move(rows[same], self._embed(self._check(z.detach())[same.to(z.device)]))
            new = ~same
            z, y, ids = z[new.to(z.device)], y[new.to(y.device)], ids[new.to(ids.device)]
        self.add(z, y, ids)

    def begin_refresh(self, *, replace: bool = False) -> None:
        self._refreshing = not replace
        self.memory.expand()

    def abandon_refresh(self) -> None:
        self._refreshing = False
        self.memory.compress()

    def refreshed(self) -> None:
        self._refreshing = False
        if self.memory.coder is not None:
            self._sampled = self.memory.keys_as_they_came(SAMPLED)
        self.memory.compress()

    def add(self, z: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Store samples without any training; images are for ``model.add``.

        Args:
            z: (n, d) embeddings.
            y: (n,) int64 labels, or (n, C) soft labels; an unseen class widens the head, by `MAX_NEW_CLASSES` at most.
            ids: (n,) int64 ids; new ones by default.

        Returns:
            (n,) the ids.

        Raises:
            ShapeError: a wrong size, a NaN, or a label that is negative or far beyond the classes there are; the
                memory is unchanged then.
        """
        for name, given in (("embeddings", z), ("labels", y), *((("ids", ids),) if ids is not None else ())):
            if not isinstance(given, Tensor):
                raise ShapeError(f"head {self.name!r}: {name} must be a tensor, got {type(given).__name__}")
        z = self._check(z.detach())
        self._check_labels(y, len(z), seen=False)
        most = self.num_classes + MAX_NEW_CLASSES
        if y.dim() == 1 and len(y) and int(y.max()) >= most:
            raise ShapeError(
                f"head {self.name!r}: label {int(y.max())} is far beyond the {self.num_classes} classes there are; "
                f"new ones are numbered from {self.num_classes}"
            )
        held = self.memory.add(self._embed(z), y, ids)
        self.widen(self.memory.num_classes)
        return held

    def drop(self, ids: Tensor | Sequence[int] | int) -> None:
        """Forget samples by id, at once and without training; an unknown id is named and nothing is changed.

        Thumbnails of theirs stay with the model, unsaved: ``model.drop`` takes them as well.
        """
        self.memory.drop(sample_ids(ids))
        self._sampled = None  # may hold keys of theirs

    @lasting
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        self.memory.widen(self.num_classes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        soft = state_dict.get(prefix + "memory.soft")
        if isinstance(soft, Tensor) and soft.dim() == 2:
            self.widen(soft.shape[1])  # first, so that layers of the head have room for what is saved
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- asking --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def neighbors(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Neighbors:
        """The stored samples that decide for each embedding, with their weights.

        Args:
            z: (B, d) embeddings.
            ids: as in `forward`: a sample's own center is left out.
            k: number of neighbours; the head's own by default.
        """
        z = self.keys_of(z)
        rows = self._search(z, self._check_ids(ids, len(z)), self.k if k is None else k)
        valid = rows >= 0
        held = rows.clamp_min(0)
        if not len(self.memory):
            empty = torch.zeros(rows.shape, dtype=z.dtype, device=z.device)
            return Neighbors(rows, rows, rows, empty + math.inf, empty)
        distances = neighbor_distances(z, self.memory.keys_at(held).to(z.dtype), self.metric)
        return Neighbors(
            rows,
            self.memory.ids[held].where(valid, -1),
            self.memory.labels[held].where(valid, -1),
            distances.masked_fill(~valid, math.inf),
            self._log_weights(z, rows).exp() * valid,
        )

    @torch.no_grad()
    def explain(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Explanation:
        """The neighbours that decide for each embedding and what each contributes to each class, in evaluation.

        Args:
            z: (B, d) embeddings.
            ids: as in `forward`.
            k: neighbours listed; those that decide by default. Contributions of those that are not listed are in the
                rest, and those listed beyond the deciding ones contribute nothing.
        """
        z = self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            found = self.neighbors(z, ids=ids)
            shares, rest = self._shares(z, found, ids)
            equal = 0.0
            if self.is_calibrated:
                equal = float(self.uniform_share)
                shares, rest = calibrated_shares(shares, rest, self.evidence_scale, self.temperature, equal)
        more = None if k is None or k <= found.rows.shape[1] else self.neighbors(z, ids=ids, k=k)
        return listing(found, shares, rest, self.evidence_scale, k, more, uniform_share=equal)

    def _shares(self, z: Tensor, found: Neighbors, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Contributions (B, k, C) of neighbours to the scores of the classes, and the rest (B, C).

        Before any calibration; for checked embeddings, the neighbours that decide, and ids as in `forward`. Unless a
        head knows better, a neighbour contributes its weight to its class, at most what the class has.
        """
        probabilities = self._log_probs(z, self._check_ids(ids, len(z))).to(z.dtype).exp()
        votes = found.weights.unsqueeze(-1) * self.memory.values_at(found.rows).to(z.dtype)
        total = votes.sum(1)
        part = (probabilities / total.clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(1)
        shares = votes * part.unsqueeze(1)
        return shares, probabilities - shares.sum(1)

    @torch.no_grad()
    def outlier_scores(self, z: Tensor, *, kind: OutlierScore = "cosine", k: int = 50) -> Tensor:
        """How unlike the stored samples embeddings are; the higher the less like.

        Args:
            z: (B, d) embeddings.
            kind: ``"cosine"``, the distance to the k-th nearest of all embeddings scaled to unit length (deep nearest
                neighbours, Sun et al. 2022); ``"distance"``, that in the head's own metric; ``"density"``, minus the
                logarithm of the sum of Gaussian kernels of the k nearest, of the automatic width.
            k: of the k-th nearest; all where fewer are stored.

        Returns:
            (B,); infinite where nothing is stored.
        """
        z = self.keys_of(z).to(self.memory.keys.dtype)
        return outlier_scores(z, self.memory.all_keys(), kind, k, self.metric)

    @abstractmethod
    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        """(B, k) log share of each neighbour in the decision, for keys' space ``z`` and rows with -1 for none."""

    def _move(self, rows: Tensor, keys: Tensor) -> None:
        if self.moves:
            self.memory.write(rows, keys)

    @torch.no_grad()
    def _track(self, z: Tensor, ids: Tensor | None) -> None:
        """Move the centers of a batch's samples to their embeddings ``z``, the first of each sample; not where two
        samples were mixed."""
        if ids is None or ids.shape[1] > 1:
            return
        own = self.memory.rows_of(ids[:, 0])
        order = torch.arange(len(own), device=own.device)
        # Which of several writes to a row counts is chance on a GPU; a second view's must not.
        first = order.new_full((len(self.memory) + 1,), len(own))  # the last is that of samples without a center
        first.scatter_reduce_(0, own.where(own >= 0, len(self.memory)), order, "amin")
        chosen = ((own >= 0) & (first[own] == order)).nonzero().flatten()
        self.memory.write(own[chosen], z[chosen])

    def _coding_config(self) -> dict[str, Any]:
        """The options of compressed centers, for `config`."""
        coding = Coding(0) if self.memory.coder is None else self.memory.coder.coding
        return {
            "bytes_per_center": coding.bytes_per_row or None,
            "rotation": coding.rotation,
            "code_bits": coding.bits,
        }

    def _uniform(self, z: Tensor) -> Tensor:
        """What an empty memory answers: in evaluation all classes alike; in training it is an error."""
        if self.training and self.trains_with == "output":
            raise EmptyMemoryError(
                f"head {self.name!r} has no centers to train with: call model.memorize(loader) first"
            )
        return (z.sum(-1, keepdim=True) * 0).expand(len(z), self.num_classes) - math.log(self.num_classes)
