"""Cut a backbone in two for the biased head, and make the head that fits the place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnheads.classifier_layer import Replaced
from nnheads.errors import AttachError, ConfigError
from nnheads.headed import HeadedModel, evaluating
from nnheads.heads import BiasedHead, DenseHead, Head, build_head
from nnheads.heads.projectors import TRUNK_DIMS, auxiliary_projector
from nnheads.split import Split

if TYPE_CHECKING:
    from nnheads.preprocessing import Preprocessing

_DIM = 64
_USUAL_SIZES = (32, 224, 64, 28, 299, 8)


def two_parts(parts: tuple[Any, ...], at: str | None) -> tuple[nn.Module, str]:
    """``(f1, f2)`` as one model, and the name of the first.

    Raises:
        AttachError: it is something else than two modules.
        ConfigError: ``at`` is given as well.
    """
    if len(parts) != 2 or not all(isinstance(part, nn.Module) for part in parts):
        raise AttachError("attach_head takes a model, or its two parts (f1, f2), two nn.Modules")
    if at not in (None, "f1"):
        raise ConfigError(f"at={at!r} is for a whole model: of (f1, f2) the cut is between them")
    model = nn.Sequential(OrderedDict(f1=parts[0], f2=parts[1]))
    model.training = parts[0].training
    return model, "f1"


def cut_in_two(
    model: nn.Module,
    replaced: tuple[Replaced, ...],
    head: str | Head,
    at: str | None,
    num_classes: int,
    example: Tensor | None,
    preprocessing: Preprocessing | None,
    options: dict[str, Any],
) -> tuple[BiasedHead, Split]:
    """The cut, and a biased head for it; the model is left as it was.

    Args:
        model: a network, or one that carries a head.
        replaced: its classifiers.
        head: ``"biased"``, or such a head with a projector.
        at: name of the module behind which to cut.
        num_classes: of a new head.
        example: a batch as the model takes it; None to try usual sizes.
        preprocessing: of the model's images, where known.
        options: of a new head.

    Raises:
        AttachError: the model cannot be cut there.
        ConfigError: the head is another one or does not fit.
    """
    if head != "biased" and not (isinstance(head, BiasedHead) and head.projected):
        name = head if isinstance(head, str) else head.name
        raise ConfigError(f"at= cuts the backbone for the head 'biased' with a projector, not for {name!r}")
    backbone = model.backbone if isinstance(model, HeadedModel) else model
    options = dict(options)
    projector = options.pop("projector", "pooled")
    trunk: tuple[str, nn.Module] | None = None
    if isinstance(projector, str) and projector == "aux":
        found = auxiliary_projector(backbone, at)
        if found is None:
            raise ConfigError(
                "projector='aux' takes the auxiliary classifier of torchvision's GoogLeNet (at inception4a or "
                f"inception4d) or Inception v3 (at Mixed_6e), not of {type(backbone).__name__} at {at!r}: give 'pooled'"
            )
        at, trunk = found[0], found[1:]
    if at is None:
        names = ", ".join(name for name, _ in backbone.named_children())
        raise ConfigError(f"a projector needs a place: at= the name of a module; the model's parts: {names}")
    with _tapped(model, replaced):
        split = Split(backbone, at)
        if isinstance(head, BiasedHead):
            if options:
                raise ConfigError(f"options {', '.join(options)} are for a head by name: the head given has its own")
            if head.in_features - head.projected != replaced[0].in_features:
                raise ConfigError(
                    f"the head takes {head.in_features - head.projected} features beside its projection, but the "
                    f"backbone gives {replaced[0].in_features}"
                )
            return head, split
        h = _features(backbone, split, example, preprocessing)
        new = _head_for(h, replaced[0].in_features, num_classes, projector, trunk, options)
    _start_from(new, model.head if isinstance(model, HeadedModel) else replaced[0].layer)
    return new, split


def _head_for(
    h: Tensor,
    width: int,
    num_classes: int,
    projector: object,
    trunk: tuple[str, nn.Module] | None,
    options: dict[str, Any],
) -> BiasedHead:
    dim = options.pop("dim", None)
    shape = list(h.shape[1:])
    if trunk is not None:
        spec = {"kind": trunk[0], "shape": shape, "dim": TRUNK_DIMS[trunk[0]] if dim is None else dim}
    elif isinstance(projector, nn.Module):
        projector.to(h.device)
        with torch.no_grad(), evaluating(projector):
            phi = projector(h)
        if not isinstance(phi, Tensor) or phi.dim() != 2 or len(phi) != len(h):
            got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
            raise ConfigError(f"the projector must map h {tuple(h.shape)} to (B, dim), but gives {got}")
        dim = int(phi.shape[1])
        head = build_head("biased", dim + width, num_classes, projector=projector, dim=dim, **options)
        assert isinstance(head, BiasedHead)
        return head
    elif projector == "pooled":
        spec = {"kind": "pooled", "shape": shape, "dim": _DIM if dim is None else dim}
    else:
        raise ConfigError(f"projector must be 'pooled', 'aux' or a module, got {projector!r}")
    if not isinstance(spec["dim"], int) or spec["dim"] < 1:
        raise ConfigError(f"head 'biased': dim must be a whole number 1 or more, got {spec['dim']!r}")
    head = build_head("biased", spec["dim"] + width, num_classes, projector=spec, **options)
    assert isinstance(head, BiasedHead)
    if trunk is not None:
        head.projector = trunk[1]
    return head


@torch.no_grad()
def _start_from(head: BiasedHead, before: nn.Module) -> None:
    """The classifier that the network was trained with goes on in the head."""
    if isinstance(before, DenseHead) and not before.hidden:
        before = before.output
    if isinstance(before, BiasedHead):
        before = before.classifier.layer
    own = head.classifier.layer
    if isinstance(before, nn.Linear | nn.Conv2d) and before.weight.numel() == own.weight.numel():
        own.weight.copy_(before.weight.flatten(1))
        own.bias.copy_(before.bias if before.bias is not None else torch.zeros_like(own.bias))
        head.classifier.seen.fill_(True)


@contextmanager
def _tapped(model: nn.Module, replaced: tuple[Replaced, ...]) -> Iterator[None]:
    """The classifiers replaced by their taps for a while, where they are not already."""
    replaces = not isinstance(model, HeadedModel)
    for entry in replaced if replaces else ():
        entry.install()
    try:
        yield
    finally:
        for entry in replaced:
            entry.tap.take()
            if replaces:
                entry.restore()


@torch.no_grad()
def _features(backbone: nn.Module, split: Split, example: Tensor | None, preprocessing: Preprocessing | None) -> Tensor:
    """h of a batch of two; also tries that f2 takes it."""
    weights = next(backbone.parameters(), torch.empty(0))
    with evaluating(backbone):
        first, second = split.parts(backbone)
        errors = []
        for x in _inputs(backbone, example, preprocessing):
            try:
                h = first(x.to(weights) if x.is_floating_point() else x.to(weights.device))
                second(h)
            except Exception as error:  # a size that the network does not take
                errors.append((str(error).splitlines() or [type(error).__name__])[0])
                continue
            if not isinstance(h, Tensor) or h.dim() < 2 or len(h) != len(x):
                raise AttachError(f"{split.at!r} does not give one tensor a sample: name another module to cut at")
            return h
    reason = f" ({errors[-1]})" if errors else ""
    raise AttachError(f"no usual input size fits the model{reason}: give example=, a batch as the model takes it")


def _inputs(backbone: nn.Module, example: Tensor | None, preprocessing: Preprocessing | None) -> Iterator[Tensor]:
    if example is not None:
        yield example
        return
    if preprocessing is not None:
        yield torch.zeros(2, preprocessing.channels, *preprocessing.size)
        return
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            for size in _USUAL_SIZES:
                yield torch.zeros(2, module.in_channels, size, size)
            return
        if isinstance(module, nn.Linear):
            yield torch.zeros(2, module.in_features)
            return
