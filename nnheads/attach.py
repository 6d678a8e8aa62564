"""Put a head on any backbone, and take it off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnheads.classifier_layer import Replaced, find_classifiers
from nnheads.cutting import cut_in_two, two_parts
from nnheads.errors import AttachError, ConfigError
from nnheads.headed import HeadedModel
from nnheads.heads import BiasedHead, Head, build_head
from nnheads.split import Split

if TYPE_CHECKING:
    from nnheads.preprocessing import Preprocessing

__all__ = ["HeadedModel", "attach_head", "detach_head"]


def attach_head(
    model: nn.Module | tuple[nn.Module, nn.Module],
    head: str | Head = "nngk",
    *,
    layer: str | None = None,
    at: str | None = None,
    example: Tensor | None = None,
    num_classes: int | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> HeadedModel:
    """Replaces the classifier of a model by a head.

    The model is changed in place: it becomes the ``backbone`` of what is returned, and ``detach_head``
    restores it. Given a model that carries a head already, swaps the head, keeps the backbone, and returns
    the same object.

    Args:
        model: a classifier: torchvision's, timm's, Hugging Face's, ``nn.Sequential``, your own. For the head
            ``"biased"`` also its two parts ``(f1, f2)``, where it cannot be cut ``at`` a module of its own.
        head: name of a head (see ``nnheads.list_heads``), or a head.
        layer: dotted name of the classifier layer. By default what timm records for its models, else the last
            ``nn.Linear``, else the last 1x1 convolution. Whether that is the classifier is checked on the
            first forward. Where it is applied at several positions (tokens, pixels), embeddings are pooled over them
            as the model pools its answers: by their average, or by taking the last, the largest and the like.
        at: for the head ``"biased"``: dotted name of the module behind which the backbone is cut in two, so that what
            comes after runs only for the samples that need it. With ``projector="aux"`` the place of torchvision's
            auxiliary classifier by default.
        example: with ``at``, a batch as the model takes it, from which the projector's size follows; by default
            the size is found by trying usual ones.
        num_classes: classes of the head; by default the width of the replaced layer, or the number of
            ``class_names``.
        preprocessing: what happens to an image before the backbone; kept, and saved with the model.
        class_names: names of the classes; kept, and saved with the model. A head put in place of another keeps those of
            its model where it has as many classes as the other.
        **options: options of the head. With ``at`` also ``projector`` (``"pooled"``, ``"aux"`` for the trunk of
            the auxiliary classifier of torchvision's GoogLeNet and Inception v3, or a module from h to (B, dim)) and
            ``dim``, its width (64). The head's classifier starts with the weights of the one it replaces.

    Raises:
        AttachError: no classifier can be found or replaced, or the model cannot be cut.
        UnknownNameError: no head has that name.
        ConfigError: options that the head does not have or that do not fit together.
    """
    if isinstance(model, tuple):
        model, at = two_parts(model, at)
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach_head takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, HeadedModel):
        replaced = model.attached()
        if layer is not None and layer not in {entry.name for entry in replaced}:
            raise AttachError(f"the head replaces layer {model.layer!r}: detach_head before attaching at {layer!r}")
        old_classes = model.head.num_classes
    else:
        replaced = find_classifiers(model, layer)
        old_classes = replaced[0].num_classes
    names = tuple(class_names) if class_names is not None else None
    if isinstance(head, Head):
        asked = num_classes if num_classes is not None else max(len(names or ()), head.num_classes)
        if asked != head.num_classes:
            raise ConfigError(f"the head given has {head.num_classes} classes, not {asked}")
    if num_classes is None:
        num_classes = len(names) if names is not None else old_classes
    elif names is not None and len(names) != num_classes:
        raise ConfigError(f"{len(names)} class_names for num_classes={num_classes}: give one name a class")
    split: Split | None = None
    new_head: Head
    wants_cut = at is not None or (head == "biased" and isinstance(options.get("projector"), str | nn.Module))
    if wants_cut:
        images = preprocessing or (model.preprocessing if isinstance(model, HeadedModel) else None)
        new_head, split = cut_in_two(model, replaced, head, at, num_classes, example, images, options)
    else:
        new_head = _make_head(head, replaced, num_classes, options)

    # Nothing is changed before this line: an error above leaves the model as it was.
    if isinstance(model, HeadedModel):
        headed = model
        headed.head = new_head
    else:
        for entry in replaced:
            entry.install()
        headed = HeadedModel(model, new_head, replaced)
        headed.training = model.training
    headed.cut(split)
    new_head.to(headed.device).train(model.training)
    if names is not None:
        headed.class_names = names
    elif headed.class_names is not None and new_head.num_classes not in (old_classes, len(headed.class_names)):
        headed.class_names = None  # of other classes than the new head's
    if preprocessing is not None:
        headed.preprocessing = preprocessing
    return headed


def detach_head(headed: nn.Module) -> nn.Module:
    """Takes the head off and restores the model's own classifier.

    Returns:
        The model that was given to ``attach_head``: the same modules, the same keys in its state dict, and
        the classifier with the values it had. ``headed`` cannot be used any more; its ``head`` can.

    Raises:
        AttachError: it carries no head.
    """
    if not isinstance(headed, HeadedModel):
        raise AttachError(f"detach_head takes what attach_head returned, not {type(headed).__name__}")
    headed.detach()
    return headed.backbone


def _make_head(head: str | Head, replaced: tuple[Replaced, ...], num_classes: int, options: dict[str, Any]) -> Head:
    in_features = replaced[0].in_features
    if isinstance(head, str):
        return build_head(head, in_features, num_classes, **options)
    if options:
        raise ConfigError(f"options {', '.join(options)} are for a head by name: the head given has its own already")
    if isinstance(head, BiasedHead) and head.projected:
        raise ConfigError("the head given has a projector: say with at= behind which module the backbone is cut")
    if head.in_features != in_features:
        raise ConfigError(f"the head takes {head.in_features} features, but the backbone gives {in_features}")
    return head
