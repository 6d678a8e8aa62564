"""Where a published set of images is on disk, in torchvision's layout or as class folders; downloaded where missing."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from nnheads.benchmarks.folders import Progress, class_folders, has_class_folders
from nnheads.data import ImageSet, Preprocessing
from nnheads.errors import DataError
from nnheads.storage import cache_root


@final
@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set before it is read.

    Attributes:
        name: what ``--dataset`` takes.
        title: its name in ``torchvision.datasets``.
        layout: where torchvision unpacks it, below its root.
        classes: number of classes.
        preprocessing: size, channels, and the training images' mean and std on the scale 0..1.
    """

    name: str
    title: str
    layout: str
    classes: int
    preprocessing: Preprocessing


def find(
    facts: DatasetFacts, data_dir: str | Path | None, progress: Progress | None
) -> tuple[Literal["folders", "torchvision"], Path]:
    """Where a set is and in which layout, downloading it into the cache where it is nowhere.

    Args:
        facts: of the set.
        data_dir: see `nnheads.benchmarks.datasets.load_dataset`.
        progress: called before a download.

    Raises:
        DataError: it is not there, is another, or cannot be downloaded.
    """
    wanted = f"torchvision's {facts.layout}/, or train/<class>/* and test/<class>/* ({facts.classes} classes)"
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise DataError(f"no such folder: {root}; it should hold {wanted}")
        found = _locate(facts, root)
        if found is None:
            raise DataError(f"no {facts.title} in {root}: put there {wanted}")
        return found
    roots = [Path(os.environ["NNHEADS_DATA"]).expanduser()] if os.environ.get("NNHEADS_DATA") else []
    for root in [*roots, cache_root() / "data"]:
        found = _locate(facts, root)
        if found is not None:
            return found
    return "torchvision", _download(facts, wanted, progress)


def _locate(facts: DatasetFacts, root: Path) -> tuple[Literal["folders", "torchvision"], Path] | None:
    for folder in dict.fromkeys((root, root / facts.name, root / facts.title)):
        for raw in _raw_folders(facts, folder):
            if raw.is_dir():
                return "torchvision", raw
        halves = [part for part in ("train", "test") if has_class_folders(folder / part)]
        if halves:
            for part in ("train", "test"):
                if not (folder / part).is_dir():
                    raise DataError(f"{folder} has no {part}/: it should hold both train/ and test/")
                found = len(class_folders(folder / part))
                # the parent of several sets may be itself some other set: look on, unless this is its own
                if found != facts.classes and folder.name == facts.name:
                    raise DataError(f"{folder / part} has {found} classes, but {facts.title} has {facts.classes}")
                if found != facts.classes:
                    break
            else:
                return "folders", folder
    return None


def _raw_folders(facts: DatasetFacts, folder: Path) -> Iterator[Path]:
    yield folder / facts.layout
    parts = Path(facts.layout).parts
    # the user may point at any level of torchvision's layout
    for depth in range(1, len(parts) + 1):
        if folder.parts[-depth:] == parts[:depth]:
            yield folder.joinpath(*parts[depth:])


def _download(facts: DatasetFacts, wanted: str, progress: Progress | None) -> Path:
    from torchvision import datasets

    target = cache_root() / "data" / facts.layout
    if progress is not None:
        progress(f"downloading {facts.title}", 0, 0)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=cache_root() / "data", prefix=".partial-")
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints its tries
            getattr(datasets, facts.title)(temporary, download=True)
        try:
            os.replace(Path(temporary) / facts.layout, target)
        except OSError:
            if not target.is_dir():  # else another run has just put it there
                raise
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{facts.title} is not here and cannot be downloaded ({reason[0]}): "
            f"give --data-dir a folder with {wanted}, or take digits (stream: split-digits), which needs no download"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def read(facts: DatasetFacts, raw: Path, train: bool) -> ImageSet:
    """One half of a set in torchvision's layout, as `find` found it.

    Raises:
        DataError: a file is missing or damaged.
    """
    damaged = f"{facts.title} in {raw} is incomplete or damaged: remove the folder and fetch it again"
    try:
        if facts.layout.endswith("raw"):
            return _read_idx(raw, train)
        from torchvision import datasets

        source: Any = getattr(datasets, facts.title)(str(raw.parent), train=train)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise DataError(damaged) from error
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(source.targets), class_names=tuple(source.classes))


def _read_idx(raw: Path, train: bool) -> ImageSet:
    from torchvision.datasets import mnist

    start = "train" if train else "t10k"
    images: Tensor = mnist.read_image_file(str(raw / f"{start}-images-idx3-ubyte"))
    labels: Tensor = mnist.read_label_file(str(raw / f"{start}-labels-idx1-ubyte"))
    return ImageSet(images.unsqueeze(1), labels.long(), class_names=tuple("0123456789"))
