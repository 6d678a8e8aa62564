"""Weights that a backbone starts from: those its makers published, and those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnheads.backbones import build_backbone, list_backbones
from nnheads.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from nnheads.headed import HeadedModel

_CLASSIFIER = "classifier."
_BACKBONE = "backbone."


def build_pretrained(name: str, in_channels: int = 3, **options: Any) -> nn.Module:
    """Builds a network with the weights that its makers published, downloaded where they are not in their cache.

    The classifier keeps the classes it was trained on, as `attach_head` replaces it anyway: give that ``num_classes=``.

    Args:
        name: ``torchvision:NAME`` (its default weights) or ``timm:NAME`` (``timm:NAME.TAG`` for others than timm's own
            choice).
        in_channels: channels of the images; timm's weights are adapted to others than they were trained on.
        **options: as in `nnheads.build_backbone`.

    Raises:
        UnknownNameError: no network has that name.
        ConfigError: there are no weights for it, or they can be neither found nor downloaded.
    """
    source, _, model = name.partition(":")
    if source not in ("torchvision", "timm") or not model:
        raise ConfigError(
            f"backbone {name!r} has no published weights: take torchvision:NAME or timm:NAME, or weights in a file"
        )
    if f"{source}:{model.partition('.')[0]}" not in list_backbones(source):
        return build_backbone(name, 1000, in_channels)  # raises what says which names are near
    wanted = {"weights": "DEFAULT", "progress": False} if source == "torchvision" else {"pretrained": True}
    try:
        return build_backbone(name, 1000, in_channels, **wanted, **options)
    except Exception as error:  # downloads fail in more ways than can be listed: each library has its own errors
        if in_channels != 3 and source == "torchvision" and isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"no weights for {name!r} ({reason}): connect to the network once, or save them as safetensors and give "
            "the file"
        ) from error


def published_statistics(name: str, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each channel that published weights were trained with, on the scale 0 to 1.

    Args:
        name: as in `build_pretrained`.
        model: what that returned.

    Returns:
        None where they are not recorded.
    """
    source, _, short = name.partition(":")
    if source == "timm":
        found = vars(model).get("pretrained_cfg") or {}
        mean, std = found.get("mean"), found.get("std")
    else:
        import torchvision

        transforms = torchvision.models.get_model_weights(short).DEFAULT.transforms()
        mean, std = getattr(transforms, "mean", None), getattr(transforms, "std", None)
    return (tuple(mean), tuple(std)) if mean and std else None


def load_weights(model: HeadedModel, path: str | Path) -> None:
    """Loads a file of weights into the backbone of a model; the classifier's, which the head replaced, are left out.

    Args:
        model: what ``attach_head`` returned.
        path: a safetensors file: a network's state dict, or ``backbone.safetensors`` as `nnheads.save` writes it; or
            the folder of a saved model.

    Raises:
        CheckpointError: the file is missing or no safetensors file, or its tensors do not fit the backbone, which is
            as it was then.
        AttachError: the model was detached.
    """
    path = Path(path)
    file = path / "backbone.safetensors" if path.is_dir() else path
    state = _read(file)
    own = model.backbone.state_dict()
    if not own.keys() & state.keys() and all(
        name.startswith((_BACKBONE, _CLASSIFIER + "0.", _CLASSIFIER + "1.")) for name in state
    ):
        state = {n.removeprefix(_BACKBONE): t for n, t in state.items() if n.startswith(_BACKBONE)}
    replaced = tuple(f"{entry.name}." for entry in model.attached())
    state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith(replaced)}
    problems = [f"{name!r} is missing" for name in own if name not in state]
    problems += [f"{name!r} is not in the network" for name in state if name not in own]
    problems += [
        f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in the network"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{file} does not fit {type(model.backbone).__name__}: {problems[0]}{more}; give this network's weights"
        )
    model.backbone.load_state_dict(state)


def freeze(model: HeadedModel) -> None:
    """Keeps the backbone as it is while a head is trained: no gradient, and `nnheads.fit` leaves its norms alone."""
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(f"no such file: {file}: give a safetensors file with the weights of a backbone")
    try:
        state: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file ({error}): pickled weights are not read; save them with "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    return state
