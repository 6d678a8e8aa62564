"""Which layer of a model is its classifier, and how to read what enters it.

The classifier is replaced by a tap, which keeps the tensor that enters it and passes it on. Whether the layer
found really is the classifier shows on the first forward: the model's output must then follow from the tapped
tensor alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from nnheads.errors import AttachError

# Models trained by distillation end in two classifiers and average their outputs. The first of a pair reads
# the class token, the second the distillation token: timm's DeiT and LeViT, Hugging Face's DeiT, LeViT,
# SwiftFormer.
_TWINS = (
    ("head", "head_dist"),
    ("head", "dist_head"),
    ("cls_classifier", "distillation_classifier"),
    ("classifier", "classifier_distill"),
)

# What a model may still do to its classifier's output without another layer being involved.
_FINISHES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda z: z,
    lambda z: z.log_softmax(1),
    lambda z: z.softmax(1),
    torch.sigmoid,
    torch.relu,
    torch.tanh,
)


@final
class ClassifierTap(nn.Module):
    """Stands where the classifier was: keeps its input as an embedding and passes it on.

    A linear layer takes its features from the last dimension, a convolution from dimension 1; all other
    dimensions but the first are averaged. What is passed on has the input's shape and holds that average
    everywhere, so averaging behind the classifier returns the embedding unchanged; it is a copy, so an
    activation that works in place behind the classifier cannot alter the embedding.

    Attributes:
        seen: the embedding (B, d) of the last forward, None before it and once it was taken.
        marking: whether what is passed on differs from position to position, with the same average and signs, so that
            the output shows how the model pools.
        marked: whether there was more than one position then.
        plain: whether the input is passed on as it is, where the model does not average over positions.
    """

    def __init__(self, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.seen: Tensor | None = None
        self.marking = False
        self.marked = False
        self.plain = False

    def forward(self, x: Tensor) -> Tensor:
        """Keeps (B, d), averaged over positions where there are any; returns the shape of ``x``."""
        if x.ndim <= 2:
            self.seen = x
            return x.clone()
        last = self.channel_dim % x.ndim
        positions = [dim for dim in range(1, x.ndim) if dim != last]
        mean = x.mean(positions, keepdim=True)
        self.seen = mean.flatten(1)
        if self.marking:
            self.marked = x[0].numel() > mean[0].numel()
            return mean * _marks(x, positions)
        return x.clone() if self.plain else mean.expand_as(x).clone()

    def take(self) -> Tensor | None:
        """The embedding of the last forward, which is then forgotten, so that its graph is not kept alive."""
        seen, self.seen = self.seen, None
        return seen

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph behind it can be neither copied nor pickled.
        return {**self.__dict__, "seen": None}


def _marks(x: Tensor, positions: list[int]) -> Tensor:
    """Factors for the positions of ``x``, other ones for each feature, between 0.5 and 1.5 and 1 on average."""
    shape = [x.shape[dim] if dim in positions else 1 for dim in range(x.ndim)]
    [features] = [dim for dim in range(1, x.ndim) if dim not in positions]
    places = torch.arange(math.prod(shape), device=x.device, dtype=torch.float64).reshape(shape)
    each = torch.arange(x.shape[features], device=x.device, dtype=torch.float64)
    each = each.reshape([-1 if dim == features else 1 for dim in range(x.ndim)])
    # Multiples of the golden ratio modulo 1 are spread evenly, in no order that a model could pool by.
    spread = ((places * len(each.flatten()) + each) * 0.6180339887498949) % 1
    return (1 + (spread - spread.mean(positions, keepdim=True)) / 2).to(x.dtype)


@dataclass(frozen=True)
class Replaced:
    """A classifier that was taken out, and all there is to put it back.

    Attributes:
        name: its dotted name in the model.
        layer: the layer itself.
        tap: what stands in its place.
        places: every (parent, attribute) at which the model holds the layer; more than one where it is
            shared.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    tap: ClassifierTap
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def in_features(self) -> int:
        """Width of what enters the layer."""
        return self.layer.in_features if isinstance(self.layer, nn.Linear) else self.layer.in_channels

    @property
    def num_classes(self) -> int:
        """Width of what leaves the layer."""
        return self.layer.out_features if isinstance(self.layer, nn.Linear) else self.layer.out_channels

    def install(self) -> None:
        """Puts the tap where the layer is."""
        self.tap.train(self.layer.training)
        for parent, attribute in self.places:
            setattr(parent, attribute, self.tap)

    def restore(self) -> None:
        """Puts the layer back where the tap is."""
        self.layer.train(self.tap.training)
        for parent, attribute in self.places:
            setattr(parent, attribute, self.layer)


def find_classifiers(model: nn.Module, layer: str | None = None) -> tuple[Replaced, ...]:
    """Finds the classifier: ``layer``, else timm's own record, else the last linear layer, else the last 1x1
    conv.

    Nothing is changed yet: call ``install`` on what is returned.

    Args:
        model: the whole network.
        layer: dotted name of the classifier, as in ``model.named_modules()``.

    Returns:
        One entry, or two for a model with a classifier of its own for distillation.

    Raises:
        AttachError: where there is none, it carries a head already, or ``layer`` names something else.
    """
    if any(isinstance(module, ClassifierTap) for module in model.modules()):
        raise AttachError(
            "this model already carries a head: pass the headed model itself to swap the head, or detach_head first"
        )
    layers = dict(_layers(model))
    names: tuple[str, ...]
    names = (_named(model, layer, layers),) if layer is not None else _timm_classifiers(model, layers) or _last(layers)
    if not names:
        raise AttachError(
            f"{type(model).__name__} has no classifier to replace: it needs an nn.Linear or a 1x1 nn.Conv2d; "
            f"{describe_candidates(model)}"
        )
    names = _with_twin(names, layers)
    if "" in names:
        raise AttachError("the model is a single layer: wrap it, nn.Sequential(layer), so that it can be replaced")
    found = tuple(_replacement(model, name, layers[name]) for name in names)
    for entry in found:
        if entry.in_features < 1:
            raise AttachError(f"layer {entry.name!r} has no size yet (a lazy layer): run the model once first")
        if entry.in_features != found[0].in_features:
            raise AttachError(f"classifiers {', '.join(map(repr, names))} read features of different widths")
    return found


def describe_candidates(model: nn.Module, most: int = 6) -> str:
    """``candidates for layer=: ...``, the layers that could be a classifier, the likeliest first."""
    names = [
        f"{name!r} ({entry.in_features} -> {entry.num_classes})"
        for name, module in reversed(list(_layers(model)))
        if name and (entry := Replaced(name, module, ClassifierTap(1), ()))
    ]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"candidates for layer=: {', '.join(names[:most]) or 'none'}{more}"


def logits_of(output: object) -> Tensor | None:
    """The tensor that a model's output is, begins with or has as its ``logits``; None where there is none."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def output_is_pooled(output: object, mean: Tensor) -> bool:
    """Whether a model's output (B, d) is pooled from positions that were marked, of which (B, d) is the average.

    So it is where a model classifies every token and then takes the last one, or the average of those that are no
    padding, or the largest: between the least and the largest of the marks.
    """
    out = logits_of(output)
    if out is None or out.shape != mean.shape or not out.is_floating_point():
        return False
    out, mean = out.detach().float(), mean.detach().float()
    return bool(((out - mean).abs() <= mean.abs() / 2 + 1e-2 * _largest(mean)).all())


def output_follows(output: object, seen: Sequence[Tensor]) -> bool:
    """Whether a model's output follows from what its taps saw, with no other layer in between.

    Args:
        output: what the model returned: a tensor, a tuple whose first item counts, or a mapping with
            ``logits``.
        seen: what each tap kept, (B, d) each.

    Returns:
        True where the output is the mean of what was seen, plain, times a number, or through softmax, log-
        softmax, sigmoid, ReLU or tanh; or, of two classifiers, both in turn.
    """
    if isinstance(output, Mapping):  # transformers.ModelOutput is one
        output = output.get("logits")
    if isinstance(output, tuple | list) and len(seen) > 1 and len(output) == len(seen):
        return all(output_follows(item, [z]) for item, z in zip(output, seen, strict=True))
    output = logits_of(output)
    if output is None:
        return False
    z = torch.stack(tuple(seen)).mean(0).detach()
    out = output.detach()
    if out.ndim > 2:
        # (B, d, h, w), or (B, h, w, d): their average is that of what the tap passed on.
        dim = 1 if out.shape[1] == z.shape[1] else -1
        out = out.movedim(dim, 1).flatten(2).mean(2)
    if out.shape != z.shape or not out.is_floating_point():
        return False
    tolerance = 1e-2 if torch.finfo(out.dtype).bits < 32 or torch.finfo(z.dtype).bits < 32 else 1e-4
    out, z = out.float(), z.float()
    expected = [finish(z) for finish in _FINISHES]
    expected.append(z * ((out * z).sum() / (z * z).sum()))  # a temperature
    return any(
        torch.allclose(out, each, rtol=tolerance, atol=tolerance * _largest(each), equal_nan=True)
        or bool(each.isnan().any() and torch.equal(out.isnan(), each.isnan()))
        for each in expected
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().nan_to_num(0.0, 0.0).max())


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that can be a classifier, in module order."""
    for name, module in model.named_modules():
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        if isinstance(module, nn.Linear) or pointwise:
            yield name, cast("nn.Linear | nn.Conv2d", module)


def _named(model: nn.Module, layer: str, layers: Mapping[str, nn.Module]) -> str:
    """The first name of the layer that the user named; a layer that is shared has several."""
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        raise AttachError(f"the model has no layer {layer!r}; {describe_candidates(model)}") from None
    for name, known in layers.items():
        if known is module:
            return name
    raise AttachError(
        f"layer {layer!r} is a {type(module).__name__}, not an nn.Linear or a 1x1 nn.Conv2d; "
        f"{describe_candidates(model)}"
    )


def _timm_classifiers(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """What timm records as the classifier of its models; empty for other models."""
    config = vars(model).get("default_cfg")
    recorded = config.get("classifier") if isinstance(config, Mapping) else None
    if not recorded:
        return ()
    names = (recorded,) if isinstance(recorded, str) else tuple(recorded)
    modules = dict(model.named_modules())
    for name in names:
        if isinstance(modules.get(name), nn.Identity):
            raise AttachError(f"the classifier {name!r} of this timm model is empty: create it with num_classes >= 1")
    found = []
    for name in names:
        inside = [known for known in layers if known == name or known.startswith(f"{name}.")]
        found += inside[-1:]
    return tuple(found)


def _last(layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    return tuple((linear or list(layers))[-1:])


def _with_twin(names: tuple[str, ...], layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Adds the classifier's twin where the model has one; the one that reads the class token comes first."""
    if len(names) != 1:
        return names
    parts = names[0].split(".")
    for pair in _TWINS:
        for here in set(pair) & set(parts):
            both = tuple(".".join(each if part == here else part for part in parts) for each in pair)
            if all(name in layers for name in both):
                return both
    return names


def _replacement(model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> Replaced:
    places = []
    for place, module in model.named_modules(remove_duplicate=False):
        if module is layer:
            parent, _, attribute = place.rpartition(".")
            places.append((model.get_submodule(parent), attribute))
    tap = ClassifierTap(-1 if isinstance(layer, nn.Linear) else 1)
    return Replaced(name, layer, tap, tuple(places))
