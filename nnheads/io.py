"""Save a headed model to a folder and load it again: JSON and safetensors, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from nnheads.attach import attach_head, detach_head
from nnheads.backbones import build_backbone
from nnheads.data import ImageSet
from nnheads.errors import AttachError, CheckpointError, ConfigError, UnknownNameError
from nnheads.headed import HeadedModel
from nnheads.heads import BiasedHead, Head, MemoryHead, build_head
from nnheads.preprocessing import Preprocessing
from nnheads.storage import read_tensors, recover, replacing, write_tensors, write_text
from nnheads.thumbnails import Thumbnails

FORMAT: Final = "nnheads-model"
FORMAT_VERSION: Final = 1
META: Final = "head.json"
HEAD: Final = "head.safetensors"
BACKBONE: Final = "backbone.safetensors"
THUMBNAILS: Final = "thumbnails.safetensors"
_FILES: Final = (HEAD, BACKBONE, THUMBNAILS)
# Options of a network that make its builder read further files, maybe pickled ones: never taken from a checkpoint.
_NEVER_FROM_FILE: Final = frozenset(
    {
        "weights",
        "weights_backbone",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "progress",
    }
)


def save(model: HeadedModel, path: str | Path, *, backbone: bool = True, thumbnails: ImageSet | None = None) -> Path:
    """Saves a model to a folder of ``head.json``, ``head.safetensors`` and, where asked, ``backbone.safetensors``.

    The folder is written beside ``path`` and put in its place once it is complete. A saved model that is there already
    is replaced only then: whatever interrupts the save, the old one or the new one is there, whole.

    Args:
        model: what ``attach_head`` returned. It is not changed.
        path: the folder; made where it is missing.
        backbone: whether the backbone's weights are saved too (with the classifier that the head replaced, so that
            ``detach_head`` works on what was loaded). Without them ``load`` has to be given the backbone.
        thumbnails: training images, of which small pictures of the samples that the head stores are saved too, so that
            evidence can be looked at; the model's own ``thumbnails`` by default. Never of samples that it does not
            hold.

    Returns:
        The folder.

    Raises:
        CheckpointError: ``path`` holds something that is not a saved model, or the disk does not take it.
    """
    with replacing(Path(path), is_saved_model) as folder:
        held = model.head.memory.ids[: len(model.head.memory)] if isinstance(model.head, MemoryHead) else torch.zeros(0)
        pictures = model.thumbnails if thumbnails is None else Thumbnails.of_images(thumbnails, held)
        _write(model, folder, backbone, None if pictures is None else pictures.of(held.tolist()))
    return Path(path)


@torch.inference_mode(False)
def load(
    path: str | Path,
    backbone: nn.Module | tuple[nn.Module, nn.Module] | None = None,
    device: str | torch.device = "cpu",
    *,
    projector: nn.Module | None = None,
) -> HeadedModel:
    """Loads what ``save`` wrote; the outputs are those of the model saved, bit for bit.

    Args:
        path: the folder.
        backbone: the network to put the head on, where nnheads cannot build it by name or where its weights were not
            saved. Saved weights are loaded into it. It is changed in place, as by ``attach_head``; an error leaves it
            as it was. ``(f1, f2)`` where the head was attached so.
        device: where the model is wanted.
        projector: of a biased head, where it is a module of the user's; its weights are loaded.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the folder is missing, truncated, corrupted, from something else or from a newer nnheads, or
            the backbone does not fit.
    """
    folder = Path(path)
    recover(folder)
    meta = read_meta(folder)
    files = meta["files"]
    head_state = read_tensors(folder / HEAD, files[HEAD])
    backbone_state = read_tensors(folder / BACKBONE, files[BACKBONE]) if BACKBONE in files else None
    thumbnails = read_thumbnails(folder, files)
    try:
        head = build_saved_head(folder, meta["head"], head_state, projector)
        preprocessing = Preprocessing.from_dict(meta["preprocessing"]) if meta["preprocessing"] else None
        own = backbone is None
        if backbone is None:
            backbone = _build_backbone(folder, meta["backbone"], backbone_state is not None)
        model = _attach(folder, backbone, head, meta["layer"], meta.get("at"))
        try:
            if backbone_state is not None:
                _load_backbone(folder, model, backbone_state, with_classifier=own)
        except BaseException:
            detach_head(model)
            raise
        if meta["channels_last"]:
            model.backbone.to(memory_format=torch.channels_last)
        model.preprocessing = preprocessing
        model.class_names = tuple(meta["class_names"]) if meta["class_names"] is not None else None
        model.thumbnails = thumbnails
    except (KeyError, TypeError, ConfigError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{folder / META} does not describe a model ({what}): save the model again") from error
    return model.to(device).eval()


# ---- writing -----------------------------------------------------------------------------------------------------


def _write(model: HeadedModel, folder: Path, backbone: bool, thumbnails: Thumbnails | None) -> None:
    import nnheads

    files = {HEAD: write_tensors(folder / HEAD, dict(model.head.state_dict()))}
    if thumbnails is not None:
        files[THUMBNAILS] = write_tensors(folder / THUMBNAILS, dict(thumbnails.state()))
    if backbone:
        files[BACKBONE] = write_tensors(folder / BACKBONE, _backbone_state(model))
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"nnheads": nnheads.__version__, "torch": torch.__version__},
        "head": {
            "name": model.head.name,
            "in_features": model.head.in_features,
            "num_classes": model.head.num_classes,
            "config": model.head.config(),
        },
        "layer": model.layer,
        "at": model.at,
        "backbone": _json_or_none(model.backbone_spec),
        "channels_last": _is_channels_last(model.backbone),
        "preprocessing": model.preprocessing.to_dict() if model.preprocessing is not None else None,
        "class_names": list(model.class_names) if model.class_names is not None else None,
        "files": files,
    }
    try:
        text = json.dumps(meta, indent=2, ensure_ascii=False)
    except TypeError as error:
        raise CheckpointError(f"cannot save head {model.head.name!r}: its config() is not JSON ({error})") from error
    write_text(folder / META, text + "\n")


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a saved model and nothing of the user's beside it, so that it may be replaced."""
    if not {entry.name for entry in folder.iterdir()} <= {META, *_FILES}:
        return False
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and meta.get("format") == FORMAT


def _backbone_state(model: HeadedModel) -> dict[str, Any]:
    state = {f"backbone.{name}": tensor for name, tensor in model.backbone.state_dict().items()}
    for place, entry in enumerate(model.attached()):
        state |= {f"classifier.{place}.{name}": tensor for name, tensor in entry.layer.state_dict().items()}
    return state


def _json_or_none(spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """The spec, or None where an option of it cannot be written down, so that the backbone cannot be rebuilt."""
    try:
        json.dumps(spec)
    except TypeError:
        return None
    return spec


def _is_channels_last(module: nn.Module) -> bool:
    """Whether convolution weights are in that order, which decides the kernels and with them the last bit."""
    return any(
        p.dim() == 4 and not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last)
        for p in module.parameters()
    )


# ---- reading -----------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        what = "no such folder" if not folder.exists() else f"it has no {META}"
        raise CheckpointError(f"{folder} is not a saved model ({what}): give the folder that nnheads.save wrote")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): save the model again or copy it anew") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by nnheads.save: give the folder that nnheads.save wrote")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        what = "upgrade nnheads" if newer else "save the model again"
        raise CheckpointError(f"{path} has format {version!r}, and this nnheads reads format {FORMAT_VERSION}: {what}")
    needed = {"head": dict, "layer": str, "files": dict, "channels_last": bool}
    wrong = [key for key, kind in needed.items() if not isinstance(meta.get(key), kind)]
    wrong += [key for key in ("backbone", "preprocessing", "class_names") if key not in meta]
    if wrong or HEAD not in meta["files"]:
        raise CheckpointError(
            f"{path} is incomplete ({', '.join(wrong) or HEAD}): save the model again or copy it anew"
        )
    return meta


def read_thumbnails(folder: Path, files: dict[str, Any]) -> Thumbnails | None:
    """The pictures in a saved model; None where there are none."""
    if THUMBNAILS not in files:
        return None
    return Thumbnails.from_state(read_tensors(folder / THUMBNAILS, files[THUMBNAILS]))


def build_saved_head(
    folder: Path, fields: dict[str, Any], state: dict[str, Tensor], projector: nn.Module | None = None
) -> Head:
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are random, and replaced at once
            head = build_head(fields["name"], fields["in_features"], fields["num_classes"], **fields["config"])
    except UnknownNameError as error:
        raise CheckpointError(f"{folder}: {error}; import the module that registers this head first") from error
    if isinstance(head, BiasedHead) and head.projected and head.projector is None:
        if projector is None:
            raise CheckpointError(f"{folder}: its head has a projector of yours: load(path, projector=your_module)")
        head.projector = projector
    elif projector is not None:
        raise CheckpointError(f"{folder}: its head {head.name!r} takes no projector of yours: load it without")
    _match_dtypes(head, state)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / HEAD} does not fit head {head.name!r} ({reason}): save the model again"
        ) from error
    return head


def _build_backbone(folder: Path, spec: dict[str, Any] | None, with_weights: bool) -> nn.Module:
    if spec is None:
        raise CheckpointError(f"{folder}: its backbone has no name to build it by: load(path, backbone=your_model)")
    if not with_weights:
        raise CheckpointError(f"{folder} was saved without its backbone's weights: load(path, backbone=your_model)")
    refused = sorted(_NEVER_FROM_FILE & set(spec))
    if refused:
        raise CheckpointError(
            f"{folder / META}: backbone option {refused[0]!r} is not taken from a file; load(path, backbone=...)"
        )
    # The weights drawn here are replaced at once: the caller's random numbers go on as if none had been.
    with torch.random.fork_rng(devices=[]):
        return build_backbone(**spec)


def _attach(
    folder: Path, backbone: nn.Module | tuple[nn.Module, nn.Module], head: Head, layer: str, at: str | None
) -> HeadedModel:
    try:
        return attach_head(backbone, head, layer=layer, at=at)
    except (AttachError, ConfigError) as error:
        raise CheckpointError(f"{folder} does not fit {type(backbone).__name__}: {error}") from error


def _load_backbone(folder: Path, model: HeadedModel, state: dict[str, Tensor], *, with_classifier: bool) -> None:
    parts: list[tuple[str, nn.Module]] = [("backbone.", model.backbone)]
    if with_classifier:
        parts += [(f"classifier.{place}.", entry.layer) for place, entry in enumerate(model.attached())]
    pairs = [
        (module, {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
        for prefix, module in parts
    ]
    for module, tensors in pairs:  # all are checked before any is changed
        _check_fit(folder, module, tensors)
    for module, tensors in pairs:
        _match_dtypes(module, tensors)
        module.load_state_dict(tensors)


def _check_fit(folder: Path, module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    problems = [f"{name!r} is missing" for name in own if name not in state]
    problems += [f"{name!r} is not in the model given" for name in state if name not in own]
    problems += [
        f"{name!r} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model given"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{folder / BACKBONE} does not fit {type(module).__name__}: {problems[0]}{more}; give the same network"
        )


def _match_dtypes(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives each parameter and buffer the dtype it was saved in, which loading alone would cast to the module's."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
