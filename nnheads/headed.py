"""A backbone with a head in place of its classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import Tensor, nn

from nnheads import distributed
from nnheads.backbones import backbone_spec
from nnheads.batches import as_labels, unpack
from nnheads.classifier_layer import Replaced, describe_candidates, output_follows
from nnheads.errors import AttachError, ConfigError, ShapeError
from nnheads.heads import BiasedHead, Explanation, Gated, Head, MemoryHead, head_class, list_heads, sample_ids

if TYPE_CHECKING:
    from nnheads.preprocessing import Preprocessing
    from nnheads.split import Split
    from nnheads.thumbnails import Thumbnails


@final
class HeadedModel(nn.Module):
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

    head: Head

    def __init__(self, backbone: nn.Module, head: Head, replaced: tuple[Replaced, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.layer = replaced[0].name
        self.class_names: tuple[str, ...] | None = None
        self.preprocessing: Preprocessing | None = None
        self.backbone_spec: dict[str, Any] | None = backbone_spec(backbone)
        self.thumbnails: Thumbnails | None = None
        # Where the biased head cuts the backbone in two; the parts are made of the backbone's own modules.
        self._split: Split | None = None
        # Inside a tuple of dataclasses, the classifier is no child of this module.
        self._replaced = replaced
        # In training a model may return other things than in evaluation: each mode is checked once.
        self._checked_training = False
        self._checked_evaluation = False
        # Inside a tuple, what runs in the backbone's stead is no child of this module.
        self._run_by: tuple[Callable[[Tensor], Any], ...] = ()

    @property
    def in_features(self) -> int:
        """Width of the embedding."""
        return self.head.in_features if self._split is not None else self.attached()[0].in_features

    @property
    def at(self) -> str | None:
        """Name of the module behind which the biased head cuts the backbone; None where nothing is cut."""
        return self._split.at if self._split is not None else None

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are; the CPU for a model without any."""
        for tensors in (self.parameters(), self.buffers()):
            for tensor in tensors:
                return tensor.device
        return torch.device("cpu")

    def features(self, x: Tensor) -> Tensor:
        """The embedding: what enters the replaced classifier, averaged over positions where it still has any.

        For two classifiers trained by distillation it is the mean of what enters them. The backbone runs
        once. Of a model that the biased head cuts in two it is the projection, and that beside it.

        Args:
            x: a batch as the backbone takes it, (B, C, H, W) for images.

        Returns:
            (B, d) in the backbone's dtype (under autocast, that of autocast).

        Raises:
            AttachError: on the first forward, where the replaced layer turns out not to be the classifier.
            ShapeError: the embedding is not as wide as the replaced layer (an image size the backbone is not
                made for).
        """
        if self._split is None:
            return self._embedding(x)
        h = self.first_part(x)
        # The projector learns from the backbone, not the backbone from the projector. It comes first, for a layer
        # behind the cut may change h in place.
        projected = self.gated_head().project(h.detach())
        z = self.second_part(h)
        return torch.cat([projected.to(z.dtype), z], 1)

    def first_part(self, x: Tensor) -> Tensor:
        """f1 of a model that is cut in two: what enters projector and f2, (B, ...)."""
        split = self._cut()
        if not self.backbone.training and not self._checked_evaluation:
            with torch.no_grad():
                self._embedding(x)  # that the replaced layer is the classifier
        h: Tensor = split.parts(self.backbone)[0](x)
        return h

    def second_part(self, h: Tensor) -> Tensor:
        """f2 of a model that is cut in two: the embedding (n, d) of rows of what `first_part` gives."""
        split = self._cut()
        split.parts(self.backbone)[1](h)
        seen = [z for entry in self.attached() if (z := entry.tap.take()) is not None]
        if not seen:
            raise AttachError(self._not_the_classifier(f"the part behind {split.at!r} never calls it"))
        return seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)

    def gated(self, x: Tensor, ids: Tensor | None = None) -> Gated:
        """As ``forward`` in evaluation, with the gate's values and which rows skipped the second part.

        Raises:
            ConfigError: the model is not cut in two.
        """
        return self.gated_head().gated(self.first_part(x), self.second_part, ids=ids)

    def run_by(self, run: Callable[[Tensor], Any] | None) -> None:
        """What runs in the backbone's stead, such as it compiled; None for the backbone. See `nnheads.compiling`."""
        self._run_by = () if run is None else (run,)

    def cut(self, split: Split | None) -> None:
        """Cuts the backbone in two for the biased head; None makes it whole. ``attach_head`` does."""
        self._split = split

    def _cut(self) -> Split:
        if self._split is None:
            raise ConfigError("the backbone is not cut in two, nothing can skip: attach_head(model, 'biased', at=...)")
        return self._split

    def gated_head(self) -> BiasedHead:
        """The biased head that cuts the backbone in two.

        Raises:
            ConfigError: there is none.
        """
        self._cut()
        assert isinstance(self.head, BiasedHead)
        return self.head

    def _embedding(self, x: Tensor) -> Tensor:
        """What enters the replaced classifier, by running the whole backbone."""
        replaced = self.attached()
        checked = self._checked_training if self.backbone.training else self._checked_evaluation
        try:
            output = self._run_by[0](x) if self._run_by else self.backbone(x)
        except (RuntimeError, AttributeError, ValueError, TypeError) as error:
            reached = [entry.tap.take() is not None for entry in replaced]
            if checked or not any(reached) or isinstance(error, torch.OutOfMemoryError | ConfigError):
                raise
            raise AttachError(self._not_the_classifier(f"the model fails behind it ({_first_line(error)})")) from error
        seen = [entry.tap.take() for entry in replaced]
        embeddings = [z for z in seen if z is not None]
        if len(embeddings) < len(seen):
            raise AttachError(self._not_the_classifier("the model's forward never calls it"))
        for z in embeddings:
            if z.shape[-1] != replaced[0].in_features:
                raise ShapeError(
                    f"layer {self.layer!r} takes {replaced[0].in_features} features, got {z.shape[-1]} for an "
                    f"input of shape {tuple(x.shape)}: give inputs of the size the backbone is made for"
                )
        if not checked:
            # As a decorator it would load torch's compiler, a second, for those who compile nothing.
            check = torch.compiler.disable(self._check) if torch.compiler.is_compiling() else self._check
            check(output, embeddings)
        return embeddings[0] if len(embeddings) == 1 else torch.stack(embeddings).mean(0)

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
    def add(self, x: Tensor, y: Tensor | Sequence[str], ids: Tensor | None = None) -> Tensor:
        """Learns samples at once, without training: embeds them, in evaluation mode, and stores them in the head.

        For embeddings there is ``model.head.add``. Classes that were never seen widen the head.

        Args:
            x: images (n, C, H, W), uint8, which ``preprocessing`` prepares and thumbnails are made of where the model
                has any; or a batch as the backbone takes it.
            y: (n,) int64 labels, (n, C) soft labels, or names of classes: one that is new gets the next label.
            ids: (n,) int64 ids, which replace samples stored under them; new ones by default.

        Returns:
            (n,) the ids.

        Raises:
            ConfigError: the head has no memory, or images are given and there is no preprocessing.
            ShapeError: a wrong size, NaN or a negative label. The model is unchanged after any error.
        """
        head = self._memory_head("to add to")
        labels, names = as_labels(y, self.class_names, head.num_classes)
        prepare = self.preprocessing if x.dtype == torch.uint8 else nn.Identity()
        if prepare is None:
            raise ConfigError("this model does not say how images are prepared: set model.preprocessing")
        with evaluating(self):
            z = torch.cat([self.features(prepare(part).to(self.device)) for part in x.split(256)])
            held = head.add(z, labels.to(self.device), None if ids is None else ids.to(self.device))
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

    def memorize(self, loader: Iterable[Any]) -> Self:
        """Embeds all samples, in evaluation mode, and stores them in the head's memory; no-op for a head without.

        Args:
            loader: yields ``(x, y, ids)`` a batch; or ``(x, y)``, in which case a sample's position in the loader is
                its id, so a second loader needs ids of its own. A sample whose id is stored replaces it.

        Returns:
            The model.

        Raises:
            DataError: the batches are something else, or positions cannot be ids because the loader shuffles.
        """
        return self._embed_all(loader, replace=True)

    def refresh(self, loader: Iterable[Any]) -> Self:
        """Embeds the stored samples anew with the backbone as it is now; call it every few epochs of training.

        As ``memorize``, but a sample that is stored keeps its soft label and its weight, and its center only moves
        where the head's centers follow their samples. ``loader`` must give each sample the id it had.
        """
        return self._embed_all(loader, replace=False)

    @torch.no_grad()
    def _embed_all(self, loader: Iterable[Any], *, replace: bool) -> Self:
        if not self.head.uses_memory:
            return self
        with evaluating(self):
            self.head.begin_refresh(replace=replace)
            position, device = 0, self.device
            for batch in loader:
                x, y, ids = unpack(batch, loader, position)
                position += len(y)
                with torch.inference_mode():
                    z = distributed.features(self, x.to(device))
                z = z.clone()  # an ordinary tensor: the head may keep what it is given
                self.head.memorize(z, y.to(device), ids=ids.to(device))
            self.head.refreshed()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # to(), cuda(), half() and the like: the classifier follows the backbone, and parts of it hold new tensors.
        if self._split is not None:
            self._split.forget()
        for entry in self._replaced:
            entry.layer._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def attached(self) -> tuple[Replaced, ...]:
        """The classifiers that were taken out; AttachError where they are back in place."""
        if not self._replaced:
            raise AttachError("this model was detached: attach_head the backbone again")
        return self._replaced

    def detach(self) -> None:
        """Restores the classifier; see ``detach_head``."""
        for entry in self.attached():
            entry.restore()
        self._replaced = ()
        self._split = None

    def _check(self, output: object, embeddings: list[Tensor]) -> None:
        """That the output follows from the embeddings; decided by values, so only on a batch with any."""
        if not embeddings[0].numel():
            return
        if not output_follows(output, embeddings):
            raise AttachError(self._not_the_classifier("the model's output does not follow from it alone"))
        if self.backbone.training:
            self._checked_training = True
        else:
            self._checked_evaluation = True

    def _not_the_classifier(self, why: str) -> str:
        return (
            f"layer {self.layer!r} is not the classifier of {type(self.backbone).__name__}: {why}; "
            f"detach_head, then attach_head with layer=; {describe_candidates(self.backbone)}"
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
