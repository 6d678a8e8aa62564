"""What every layer of a network makes of a data set: embeddings of many layers in one pass, on disk where they are
many."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, fx, nn

from nnheads.devices import Precision, autocast_for, prefers_channels_last, resolve_device
from nnheads.errors import ConfigError, DataError, ShapeError, unknown_name
from nnheads.evaluation import target_for
from nnheads.headed import HeadedModel
from nnheads.loaders import Data, Target, ordered_batches
from nnheads.preprocessing import Preprocessing

OUTPUT = "output"
"""The name under which the model's own output comes, beside those of its layers."""


_WORKING = (nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
"""What says in which dimension the channels are."""


class _Worked(NamedTuple):
    """How many numbers a layer gave that works on the last dimension, and how wide that is."""

    numbers: int
    width: int


@final
class LayerEmbeddings(Mapping[str, Tensor]):
    """Layer name to its (N, d) float32 embeddings, in the order of the data; and under ``"output"`` the model's output.

    Where they are on disk, they are read as they are used, and the files go with `close`, at the end of a ``with``
    block, or with the object.

    Attributes:
        labels: (N,) int64.
        ids: (N,) int64, -1 where the data has none.
    """

    def __init__(
        self, tensors: dict[str, Tensor], labels: Tensor, ids: Tensor, folder: tempfile.TemporaryDirectory[str] | None
    ) -> None:
        self._tensors, self.labels, self.ids, self._folder = tensors, labels, ids, folder

    @property
    def on_disk(self) -> bool:
        """Whether the embeddings were too many for the memory allowed."""
        return self._folder is not None

    def __getitem__(self, layer: str) -> Tensor:
        if layer not in self._tensors:
            raise unknown_name("layer", layer, self._tensors)
        return self._tensors[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        """Forget the embeddings, and remove their files where there are any."""
        self._tensors = {}
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> LayerEmbeddings:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@torch.no_grad()
def layer_embeddings(
    model: nn.Module,
    data: Data,
    layers: Sequence[str] | None = None,
    *,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    preprocessing: Preprocessing | None = None,
    memory: int = 2**30,
    folder: str | Path | None = None,
) -> LayerEmbeddings:
    """The embeddings of a data set at several layers, in one pass and in evaluation mode.

    Feature maps (B, C, H, W) are averaged over positions, as in "DNN or k-NN", and so are sequences of tokens
    (B, T, d); vectors stay as they are. Feature maps are taken for channels-last, (B, H, W, C), as Swin Transformers
    have them, where what worked last inside the layer is an ``nn.Linear`` or ``nn.LayerNorm`` whose features are in the
    last dimension. Of a layer that gives several tensors (attention) the first is taken; of one
    that is called several times in a forward, the last call. A model that the biased head cuts in two runs whole for
    every sample; its answers are the same.

    Args:
        model: any module, or what `attach_head` returned. Moved to ``device``, otherwise unchanged.
        data: an `ImageSet`, a data set of (x, y) or (x, y, id), or a loader.
        layers: names as in ``model.named_modules()``; of a headed model also those inside its backbone, without
            ``backbone.`` in front. Default: see `default_layers`.
        batch_size: of what is not a loader already.
        device: see `resolve_device`.
        precision: see `nnheads.devices.resolve_precision`.
        preprocessing: of uint8 images; by default the model's own, where it is headed.
        memory: bytes of embeddings held in memory; where they are more, all go to files.
        folder: where the files go, in a folder of their own; by default where the system keeps temporary files.

    Raises:
        UnknownNameError: a layer that the model does not have.
        DataError: there are no samples.
        ShapeError: a layer gives no tensor, or another width from one batch to the next; or feature maps are as high as
            they are deep, and either dimension may hold the channels.
    """
    names = list(default_layers(model) if layers is None else dict.fromkeys(layers))
    if memory < 0:
        raise ConfigError(f"layer_embeddings: memory must be 0 bytes or more, got {memory}")
    modules = {name: _module(model, name) for name in names}
    where = resolve_device(device)
    model.to(where)
    if isinstance(model, HeadedModel):
        target = target_for(model, where, precision)
    else:
        target = Target(where, preprocessing=preprocessing, channels_last=prefers_channels_last(where, precision))
    # called as a whole it would not run its second part for samples that its gate answers
    cut = model if isinstance(model, HeadedModel) and model.at is not None else None
    store = _Store([*names, OUTPUT], memory, folder)
    seen: dict[str, Tensor] = {}
    inside: dict[str, _Worked | None] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            inside[name] = _features_last(module, output)

        return hook

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, fx.Proxy):  # which it is while the backbone is cut in two
                # now: a layer behind this one may write over it
                seen[name] = _pooled(name, output, inside.pop(name, None))

        return hook

    hooks = [
        part.register_forward_hook(watch(name))  # before the next, for the layer may be such a part itself
        for name, module in modules.items()
        for part in module.modules()
        if isinstance(part, _WORKING)
    ]
    hooks += [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    labels, ids = [], []
    try:
        for x, y, sample_ids in ordered_batches(data, target, batch_size=batch_size):
            seen.clear()
            with autocast_for(where, precision):
                seen[OUTPUT] = _pooled(OUTPUT, model(x) if cut is None else cut.head(cut.features(x)))
                if cut is not None and not seen.keys() >= modules.keys():
                    _run_backbone(cut, x)
            store.add({name: _counted(name, seen, len(y)) for name in [*names, OUTPUT]})
            labels.append(y.cpu())
            ids.append(sample_ids.cpu())
        if not labels:
            raise DataError("layer_embeddings: there are no samples, the data set is empty")
        return LayerEmbeddings(store.finish(), torch.cat(labels), torch.cat(ids), store.folder)
    except BaseException:
        store.abandon()
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training


def default_layers(model: nn.Module) -> list[str]:
    """The layers between the top of a network and its output: blocks where it has any, else its single layers.

    A block is a child of an ``nn.Sequential`` or ``nn.ModuleList`` that has layers of its own and is not inside
    another block; beside them stand the convolutions and linear layers that are in no block, and last, under the
    classifier's name, the embedding that a head decides by.
    """
    root = model.backbone if isinstance(model, HeadedModel) else model
    found: list[str] = []

    def walk(module: nn.Module, prefix: str, listed: bool) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            has_parts = any(True for _ in child.children())
            container = isinstance(child, nn.Sequential | nn.ModuleList)
            if listed and has_parts and not container:
                found.append(full)
            elif has_parts:
                walk(child, f"{full}.", container)
            elif isinstance(child, nn.Linear | nn.modules.conv._ConvNd):
                found.append(full)

    walk(root, "", isinstance(root, nn.Sequential | nn.ModuleList))
    if isinstance(model, HeadedModel) and model.layer not in found:
        found.append(model.layer)  # the classifier is out, what entered it comes out here: the embedding
    return found


def _module(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(model, HeadedModel):
        modules = {**dict(model.backbone.named_modules()), **modules}
    if name == OUTPUT or not name or name not in modules:
        raise unknown_name("layer", name, [key for key in modules if key])
    return modules[name]


def _run_backbone(model: HeadedModel, x: Tensor) -> None:
    """Calls every module of the backbone: of one that is cut in two, those that the cut goes through are not."""
    model.backbone(x)
    for entry in model.attached():
        entry.tap.take()


def _features_last(module: nn.Module, output: Any) -> _Worked | None:
    """What a layer that works on the last dimension gave; None for others, and for norms of maps (B, C, H, W)."""
    if isinstance(module, nn.Linear):
        width = module.out_features
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        width = module.normalized_shape[0]
    else:
        return None
    own = isinstance(output, Tensor) and output.shape[-1] == width
    return _Worked(output.numel(), width) if own else None


def _pooled(name: str, value: Any, last: _Worked | None = None) -> Tensor:
    """(B, d) numbers of a layer's output; ``last`` is what worked last inside the layer, see `_features_last`."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, Mapping):  # what Hugging Face's models return
        value = value.get("logits", next(iter(value.values()), None))
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(f"layer {name!r} gave {got}, not one row a sample: name another layer")
    value = value.float()
    if value.ndim >= 4:
        # As many numbers: not what weighs channels by a vector, as in squeeze-and-excitation.
        channels_last = last is not None and last == (value.numel(), value.shape[-1])
        if channels_last and value.shape[1] == value.shape[-1]:
            raise ShapeError(
                f"layer {name!r} gave {tuple(value.shape)}, whose channels may be in dimension 1 or {value.ndim - 1}: "
                "give images of another size, or name another layer"
            )
        value = value.flatten(1, -2).mean(1) if channels_last else value.flatten(2).mean(2)
    elif value.ndim == 3:
        value = value.mean(1)
    pooled: Tensor = value.reshape(len(value), -1)
    return pooled.to("cpu", copy=True)


def _counted(name: str, seen: Mapping[str, Tensor], count: int) -> Tensor:
    """What a layer gave for a batch of so many samples."""
    if name not in seen:
        raise ShapeError(f"layer {name!r} was not called in the forward: name another layer")
    value = seen[name]
    if len(value) != count:
        raise ShapeError(f"layer {name!r} gave {len(value)} rows for {count} samples: name another layer")
    return value


@final
class _Store:
    """Rows of several layers, in memory until they are too many, then in a file a layer."""

    def __init__(self, names: Sequence[str], memory: int, folder: str | Path | None) -> None:
        self.parts: dict[str, list[Tensor]] = {name: [] for name in names}
        self.memory, self.home, self.held = memory, folder, 0
        self.widths: dict[str, int] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.files: dict[str, BinaryIO] = {}

    def add(self, rows: dict[str, Tensor]) -> None:
        for name, values in rows.items():
            width = self.widths.setdefault(name, values.shape[1])
            if values.shape[1] != width:
                raise ShapeError(f"layer {name!r}: {values.shape[1]} features after {width}; give inputs of one size")
            self.parts[name].append(values)
            self.held += values.numel() * values.element_size()
        if self.held > self.memory or self.files:
            self._spill()

    def finish(self) -> dict[str, Tensor]:
        if not self.files:
            return {name: torch.cat(parts) for name, parts in self.parts.items()}
        found = {}
        for name, file in self.files.items():
            file.close()
            values = np.memmap(file.name, dtype=np.float32, mode="c")  # copy on write: a torch tensor is writable
            found[name] = torch.from_numpy(values).view(-1, self.widths[name])
        return found

    def abandon(self) -> None:
        for file in self.files.values():
            file.close()
        if self.folder is not None:
            self.folder.cleanup()

    def _spill(self) -> None:
        try:
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="nnheads-layers-", dir=self.home)
                for number, name in enumerate(self.parts):
                    self.files[name] = open(Path(self.folder.name) / f"{number}.f32", "wb")  # noqa: SIM115
            for name, parts in self.parts.items():
                for values in parts:
                    values.contiguous().numpy().tofile(self.files[name])
                parts.clear()
        except OSError as error:
            where = self.home or tempfile.gettempdir()
            size = math.ceil(self.held / 2**20)
            raise ConfigError(
                f"layer_embeddings: {size} MB and more do not fit into {where} ({error.strerror}): give another folder="
            ) from error
