"""What the commands put on the screen: results on stdout, everything else on stderr.

Into a pipe or a file goes plain text: no colours, no frames, no wrapping at some terminal's width.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 240
"""Columns of a line where nobody looks at it in a terminal: wide enough that no table of ours is cut."""

DASH = "-"

Format = Callable[[float | None], str]
"""Makes a number readable."""


def out() -> Console:
    """The console for results."""
    return _console(stderr=False)


def err() -> Console:
    """The console for progress, notes and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def error(message: str) -> None:
    """One line on stderr: ``error: ...``. The message is never read as markup."""
    from rich.text import Text

    line = " ".join(message.split())
    err().print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def note(message: str) -> None:
    """One line on stderr."""
    err().print(message, soft_wrap=True)


def line(message: str) -> None:
    """One line on stdout."""
    out().print(message, soft_wrap=True)


def print_json(value: Any) -> None:
    """JSON on stdout, nothing beside it; a number that is not finite becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[str] = (),
    wrapped: Sequence[str] = (),
) -> None:
    """Prints a table on stdout.

    Args:
        title: printed above it; empty for none.
        columns: headings.
        rows: the cells.
        text: the columns that hold words, which are aligned left; the others, numbers, to the right.
        wrapped: the columns that may break into lines where the screen is narrow.
    """
    console = out()
    if title:
        console.print(title, soft_wrap=True)
    made = _table(columns, rows, text, wrapped, framed=console.is_terminal)
    if console.is_terminal:
        # Where a terminal is too narrow it breaks the rows itself, which tells more than rows that are cut.
        console.width = max(
            console.width, console.measure(made, options=console.options.update(width=PIPE_WIDTH)).minimum
        )
        console.print(made)
        return
    with console.capture() as captured:
        console.print(made)
    for row in captured.get().splitlines():
        sys.stdout.write(row.rstrip() + "\n")


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: Sequence[str],
    wrapped: Sequence[str],
    *,
    framed: bool,
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=box.SIMPLE_HEAD if framed else None,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
        padding=(0, 1, 0, 0) if framed else (0, 2, 0, 0),  # the frame's dividers take a column too
    )
    for column in columns:
        made.add_column(
            column, justify="left" if column in text else "right", no_wrap=column not in wrapped, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Columns of the screen that a table takes when nothing in it is broken or cut."""
    cells = [columns, *rows]
    widest = [max(len(part) for row in cells for part in row[i].split("\n")) for i in range(len(columns))]
    return sum(widest) + 2 * len(widest)


def percent(share: float | None, digits: int = 2) -> str:
    """0.9345 as ``93.45``; a dash for None or not a number."""
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits behind the point; a dash for None or not a number."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def shares(config: dict[str, Any]) -> str:
    """What part of the images a run saw, where not all; else nothing."""
    parts = []
    if config["share"] is not None:
        parts.append(f"trained on {100 * config['share']:.3g} % of the training images")
    if config["validation"] is not None:
        parts.append(f"tested on {100 * config['validation']:.3g} % of them, held out")
    return "; ".join(parts)


def tenths(value: float | None) -> str:
    """A number with one digit behind the point."""
    return number(value, 1)


def count(value: float | None) -> str:
    """A whole number as ``12,345``, ``94.2k`` or ``11.2M``."""
    if value is None:
        return DASH
    for unit, limit in (("", 99_999.5), ("k", 999_950)):
        if value < limit:
            return f"{value:,.0f}" if not unit else f"{value / 1000:.1f}k"
    return f"{value / 1e6:.1f}M"


def size(bytes_held: float | None) -> str:
    """Bytes as ``731 B``, ``92.4 KB``, ``1.2 MB`` (of 1000)."""
    if bytes_held is None:
        return DASH
    for unit in ("B", "KB", "MB", "GB"):
        if bytes_held < 999.5 or unit == "GB":
            break
        bytes_held /= 1000
    return f"{bytes_held:.0f} {unit}" if unit == "B" or bytes_held >= 99.95 else f"{bytes_held:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as ``3.2 s``, ``52 s``, ``12 min 05 s`` or ``2 h 07 min``."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """Turns Ctrl-C and a polite kill into one line that says what is kept, and exit code 130 or 143."""
    with _terminable():
        try:
            yield
        except KeyboardInterrupt as how:
            note(f"interrupted; kept: {kept()}")
            raise typer.Exit(143 if isinstance(how, _Terminated) else 130) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send before they kill."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM interrupts as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there signals can be taken
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
