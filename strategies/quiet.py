"""Avalanche without its warnings: of loggers and solvers that no run uses, and of its own deprecated calls."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def import_avalanche() -> None:
    """Import Avalanche's training once, which takes seconds, in silence. An error of the import is not silenced."""
    os.environ.setdefault("WANDB_SILENT", "true")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import avalanche.training  # noqa: F401


@contextlib.contextmanager
def quiet_avalanche() -> Iterator[None]:
    """Drops warnings that come out of Avalanche's files; others pass."""
    with warnings.catch_warnings():
        # A filter would do for some; those of deprecated calls set a filter of their own first.
        show = warnings.showwarning

        def selected(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if "avalanche" not in Path(filename).parts[:-1]:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = selected
        yield
