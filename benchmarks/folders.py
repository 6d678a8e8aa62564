"""Folders of class folders as image sets, decoded in threads and kept decoded in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor

from nnheads.data import ImageSet, Preprocessing
from nnheads.errors import DataError
from nnheads.storage import cache_root

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is (0: not known)."""

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
"""A file in a class folder is an image if its name ends so (in small or capital letters); others are passed
over."""

T = TypeVar("T")

LARGEST_NATURAL = 64
FALLBACK_SIZE = (64, 64)
_ORIENTATION: Final = 0x0112  # EXIF's tag of how an image is to be turned
_CHUNK = 256


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders in alphabetical order, without hidden ones."""
    children = (child for child in folder.iterdir() if not child.name.startswith((".", "__")))
    return sorted(child for child in children if child.is_dir())


def has_class_folders(folder: Path) -> bool:
    """Whether some sub-folder of ``folder`` holds an image."""
    return folder.is_dir() and any(images_in(child) for child in class_folders(folder))


def list_classes(folder: Path, *, at_least: int = 2) -> dict[str, list[str]]:
    """The image files of every class folder, classes and files in alphabetical order.

    Raises:
        DataError: if the folder is missing, has fewer than ``at_least`` classes, or a class folder has no
            image.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    classes = {child.name: images_in(child) for child in class_folders(folder)}
    if not classes:
        raise DataError(f"no class folders in {folder}: it needs one sub-folder of images for each class")
    for name, files in classes.items():
        if not files:
            raise DataError(f"no images in {folder / name}: put images there or remove the folder")
    if len(classes) < at_least:
        raise DataError(
            f"{folder} has one class only ({', '.join(classes)}): put the images of two classes or more there"
        )
    return classes


def from_folder(
    folder: str | Path,
    preprocessing: Preprocessing | None = None,
    *,
    class_names: Iterable[str] | None = None,
    size: int | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Loads ``folder/<class>/*`` into memory.

    The decoded images are kept under `cache_root` and are read from there as long as the folder's files stay
    the same (names, sizes, times of modification).

    Args:
        folder: holds one folder of images for each class.
        preprocessing: gives size and channels. Default: the images' own size if they all have the same and no
            side is above 64 pixels, else 64 x 64; grey if all images are grey, else RGB.
        class_names: the classes that a model knows; labels follow this order and the folder may lack some.
            Default: the folder's classes in alphabetical order.
        size: side of the images in pixels, where ``preprocessing`` does not say.
        progress: called while decoding.

    Raises:
        DataError: see `list_classes`; also an image that cannot be read, or a class not among
            ``class_names``.
    """
    folder = Path(folder).expanduser()
    classes = list_classes(folder, at_least=2 if class_names is None else 1)
    names = tuple(classes) if class_names is None else tuple(class_names)
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise DataError(f"{folder} has classes that are not known: {_some(unknown)}; known: {_some(list(names))}")
    files = [file for members in classes.values() for file in members]
    labels = torch.tensor([names.index(name) for name, members in classes.items() for _ in members])
    images = cached_images(files, folder, preprocessing, progress, size)
    return ImageSet(images, labels, class_names=names)


def cached_images(
    files: list[str],
    folder: Path,
    preprocessing: Preprocessing | None,
    progress: Progress | None = None,
    size: int | None = None,
) -> Tensor:
    """Decodes images, or takes them from the cache where none of the files has changed.

    Args:
        files: the images.
        folder: what they are a part of: names them in the cache, with size and channels.
        preprocessing: gives size and channels; None for the images' own, see `from_folder`.
        progress: called while decoding.
        size: side of the images in pixels, where ``preprocessing`` does not say.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        DataError: an image cannot be read.
    """
    form = "natural" if size is None else f"{size}x{size}"
    if preprocessing is not None:
        form = f"{preprocessing.size[0]}x{preprocessing.size[1]}x{preprocessing.channels}"
    key = hashlib.sha256(f"{folder.resolve()}|{form}".encode()).hexdigest()[:20]
    cached = cache_root() / "decoded" / f"{key}.safetensors"
    fingerprint = _fingerprint(files)
    images = _read_cache(cached, fingerprint, len(files))
    if images is None:
        images = _decode(files, preprocessing or _natural(files, folder, progress, size), folder, progress)
        _write_cache(cached, fingerprint, folder, images)
    return images


def check_same_classes(train: Path, test: Path) -> None:
    """Raises:
    DataError: if the two folders have different class folders; the message says which.
    """
    first, second = ({child.name for child in class_folders(folder)} for folder in (train, test))
    if first != second:
        parts = [
            f"only in {folder}: {_some(sorted(only))}"
            for folder, only in ((train, first - second), (test, second - first))
            if only
        ]
        raise DataError(f"train and test have different classes ({'; '.join(parts)}): both need the same folders")


def images_in(folder: Path) -> list[str]:
    """The image files of one folder, in alphabetical order."""
    # names as text: making a Path of each of 50,000 files costs more than reading the decoded cache
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _fingerprint(files: list[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        facts = os.stat(file)
        digest.update(f"{file}\0{facts.st_mtime_ns} {facts.st_size}\0".encode())
    return f"{len(files)} {digest.hexdigest()}"


def _natural(files: list[str], folder: Path, progress: Progress | None, side: int | None) -> Preprocessing:
    def look(file: str) -> tuple[tuple[int, int], bool]:
        from PIL import Image

        try:
            with Image.open(file) as image:
                turned = image.getexif().get(_ORIENTATION, 1) > 4  # a quarter, so that height and width change places
                size = (image.width, image.height) if turned else (image.height, image.width)
                return size, image.mode in ("1", "L", "LA", "La", "F") or image.mode[0] == "I"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            _form((1, 1), 3).open(file)  # raises the error that names the file
            raise

    found = [pair for part in _in_threads(look, files, f"looking at {folder}", progress) for pair in part]
    sizes = {size for size, _ in found}
    size = found[0][0] if len(sizes) == 1 and max(found[0][0]) <= LARGEST_NATURAL else FALLBACK_SIZE
    size = size if side is None else (side, side)
    channels = 1 if all(grey for _, grey in found) else 3
    return _form(size, channels)


def _form(size: tuple[int, int], channels: int) -> Preprocessing:
    """Size and channels for reading; normalisation plays no part there."""
    return Preprocessing(size, channels, (0.0,) * channels, (1.0,) * channels)


def _decode(files: list[str], preprocessing: Preprocessing, folder: Path, progress: Progress | None) -> Tensor:
    parts = _in_threads(preprocessing.open, files, f"decoding {folder}", progress)
    return torch.cat([torch.stack(part) for part in parts])


def _in_threads(work: Callable[[str], T], files: list[str], what: str, progress: Progress | None) -> list[list[T]]:
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    results: list[list[T]] = []
    done = 0
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    try:
        for part in pool.map(lambda chunk: [work(file) for file in chunk], chunks):
            results.append(part)
            done += len(part)
            if progress is not None:
                progress(what, done, len(files))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _read_cache(path: Path, fingerprint: str, count: int) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            images: Tensor = file.get_tensor("images")
    except (SafetensorError, OSError, KeyError):  # a damaged cache is only a slow start
        return None
    return images if images.dtype == torch.uint8 and images.dim() == 4 and len(images) == count else None


def _write_cache(path: Path, fingerprint: str, folder: Path, images: Tensor) -> None:
    from safetensors.torch import save_file

    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        os.close(handle)
        metadata = {"fingerprint": fingerprint, "folder": json.dumps(str(folder))}
        save_file({"images": images.contiguous()}, temporary, metadata=metadata)
        os.replace(temporary, path)
        temporary = None
    except OSError:  # a full or read-only disk must not stop the run: the images are in memory
        pass
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
