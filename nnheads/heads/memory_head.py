"""What the heads that decide by stored samples share."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..code_index import CodeIndex
from ..coding import Coding
from ..errors import ConfigError, EmptyMemoryError, ShapeError
from ..functional import Metric, neighbor_distances
from ..index import Engine, Index, build_index
from ..memory import ColumnWidth, Memory
from .base import Head, one_of, positive, sample_ids
from .evidence import Explanation, Neighbors, Scale, calibrated_shares, listing
from .outliers import OutlierScore, outlier_scores

MAX_NEW_CLASSES: Final = 10_000
"""Most classes that one call adds: a label beyond is a mistake (an id, a pixel), not a wish for that many columns."""

CODE_ENGINES: Final = ("auto", "torch")
"""Engines of a head whose centers are compressed; ``"torch"`` keeps FAISS out of the search among codes."""

_SAMPLED: Final = 1024  # stored samples that a width is chosen from


class MemoryHead(Head):
    """A head that decides by the k nearest of the samples it stores. Abstract.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
        k: number of neighbours.
        metric: distance of the search.
        normalize: whether embeddings are scaled to unit length first, when stored and when asked.
        engine: neighbour search. Exact: ``"auto"`` (default), ``"torch"``, ``"faiss"``; on CPUs approximate:
            ``"ivf"``, ``"hnsw"``, ``"pq"``, exact below 5,000 centers. See `nnheads.index.build_index`.
        columns: further numbers stored with each row, see `Memory`.
        dim: width of the stored keys where it is not ``in_features``.
        coding: how keys are compressed, None for not at all; see `coding_of`.
    """

    uses_memory = True
    #: What `_shares` are in: parts of probabilities, or of logits.
    evidence_scale: ClassVar[Scale] = "probability"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        k: int,
        metric: Metric = "l2",
        normalize: bool = False,
        engine: Engine = "auto",
        columns: Mapping[str, ColumnWidth] | None = None,
        dim: int | None = None,
        coding: Coding | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        positive(self.name, "k", k, integer=True)
        one_of(self.name, "metric", metric, ("l2", "l1", "cosine"))
        if coding is not None and engine not in CODE_ENGINES:
            raise ConfigError(
                f"head {self.name!r}: engine {engine!r} searches raw centers, and compressed ones are searched among "
                "their codes: leave out engine or bytes_per_center"
            )
        self.k = k
        self.metric: Metric = metric
        self.normalize = normalize
        self.engine: Engine = engine
        self.memory = Memory(dim or in_features, num_classes, columns, coding)
        self._refreshing = False
        self._index: Index | CodeIndex | None = build_index(engine, metric)
        self._indexed: Tensor | None = None  # the key buffer the index was built on
        self._warned = False
        self._sampled: tuple[Tensor, Tensor] | None = None  # ids and keys as they came before they were compressed

    @property
    def follows(self) -> bool:
        """Whether training keeps the centers near their samples, by tracking or because they are trained."""
        return False

    @property
    def moves(self) -> bool:
        """Whether a refresh moves the centers that are stored."""
        return True

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

    def refreshed(self) -> None:
        self._refreshing = False
        if self.memory.coder is not None:
            self._sampled = self.memory.keys_as_they_came(_SAMPLED)
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

    @torch.no_grad()
    def widen(self, num_classes: int) -> None:
        super().widen(num_classes)
        self.memory.widen(self.num_classes)

    # ---- asking --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def neighbors(self, z: Tensor, *, ids: Tensor | None = None, k: int | None = None) -> Neighbors:
        """The stored samples that decide for each embedding, with their weights.

        Args:
            z: (B, d) embeddings.
            ids: as in `forward`: a sample's own center is left out.
            k: number of neighbours; the head's own by default.
        """
        z = self._embed(self._check(z))
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
        z = self._embed(self._check(z)).to(self.memory.keys.dtype)
        return outlier_scores(z, self.memory.all_keys(), kind, k, self.metric)

    @abstractmethod
    def _log_weights(self, z: Tensor, rows: Tensor) -> Tensor:
        """(B, k) log share of each neighbour in the decision, for keys' space ``z`` and rows with -1 for none."""

    def _embed(self, z: Tensor) -> Tensor:
        """From embeddings to the space of the keys."""
        return F.normalize(z, dim=-1) if self.normalize else z

    def _search(self, z: Tensor, own_ids: Tensor | None, k: int) -> Tensor:
        """Rows of the k nearest centers (B, k), nearest first, -1 where there are fewer; own centers left out."""
        own = None
        if own_ids is not None and len(self.memory):
            own = self.memory.rows_of(own_ids)
            if not bool((own >= 0).any()):
                own = None
        elif own_ids is None and self.training:
            self._warn_without_ids()
        query = z.detach().to(self.memory.keys.dtype)
        if own is None:
            return self._current_index().search(query, k)
        rows = self._current_index().search(query, k + own.shape[1])
        mine = (rows.unsqueeze(-1) == own.unsqueeze(1)).any(-1) & (rows >= 0)
        # A stable sort moves the own centers behind the others and leaves those in their order of distance.
        order = mine.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
        return rows.gather(1, order).masked_fill(mine.gather(1, order), -1)

    def _move(self, rows: Tensor, keys: Tensor) -> None:
        if self.moves:
            self.memory.write(rows, keys)

    @torch.no_grad()
    def _track(self, z: Tensor, ids: Tensor | None) -> None:
        """Move the centers of a batch's samples to their embeddings ``z``; not where two samples were mixed."""
        if ids is None or ids.shape[1] > 1:
            return
        own = self.memory.rows_of(ids[:, 0])
        self.memory.write(own[own >= 0], z[own >= 0])

    @torch.no_grad()
    def _stored_distances(self) -> Tensor:
        """Squared distances (n, k) of some stored samples to their neighbours, leave-one-out, nearest first."""
        k = min(self.k, len(self.memory) - 1)
        if k < 1:
            return self.memory.keys.new_zeros(0, 1)
        if self._sampled is not None:
            # What is asked later is no code either, and lies farther from decoded centers than they do.
            (ids, keys), self._sampled = self._sampled, None
        else:
            held = len(self.memory)
            rows = torch.linspace(0, held - 1, min(held, _SAMPLED), device=self.memory.ids.device).long()
            ids, keys = self.memory.ids[rows], self.memory.keys_at(rows)
        found = self._search(keys, ids.unsqueeze(1), k)
        return neighbor_distances(keys, self.memory.keys_at(found), self.metric).square()

    def update_index(self) -> None:
        """Bring the search index up to date now, rather than at the next search."""
        self._current_index()

    def _current_index(self) -> Index | CodeIndex:
        memory = self.memory
        if memory.coder is not None and memory.coder.quantizer is not None and memory.coded:
            if not isinstance(self._index, CodeIndex):
                self._index = CodeIndex(self.metric, scan=self.engine != "torch")
            self._index.build(memory.codes[: len(memory)], memory.coder.quantizer)
            return self._index
        if self._index is None or isinstance(self._index, CodeIndex):
            self._index, self._indexed = build_index(self.engine, self.metric), None
        grown_from = memory.grown_from
        changed = memory.take_changes()
        if changed is not None and self._indexed is not None and grown_from == id(self._indexed):
            self._index.grow(memory.keys, memory.active)
            self._indexed = memory.keys
        if changed is None or self._indexed is not self.memory.keys:
            self._index.build(self.memory.keys, self.memory.active)
            self._indexed = self.memory.keys
        elif len(changed):
            self._index.update(changed)
        return self._index

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

    def _warn_without_ids(self) -> None:
        if not self._warned and self.trains_with == "output":
            self._warned = True
            warnings.warn(
                f"head {self.name!r} trains without ids: each sample counts its own center among its neighbours, which "
                "weakens the loss; pass ids (wrap the data set in nnheads.with_ids)",
                UserWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        # An index is rebuilt from the keys whenever it is needed: never copied, pickled or saved.
        return {**self.__dict__, "_index": None, "_indexed": None, "_sampled": None}
