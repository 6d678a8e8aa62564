"""A backbone whose classifier was taken out: what enters it, whole or cut in two, and putting it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from nnheads.classifier_layer import Replaced, describe_candidates, logits_of, output_follows, output_is_pooled
from nnheads.errors import AttachError, ConfigError, ShapeError
from nnheads.heads import BiasedHead, Gated, Head

if TYPE_CHECKING:
    from nnheads.split import Split


class OpenedModel(nn.Module):
    """What `HeadedModel` knows of its backbone. Abstract.

    Args:
        backbone: its classifier is replaced by what remembers its input.
        head: takes the classifier's place.
        replaced: the classifiers that were taken out.
    """

    head: Head

    def __init__(self, backbone: nn.Module, head: Head, replaced: tuple[Replaced, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.layer = replaced[0].name
        # Where the biased head cuts the backbone in two; the parts are made of the backbone's own modules.
        self._split: Split | None = None
        # Inside a tuple of dataclasses, the classifier is no child of this module.
        self._replaced = replaced
        # In training a model may return other things than in evaluation: each mode is checked once.
        self._checked_training = False
        self._checked_evaluation = False
        # Whether the model pools over positions behind its classifier other than by their average, as by taking the
        # last: its output is the embedding then.
        self._pools = False
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
        return torch.cat([projected, z], 1)  # in the wider dtype: the projector stays in float32

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
        for entry in replaced:
            entry.tap.marking = not checked
        try:
            output = self._run(x)
        except (RuntimeError, AttributeError, ValueError, TypeError) as error:
            reached = [entry.tap.take() is not None for entry in replaced]
            if checked or not any(reached) or isinstance(error, torch.OutOfMemoryError | ConfigError):
                raise
            raise AttachError(self._not_the_classifier(f"the model fails behind it ({_first_line(error)})")) from error
        finally:
            for entry in replaced:
                entry.tap.marking = False
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
            if self._pools:  # what was passed on was marked
                output = self._run(x)
                for entry in replaced:
                    entry.tap.take()
        if self._pools:
            pooled = logits_of(output)
            assert pooled is not None
            return pooled
        return embeddings[0] if len(embeddings) == 1 else torch.stack(embeddings).mean(0)

    def _run(self, x: Tensor) -> Any:
        return self._run_by[0](x) if self._run_by else self.backbone(x)

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
        [tap, *others] = [entry.tap for entry in self._replaced]
        marked, tap.marked = tap.marked, False
        if not output_follows(output, embeddings):
            if others or not marked or not output_is_pooled(output, embeddings[0]):
                raise AttachError(self._not_the_classifier("the model's output does not follow from it alone"))
            self._pools = tap.plain = True
        if self.backbone.training:
            self._checked_training = True
        else:
            self._checked_evaluation = True

    def _not_the_classifier(self, why: str) -> str:
        return (
            f"layer {self.layer!r} is not the classifier of {type(self.backbone).__name__}: {why}; "
            f"detach_head, then attach_head with layer=; {describe_candidates(self.backbone)}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
