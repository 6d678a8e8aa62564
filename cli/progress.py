"""A progress bar on stderr in a terminal, and a line now and then where stderr goes elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self, final

from nnheads.cli.screen import err


class Reporter(Protocol):
    """Told what is being done, how much of it is done, and how much there is (0: not known)."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@final
class Bar:
    """Shows what is going on; a context manager whose object is a `Reporter`.

    In a terminal it is one live line on stderr; what has no colon and is done stays there as a line of its own.
    Elsewhere only what stands before the first colon is printed, when it changes, so that a log stays short.

    Args:
        shown: False for no output at all.
    """

    def __init__(self, *, shown: bool = True) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        console = err()
        self._live: Progress | None = None
        self._console = console
        self._shown = shown
        self._last = ""
        if shown and console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._live.add_task("starting", total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._live is not None and ": " not in what and done >= total > 0:
            self.line(what)
        elif self._live is not None:
            self._live.update(self._task, description=what, completed=done, total=total or None)
        elif self._shown:
            self.line(what.partition(": ")[0])

    def line(self, text: str) -> None:
        """A line that stays, above the bar; the same one twice in a row is printed once."""
        if self._shown and text != self._last:
            self._last = text
            self._console.print(text, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
