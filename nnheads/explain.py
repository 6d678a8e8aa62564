"""Evidence for decisions, for people to look at: neighbours with their pictures, and what if some were gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.headed import HeadedModel
from nnheads.heads import Explanation, MemoryHead
from nnheads.thumbnails import Thumbnails, to_webp

_BATCH = 16  # images explained at once: the contributions of many neighbours to many classes take room
_QUERY = 256  # pixels of the picture of what was asked about


@contextmanager
def without(model: HeadedModel, ids: Tensor | Sequence[int]) -> Iterator[HeadedModel]:
    """The model as it would be without some samples, for the length of a block: exact, for they are really dropped.

    They are dropped from a copy of the head; the model's own is back afterwards, whatever happens.

    Args:
        model: with a head that stores samples.
        ids: of the samples.

    Raises:
        ConfigError: the head has no memory.
        ShapeError: an id is not held; it is named.
    """
    head = model.head
    if not isinstance(head, MemoryHead):
        raise ConfigError(f"head {head.name!r} stores no samples that could be left out")
    changed = copy.deepcopy(head)
    changed.drop(ids)
    model.head = changed
    try:
        yield model
    finally:
        model.head = head


@final
@dataclass(frozen=True)
class NeighborEvidence:
    """One stored sample that decided.

    Attributes:
        id: of the sample.
        label: name of the class it was given.
        distance: to the input, in the head's metric.
        weight: share in the decision, 0 to 1.
        share: what it contributes to the score of the predicted class.
        picture: WebP, None where there is none.
    """

    id: int
    label: str
    distance: float
    weight: float
    share: float
    picture: bytes | None


@final
@dataclass(frozen=True)
class ImageEvidence:
    """Why an image was answered as it was.

    Attributes:
        name: of the image.
        picture: WebP.
        classes: name and probability of the likeliest, the first being the answer.
        all_classes: probability of each class, by name.
        neighbors: the nearest first.
        scale: what shares are parts of: ``"probability"`` or ``"logit"``.
        others: number of further samples that decided, and their weight together.
        rest: what the score of the predicted class has from elsewhere.
        uniform_share: part of the probability that calibration shares equally over all classes.
        what_if: probability of each class without some samples, by name; None where not asked for.
        lost: weight, in the decision, of the samples left out.
        remarks: what else there is to say about it.
    """

    name: str
    picture: bytes
    classes: tuple[tuple[str, float], ...]
    all_classes: Mapping[str, float]
    neighbors: tuple[NeighborEvidence, ...]
    scale: str
    others: tuple[int, float]
    rest: float
    what_if: Mapping[str, float] | None = None
    lost: float = 0.0
    remarks: tuple[str, ...] = ()
    uniform_share: float = 0.0

    @property
    def predicted(self) -> str:
        """Name of the likeliest class."""
        return self.classes[0][0]

    @property
    def predicted_without(self) -> str | None:
        """Name of the likeliest class without the samples left out; None where that was not asked for."""
        return None if self.what_if is None else max(self.what_if, key=lambda name: (self.what_if or {})[name])

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without pictures."""
        found: dict[str, Any] = {
            "image": self.name,
            "classes": [{"class": name, "probability": p} for name, p in self.classes],
            "scale": self.scale,
            "neighbors": [
                {"id": n.id, "class": n.label, "distance": n.distance, "weight": n.weight, "share": n.share}
                for n in self.neighbors
            ],
            "others": {"samples": self.others[0], "weight": self.others[1]},
            "rest": self.rest,
            "shared_equally": self.uniform_share,
        }
        if self.what_if is not None:
            found["what_if"] = [{"class": name, "probability": p} for name, p in self.what_if.items()]
            found["weight_left_out"] = self.lost
        if self.remarks:
            found["remarks"] = list(self.remarks)
        return found


@final
class Pictures:
    """Where the neighbours' pictures come from: thumbnails, and behind them the images that the model was trained on.

    Args:
        thumbnails: of the model.
        images: the training images, known by the ids that the head knows them by.
    """

    def __init__(self, thumbnails: Thumbnails | None = None, images: ImageSet | None = None) -> None:
        self.thumbnails = thumbnails or Thumbnails()
        self.images = images
        ids: list[int] = [] if images is None else images.ids.tolist()
        self._places = {sample_id: place for place, sample_id in enumerate(ids)}

    def get(self, sample_id: int, label: str) -> bytes | None:
        """WebP of a sample; None where there is none.

        Raises:
            DataError: the image of that id is of another class, so the images are not those the model was trained on.
        """
        found = self.thumbnails.get(sample_id)
        place = self._places.get(sample_id)
        if found is not None or place is None or self.images is None:
            return found
        known = self.images.class_names[int(self.images.labels[place])]
        if known != label:
            raise DataError(
                f"sample {sample_id} is of class {label!r} in the model and of {known!r} in the images given: give "
                "those the model was trained on"
            )
        return to_webp(self.images.images[place])


def gather_evidence(
    model: HeadedModel,
    images: Tensor,
    names: Sequence[str],
    *,
    pictures: Pictures | None = None,
    listed: int = 12,
    top: int = 5,
    leave_out: Sequence[int] | None = None,
) -> list[ImageEvidence]:
    """Why a model answers images as it does.

    Args:
        model: with a head that stores samples, and with a preprocessing.
        images: (n, C, H, W) uint8, as the model's preprocessing takes them.
        names: of the images, n.
        pictures: of the neighbours; the model's thumbnails by default.
        listed: neighbours of each, at most.
        top: classes of each, at most.
        leave_out: ids of samples; what the model would answer without them is told too.

    Raises:
        ConfigError: the head has no memory, or the model no preprocessing.
        ShapeError: the images have another form, or an id is not held.
    """
    if model.preprocessing is None:
        raise ConfigError("this model does not say how images are prepared: set model.preprocessing")
    pictures = Pictures(model.thumbnails) if pictures is None else pictures
    x, labels = model.preprocessing(images), label_names(model)
    found: list[ImageEvidence] = []
    gone = torch.tensor(list(leave_out or ()), dtype=torch.int64)
    for part in torch.arange(len(x)).split(_BATCH):
        whole = model.explain(x[part])
        alternative: list[Mapping[str, float] | None] = [None] * len(part)
        if len(gone):
            with without(model, gone):
                changed = model.explain(x[part]).probabilities.tolist()
            alternative = [dict(zip(labels, row, strict=True)) for row in changed]
        lost = (whole.weights * torch.isin(whole.ids, gone.to(whole.ids.device))).sum(1).tolist()
        for row, place in enumerate(part.tolist()):
            found.append(
                ImageEvidence(
                    name=names[place],
                    picture=to_webp(images[place], _QUERY),
                    what_if=alternative[row],
                    lost=lost[row],
                    **_one(whole, row, labels, pictures, listed, top),
                )
            )
    return found


def label_names(model: HeadedModel) -> tuple[str, ...]:
    """Names of all classes of a model; the number of a class that was never named."""
    names = model.class_names or ()
    return names + tuple(str(label) for label in range(len(names), model.head.num_classes))


def _one(
    whole: Explanation, row: int, labels: Sequence[str], pictures: Pictures, listed: int, top: int
) -> dict[str, Any]:
    best = whole.probabilities[row].topk(min(top, len(labels)))
    winner = int(best.indices[0])
    ids, given = whole.ids[row].tolist(), whole.labels[row].tolist()
    held = [at for at, sample_id in enumerate(ids) if sample_id >= 0]
    distances, weights = whole.distances[row].tolist(), whole.weights[row].tolist()
    shares = whole.shares[row, :, winner].tolist()
    shown = [
        NeighborEvidence(
            ids[at],
            labels[given[at]],
            distances[at],
            weights[at],
            shares[at],
            pictures.get(ids[at], labels[given[at]]),
        )
        for at in held[:listed]
    ]
    return {
        "classes": tuple((labels[c], p) for c, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        "all_classes": dict(zip(labels, whole.probabilities[row].tolist(), strict=True)),
        "neighbors": tuple(shown),
        "scale": whole.scale,
        "others": (len(held[listed:]), sum(weights[at] for at in held[listed:])),
        "rest": float(whole.rest[row, winner]),
        "uniform_share": whole.uniform_share,
    }
