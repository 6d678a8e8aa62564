"""A backbone with a head in place of its classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import Tensor, nn

from nnheads import distributed
from nnheads.backbones import backbone_spec
from nnheads.batches import as_labels, unpack
from nnheads.classifier_layer import Replaced
from nnheads.errors import ConfigError
from nnheads.heads import Explanation, Head, MemoryHead, head_class, list_heads, sample_ids
from nnheads.opened import OpenedModel

if TYPE_CHECKING:
    from nnheads.preprocessing import Preprocessing
    from nnheads.thumbnails import Thumbnails


@final
class HeadedModel(OpenedModel):
    """A backbone with a head in place of its classifier; made by ``attach_head``.

    Copies (``copy.deepcopy``), pickles, and saves its state as any module does. The classifier that was taken
    out is in neither ``parameters()`` nor ``state_dict()``; it follows the model to another device or dtype
    all the same, so that ``detach_head`` gives back a model that works.

    Attributes:
        backbone: the model given to ``attach_head``, its classifier replaced.
        head: the head; assign through ``attach_head(headed, "knn")``.
        layer: dotted name of the replaced classifier.
        class_names: names of the classes, None where not known.
        preprocessing: what happens to an image before the backbone, None where not known.
        backbone_spec: arguments with which ``nnheads.backbones.build_backbone`` rebuilds the backbone, None
            for a backbone of another make.
        thumbnails: pictures of the stored samples, saved with the model; None for none.
    """

    def __init__(self, backbone: nn.Module, head: Head, replaced: tuple[Replaced, ...]) -> None:
        super().__init__(backbone, head, replaced)
        self.class_names: tuple[str, ...] | None = None
        self.preprocessing: Preprocessing | None = None
        self.backbone_spec: dict[str, Any] | None = backbone_spec(backbone)
        self.thumbnails: Thumbnails | None = None

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """Log-probabilities of the classes.

        Args:
            x: a batch as the backbone takes it.
            ids: positions of the samples in the training set, int64 (B,), or (B, 2) for mixup, -1 for none.
                In training a sample's own center is left out by them.

        Returns:
            (B, C) float32. In evaluation, a model that the biased head cuts in two runs its second part only on the
            rows whose gate is below the threshold.
        """
        if self._split is not None and not self.head.training:
            return self.gated(x, ids).log_probs
        log_probs: Tensor = self.head(self.features(x), ids=ids)
        return log_probs

    def loss(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """The head's own objective, a scalar.

        Args:
            x: a batch as the backbone takes it.
            y: labels, int64 (B,), or soft labels (B, C).
            ids: as in ``forward``.
        """
        return self.head.loss(self.features(x), y, ids=ids)

    @torch.no_grad()
    def explain(self, x: Tensor, k: int | None = None) -> Explanation:
        """The stored samples that decide for each input, with what each contributes; in evaluation mode.

        Args:
            x: a batch as the backbone takes it.
            k: neighbours listed, see `MemoryHead.explain`; those that decide by default.

        Raises:
            ConfigError: the head has no memory, or ``k`` is below 1.
        """
        head = self._memory_head("to explain with")
        if k is not None and k < 1:
            raise ConfigError(f"explain: k must be 1 or more, not {k}")
        with evaluating(self):
            return head.explain(self.features(x.to(self.device)), k=k)

    @torch.no_grad()
    def add(
        self, x: Tensor, y: Tensor | Sequence[str] | Sequence[int], ids: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Learns samples at once, without training: embeds them, in evaluation mode, and stores them in the head.

        For embeddings there is ``model.head.add``. Classes that were never seen widen the head.

        Args:
            x: images (n, C, H, W), uint8, which ``preprocessing`` prepares and thumbnails are made of where the model
                has any; or a batch as the backbone takes it.
            y: (n,) int64 labels, (n, C) soft labels, or names of classes: one that is new gets the next label.
                Parameters of a head that widens are new ones, which an optimizer that was made before does not know.
            ids: (n,) ids, a tensor or a list, which replace samples stored under them; new ones by default.

        Returns:
            (n,) the ids.

        Raises:
            ConfigError: the head has no memory, or images are given and there is no preprocessing.
            ShapeError: a wrong size, NaN or a negative label. The model is unchanged after any error.
        """
        head = self._memory_head("to add to")
        labels, names = as_labels(y, self.class_names, head.num_classes)
        known = None if ids is None else sample_ids(ids)
        with evaluating(self):
            z = torch.cat([self.features(self._prepared(part)) for part in x.split(256)])
            held = head.add(z, labels.to(self.device), None if known is None else known.to(self.device))
        self.class_names = names
        if self.thumbnails is not None:
            self.thumbnails.drop(held.tolist())
            if x.dtype == torch.uint8:
                self.thumbnails.add(x, held)
        return held

    @torch.no_grad()
    def drop(self, ids: Tensor | Sequence[int] | int) -> None:
        """Forgets samples by id, at once and without training: they leave the head's memory and the thumbnails.

        What was trained while they were there still saw them: the backbone's weights, and of the head the width of its
        kernel, codebooks of compressed centers, principal components and trained layers.

        Raises:
            ConfigError: the head has no memory.
            ShapeError: an id is not held, or is no whole number; it is named and nothing is changed.
        """
        ids = sample_ids(ids)
        self._memory_head("to drop").drop(ids)
        if self.thumbnails is not None:
            self.thumbnails.drop(ids.tolist())

    def _memory_head(self, purpose: str) -> MemoryHead:
        if not isinstance(self.head, MemoryHead):
            able = [name for name in list_heads() if head_class(name).uses_memory]
            raise ConfigError(f"head {self.head.name!r} stores no samples {purpose}; heads that do: {', '.join(able)}")
        return self.head

    def _prepared(self, x: Tensor) -> Tensor:
        """A batch on the model's device, images of uint8 as the backbone takes them."""
        x = x.to(self.device)
        if x.dtype != torch.uint8:
            return x
        if self.preprocessing is None:
            raise ConfigError("this model does not say how uint8 images are prepared: set model.preprocessing")
        dtypes = [p.dtype for p in self.backbone.parameters() if p.is_floating_point()]
        return self.preprocessing(x).to(dtypes[0] if dtypes else torch.float32)

    def memorize(self, loader: Iterable[Any], *, same_images: bool = False) -> Self:
        """Embeds all samples, in evaluation mode, and stores them in the head's memory; no-op for a head without.

        Args:
            loader: yields ``(x, y, ids)`` a batch; or ``(x, y)``, in which case a sample's position in the loader is
                its id, so a second loader needs ids of its own. A sample whose id is stored replaces it. Images of
                uint8 are prepared by ``preprocessing``.
            same_images: whether samples replace only themselves, so that their thumbnails stay.

        Returns:
            The model.

        Raises:
            DataError: the batches are something else, or positions cannot be ids because the loader shuffles.
            ConfigError: they are uint8 images and there is no preprocessing.
        """
        return self._embed_all(loader, replace=True, same_images=same_images)

    def refresh(self, loader: Iterable[Any]) -> Self:
        """Embeds the stored samples anew with the backbone as it is now; call it every few epochs of training.

        As ``memorize``, but a sample that is stored keeps its soft label and its weight, and its center only moves
        where the head's centers follow their samples. ``loader`` must give each sample the id it had.
        """
        return self._embed_all(loader, replace=False, same_images=True)

    @torch.no_grad()
    def _embed_all(self, loader: Iterable[Any], *, replace: bool, same_images: bool) -> Self:
        if not self.head.uses_memory:
            return self
        with evaluating(self):
            self.head.begin_refresh(replace=replace)
            position, device = 0, self.device
            try:
                for batch in loader:
                    x, y, ids = unpack(batch, loader, position)
                    position += len(y)
                    with torch.inference_mode():
                        z = distributed.features(self, self._prepared(x))
                    z = z.clone()  # an ordinary tensor: the head may keep what it is given
                    self.head.memorize(z, y.to(device), ids=ids.to(device))
                    if not same_images and self.thumbnails is not None:
                        self.thumbnails.drop(ids.tolist())
            except BaseException:
                self.head.abandon_refresh()
                raise
            self.head.refreshed()
        return self


def check_headed(function: str, model: object) -> None:
    """ConfigError unless a function of the library was given a headed model."""
    if not isinstance(model, HeadedModel):
        raise ConfigError(
            f"{function} takes what attach_head returns, not {type(model).__name__}: model = attach_head(backbone)"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each module gets its own mode back, for a user may have frozen some."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
