"""Saved models that learn and forget: each change is written beside the model and takes its place as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nnheads.errors import CheckpointError, ConfigError
from nnheads.heads import MemoryHead
from nnheads.heads.base import sample_ids
from nnheads.io import BACKBONE, HEAD, META, THUMBNAILS, build_saved_head, is_saved_model, load, read_meta, save
from nnheads.storage import check_file, editing, read_tensors, replacing, write_tensors, write_text
from nnheads.thumbnails import Thumbnails


def add(
    path: str | Path, images: Tensor | Sequence[str | Path], classes: Sequence[str] | Tensor, ids: Tensor | None = None
) -> Tensor:
    """Stores images in a saved model without training it, with a thumbnail of each; see `HeadedModel.add`.

    Args:
        path: folder of a model that `nnheads.load` can build.
        images: files, or (n, C, H, W) uint8, as the model's ``preprocessing`` takes them; none of them adds nothing.
        classes: names, new ones among them, or (n,) labels.
        ids: (n,) int64; new ones by default.

    Returns:
        (n,) the ids.

    Raises:
        CheckpointError: the folder is missing, damaged or of another version, or the disk does not take the new one.
        DataError: an image cannot be read.
        ConfigError, ShapeError: see `HeadedModel.add`. The folder is as it was after any error, and if the process is
            killed it is as it was or complete.
    """
    with editing(Path(path)):
        model = load(path)
        if not isinstance(images, Tensor):
            if model.preprocessing is None:
                raise ConfigError(f"{path} does not say how images are prepared: save it with preprocessing")
            opened = [model.preprocessing.open(image) for image in images]
            none = torch.empty(0, model.preprocessing.channels, *model.preprocessing.size, dtype=torch.uint8)
            images = torch.stack(opened) if opened else none
        if model.thumbnails is None:
            model.thumbnails = Thumbnails()
        held = model.add(images, classes, ids)
        save(model, path)
    return held


def forget(path: str | Path, ids: Tensor | Sequence[int] | int) -> int:
    """Drops samples from the head of a saved model, which need not have its backbone saved with it; nor
    need a projector of the user's own be given.

    Nothing of them stays in the folder, the thumbnails included; what was trained while they were there still saw them,
    see `HeadedModel.drop`.

    Args:
        path: folder of a saved model.
        ids: of the samples.

    Returns:
        How many samples are left.

    Raises:
        CheckpointError: the folder is missing, damaged or of another version, or the disk does not take the new one.
        ConfigError: the head has no memory.
        ShapeError: an id is not held; it is named. The folder is as it was after any error, as in `add`.
    """
    folder = Path(path)
    ids = sample_ids(ids).tolist()
    with editing(folder):
        meta = read_meta(folder)
        files = meta["files"]
        state = read_tensors(folder / HEAD, files[HEAD])
        try:
            # A projector of the user's own is not there to be built; its weights stay as they are.
            projector = meta["head"]["config"].get("projector")
            own = isinstance(projector, dict) and projector.get("kind") == "module"
            kept = {name: tensor for name, tensor in state.items() if own and name.startswith("projector.")}
            state = {name: tensor for name, tensor in state.items() if name not in kept}
            head = build_saved_head(folder, meta["head"], state, torch.nn.Identity() if own else None)
        except (AttributeError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{folder / META} does not describe a head ({error}): save the model again"
            ) from error
        if not isinstance(head, MemoryHead):
            raise ConfigError(f"{folder}: head {head.name!r} stores no samples to forget")
        head.drop(ids)
        with replacing(folder, is_saved_model) as made:
            files = {**files, HEAD: write_tensors(made / HEAD, {**head.state_dict(), **kept})}
            if THUMBNAILS in files:
                pictures = Thumbnails.from_state(read_tensors(folder / THUMBNAILS, files[THUMBNAILS]))
                pictures.drop(ids)
                files[THUMBNAILS] = write_tensors(made / THUMBNAILS, dict(pictures.state()))
            if BACKBONE in files:
                check_file(folder / BACKBONE, files[BACKBONE])
                shutil.copyfile(folder / BACKBONE, made / BACKBONE)
            write_text(made / META, json.dumps({**meta, "files": files}, indent=2, ensure_ascii=False) + "\n")
    return len(head.memory)
