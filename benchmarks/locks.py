"""A lock that a process holds while it works on something that another must not do too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Tries to lock a file for the length of the block.

    The lock belongs to the open file: the kernel lifts it when the process ends in whatever way, so that none goes
    stale. The file has the process's number in it, for people, and is removed with the lock. Where flock is not,
    nothing is locked.

    Args:
        path: the file, made where it is missing, in a folder that is made too.

    Yields:
        False where another process holds the lock; then nothing is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield True
        return
    handle = _locked(path)
    if handle is None:
        yield False
        return
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield True
    finally:
        path.unlink(missing_ok=True)  # while it is locked: whoever waits for it sees that it is gone
        os.close(handle)


def tidy(path: Path) -> None:
    """Removes the file of a lock that a killed process left behind; one that is held stays."""
    if path.exists():
        with exclusive(path):
            pass


def _locked(path: Path) -> int | None:
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its owner removed it between our opening and our locking
