"""SVHN's cropped digits, as its authors offer them and torchvision stores them: ``train_32x32.mat`` and the like."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Final

import torch

from nnheads.data import ImageSet
from nnheads.errors import DataError

FILES: Final = {True: "train_32x32.mat", False: "test_32x32.mat"}
_GET: Final = "its authors offer them at http://ufldl.stanford.edu/housenumbers (0.25 GB)"


def load_svhn(data_dir: str | Path | None, cache: Path, *, train: bool) -> ImageSet:
    """The 73,257 training or 26,032 test images of the cropped digits.

    Args:
        data_dir: the folder with the files, or the parent of a folder ``svhn`` or ``SVHN`` with them; None for
            ``$NNHEADS_DATA``, then the cache.
        cache: where nnheads keeps downloads.
        train: which half.

    Raises:
        DataError: the file is not there, or damaged.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = _find(data_dir, cache, FILES[train])
    try:
        content: dict[str, Any] = loadmat(str(path))
        images = torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous()
        labels = torch.from_numpy(content["y"]).flatten().long() % 10  # the files write 10 for the digit 0
        return ImageSet(images, labels, class_names=tuple("0123456789"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, MatReadError, zlib.error) as error:
        raise DataError(f"{path} is damaged or no file of SVHN ({error}): fetch it again") from error


def _find(data_dir: str | Path | None, cache: Path, name: str) -> Path:
    if data_dir is not None:
        roots = [Path(data_dir).expanduser()]
        if not roots[0].is_dir():
            raise DataError(f"no such folder: {roots[0]}; it should hold {name}; {_GET}")
    else:
        given = os.environ.get("NNHEADS_DATA")
        roots = [*([Path(given).expanduser()] if given else []), cache / "data"]
    for root in roots:
        for folder in (root, root / "svhn", root / "SVHN"):
            if (folder / name).is_file():
                return folder / name
    where = roots[0] if data_dir is not None else "the folder that you give to --data-dir"
    raise DataError(f"no SVHN here: put {FILES[True]} and {FILES[False]} into {where}; {_GET}")
