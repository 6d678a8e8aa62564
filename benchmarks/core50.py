"""CORe50 as its authors' archives unpack, and as Avalanche lays it out: ``core50_32x32/s<session>/o<object>/*.png``.

Avalanche's own loader reads pickled indexes, which are never loaded here, and prints; the folders say as much. Sessions
3, 7 and 10 are the test set, as in all of its authors' scenarios.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from nnheads.benchmarks.folders import Progress, cached_images, class_folders, images_in
from nnheads.data import ImageSet, Preprocessing
from nnheads.errors import DataError

FOLDERS: Final = ("core50_32x32", "core50_128x128")
TEST_SESSIONS: Final = frozenset({3, 7, 10})
OBJECTS: Final = 50
_CATEGORIES: Final = (
    "plug_adapter",
    "mobile_phone",
    "scissor",
    "light_bulb",
    "can",
    "glass",
    "ball",
    "marker",
    "cup",
    "remote_control",
)
CLASS_NAMES: Final = tuple(f"{category}{i}" for category in _CATEGORIES for i in range(1, 6))
"""Five objects of each of ten categories, in the order of the objects' numbers."""

WANTED: Final = "core50_32x32/ (or core50_128x128/) with s1/o1/*.png to s11/o50/*.png"


def find_core50(data_dir: str | Path | None, cache: Path) -> Path:
    """The folder with the sessions.

    Args:
        data_dir: it, its parent, or the parent of a folder ``core50`` with it; None for ``$NNHEADS_DATA``, then the
            cache.
        cache: where nnheads keeps downloads.

    Raises:
        DataError: it is not there; the message says what to put where.
    """
    get = "its authors offer it at https://vlomonaco.github.io/core50 (core50_32x32.zip, 0.2 GB)"
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise DataError(f"no such folder: {root}; it should hold {WANTED}; {get}")
        roots = [root]
    else:
        given = os.environ.get("NNHEADS_DATA")
        roots = [*([Path(given).expanduser()] if given else []), cache / "data"]
    for root in roots:
        for parent in (root, root / "core50", root.parent if root.name in FOLDERS else root):
            for name in FOLDERS:
                if (parent / name).is_dir():
                    return parent / name
    where = roots[0] if data_dir is not None else "the folder that you give to --data-dir"
    raise DataError(f"no CORe50 here: put {WANTED} into {where}; {get}")


def load_core50(root: Path, preprocessing: Preprocessing, *, train: bool, progress: Progress | None = None) -> ImageSet:
    """The images of the training or of the test sessions that are there, of the 50 objects.

    Args:
        root: the folder with ``s1`` to ``s11``.
        preprocessing: gives the size.
        train: which sessions.
        progress: called while decoding.

    Raises:
        DataError: a session or an object has no images, or one cannot be read.
    """
    sessions = {}
    for folder in class_folders(root):
        if folder.name[:1] == "s" and folder.name[1:].isdigit():
            sessions[int(folder.name[1:])] = folder
    chosen = {number: folder for number, folder in sorted(sessions.items()) if (number in TEST_SESSIONS) != train}
    if not chosen:
        wanted = "s3, s7 and s10, the test sessions" if not train else "s1, s2, s4, s5, s6, s8, s9 and s11"
        raise DataError(f"no {'training' if train else 'test'} session in {root}: it should hold {wanted}")
    files: list[str] = []
    labels: list[int] = []
    for label in range(OBJECTS):
        own = [name for folder in chosen.values() for name in _of_object(folder, label + 1)]
        if not own:
            names = ", ".join(folder.name for folder in chosen.values())
            raise DataError(f"no images of object o{label + 1} in {root} ({names}): unpack the archive again")
        files += own
        labels += [label] * len(own)
    part = "train" if train else "test"
    images = cached_images(files, root / part, preprocessing, progress)
    return ImageSet(images, torch.tensor(labels), class_names=CLASS_NAMES)


def _of_object(session: Path, number: int) -> list[str]:
    folder = session / f"o{number}"
    return images_in(folder) if folder.is_dir() else []
