"""Where results go: a numbered folder under ``runs/``, unless the user names one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nnheads.benchmarks.locks import exclusive
from nnheads.benchmarks.results import check_out
from nnheads.errors import ConfigError

RUNS = Path("runs")


@contextmanager
def results_folder(out: Path | None, stem: str, *, resume: bool = False) -> Iterator[Path]:
    """Makes the folder that a command writes into, and takes it away again if nothing was written.

    Args:
        out: what the user named; None for ``runs/STEM-001``, ``runs/STEM-002`` and so on.
        stem: beginning of the folder's name.
        resume: whether an interrupted run goes on in ``out``.

    Raises:
        ConfigError: ``out`` is a file or holds the results of a run, or the folder cannot be made.
    """
    try:
        if out is None:
            folder, made = _numbered(stem), True
        else:
            folder = check_out(out.expanduser(), resume=resume)
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out or RUNS} for results ({error.strerror})") from None
    try:
        yield folder
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """ConfigError where another run writes to the folder, or it cannot be written to; for the length of the block no
    other run does."""
    with ExitStack() as held:
        try:
            mine = held.enter_context(exclusive(folder / ".run.lock"))
        except OSError as error:
            raise ConfigError(f"cannot write to {folder} ({error.strerror}): name another folder") from None
        if not mine:
            raise ConfigError(f"another run writes to {folder}: name another folder")
        yield


def newest(stem: str) -> Path | None:
    """The ``runs/STEM-NNN`` with the highest number, None where there is none."""
    numbers = _numbers(stem)
    return RUNS / f"{stem}-{max(numbers):03d}" if numbers else None


def safe_stem(name: str) -> str:
    """A name as part of a folder's name: ``images:/home/me/birds`` becomes ``images-birds``."""
    kind, colon, rest = name.partition(":")
    if colon:
        name = f"{kind}-{Path(rest).name or 'folder'}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _numbered(stem: str) -> Path:
    RUNS.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(stem), default=0)
    while True:
        number += 1
        folder = RUNS / f"{stem}-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run has taken it since we looked
            continue
        return folder


def _numbers(stem: str) -> list[int]:
    if not RUNS.is_dir():
        return []
    matches = (re.fullmatch(rf"{re.escape(stem)}-(\d{{3,}})", child.name) for child in RUNS.iterdir())
    return [int(match[1]) for match in matches if match]
