"""Folders that are replaced only as a whole, and tensors in safetensors files that are checked when read."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nnheads.errors import CheckpointError

_SETTLE_SECONDS: Final = 0.3


@contextmanager
def replacing(path: Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives an empty folder to write to, which takes the place of ``path`` once the block ends without an error.

    Args:
        path: the folder to write or replace.
        ours: tells whether a folder that is there may be replaced; an empty one always may.

    Raises:
        CheckpointError: what is there may not be replaced, or the disk does not take the new folder. What was there
            is intact then.
    """
    target = _to_replace(path, ours)
    try:
        made = folder_beside(target)
        try:
            # mkdtemp lets only its owner in; the folder shall be as readable as any other.
            umask = os.umask(0)
            os.umask(umask)
            made.chmod(0o777 & ~umask)
            yield made
            _sync_folder(made)
            _swap(made, target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        raise _cannot_save(path, error) from error


def check_replaceable(path: Path, ours: Callable[[Path], bool]) -> None:
    """Says before long work, as `replacing` would say after it, that its result cannot be written.

    Args:
        path, ours: as in `replacing`.

    Raises:
        CheckpointError: as there.
    """
    target = _to_replace(path, ours)
    try:
        folder_beside(target).rmdir()
    except OSError as error:
        raise _cannot_save(path, error) from error


def _to_replace(path: Path, ours: Callable[[Path], bool]) -> Path:
    target = Path(os.path.realpath(path))
    recover(target)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or ours(target))):
        raise CheckpointError(f"{path} holds something that is not a saved model: choose another folder or empty it")
    return target


def folder_beside(target: Path) -> Path:
    """An empty folder in that of ``target``, which is made where it is missing; OSError where that cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))


def _cannot_save(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot save to {path} ({error.strerror or error}): free space or choose another folder")


def recover(path: Path) -> None:
    """Brings back the old folder where a process was killed after moving it aside and before replacing it."""
    target = Path(os.path.realpath(path))
    aside = _aside(target)
    if target.exists() or not aside.exists():
        return
    time.sleep(_SETTLE_SECONDS)  # another process may be between its two renames, which takes it microseconds
    if not target.exists():
        with suppress(FileNotFoundError):  # brought back by another
            aside.rename(target)


@contextmanager
def editing(path: Path) -> Iterator[None]:
    """Lets one process at a time read a folder and replace it, so that no change is lost; no-op where flock is not.

    The lock is on the folder that is there: it ends with the process, and leaves nothing behind.
    """
    target = os.path.realpath(path)
    while True:
        recover(Path(target))
        if os.name != "posix" or not os.path.isdir(target):
            yield
            return
        import fcntl

        try:
            handle = os.open(target, os.O_RDONLY)
        except FileNotFoundError:  # being replaced
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, target):  # else whoever had the lock has replaced the folder
                # What a process that was killed at the end of a replacement left: it holds what others forgot.
                shutil.rmtree(_aside(Path(target)), ignore_errors=True)
                yield
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Writes a text file through to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a file to write to, which takes the place of ``path`` once the block ends without an error.

    What takes long may be inside the block: a path that cannot be written to is refused at its beginning.

    Raises:
        CheckpointError: the path is a folder, or the disk does not take the file. What was there is intact then.
    """
    try:
        if path.is_dir():
            raise CheckpointError(f"cannot write {path}, which is a folder: name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        made = Path(name)
        try:
            yield made
            made.chmod(0o644)  # mkstemp lets only its owner in
            os.replace(made, path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror or error}): choose another folder") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a text file as a whole, see `replacing_file`."""
    with replacing_file(path) as made:
        write_text(made, text)


def cache_root() -> Path:
    """Where downloads, decoded images and measured costs are kept: ``$NNHEADS_CACHE``, else ``~/.cache/nnheads``."""
    given = os.environ.get("NNHEADS_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "nnheads"


def write_tensors(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Writes a state dict through to the disk.

    Returns:
        ``bytes`` and ``sha256`` of the file, by which `read_tensors` knows it again.

    Raises:
        CheckpointError: something in it is no dense tensor.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"cannot save {name!r}, a {type(value).__name__}: only dense tensors can be saved")
        # A copy each: tensors that share memory are refused otherwise.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def read_tensors(path: Path, recorded: Any) -> dict[str, Tensor]:
    """Reads what `write_tensors` wrote.

    Args:
        path: the file.
        recorded: what `write_tensors` returned.

    Raises:
        CheckpointError: the file is missing, truncated, changed, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path, recorded)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): save the model again") from error
    return tensors


def check_file(path: Path, recorded: Any) -> None:
    """Raises CheckpointError unless a file is as `write_tensors` left it; ``recorded`` is what that returned."""
    if not isinstance(recorded, dict) or not {"bytes", "sha256"} <= set(recorded):
        raise CheckpointError(f"{path}: its size was not recorded: copy the folder anew, or save the model again")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder, or save the model again")
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes where {recorded['bytes']} were written: copy the folder anew, or save the "
            "model again"
        )
    if _digest(path) != recorded["sha256"]:
        raise CheckpointError(f"{path} was changed after it was written: copy the folder anew, or save the model again")


def _swap(made: Path, target: Path) -> None:
    """Puts the complete folder in its place; a kill between the two renames is mended by `recover`."""
    aside = _aside(target)
    if target.exists():
        if aside.exists():
            shutil.rmtree(aside)
        target.rename(aside)
    try:
        made.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
