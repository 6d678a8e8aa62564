"""How a training shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: number of the epoch, from 0.
        epochs: how many there will be.
        step: steps done in this epoch.
        steps: how many an epoch has, None where that is not known.
        loss: mean over the epoch so far.
        samples_per_second: over the epoch so far.
    """

    epoch: int
    epochs: int
    step: int
    steps: int | None
    loss: float
    samples_per_second: float


def _nothing(*_: object) -> None:
    """Shows nothing."""


@final
@dataclass(frozen=True)
class Report:
    """Where a training tells how far it is.

    Attributes:
        step: called after a step.
        epoch: called after an epoch with its number from 0, the number of epochs, loss, seconds and samples.
        memory: called before all samples are embedded for the memory.
    """

    step: Callable[[Progress], None] = _nothing
    epoch: Callable[[int, int, float, float, int], None] = _nothing
    memory: Callable[[], None] = _nothing


def _line(number: int, epochs: int, loss: float, seconds: float, samples: int) -> None:
    rate = samples / max(seconds, 1e-9)
    print(f"epoch {number + 1}/{epochs}  loss {loss:.4f}  {rate:.0f} samples/s", file=sys.stderr, flush=True)


@contextmanager
def reporter(progress: bool | Callable[[Progress], None]) -> Iterator[Report]:
    """True: a bar where stderr is a terminal or a notebook, else a line an epoch; a function: called each step."""
    if not isinstance(progress, bool):
        yield Report(step=progress)
        return
    if not progress:
        yield Report()
        return
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield Report(epoch=_line)
        return
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[state]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=None, state="")

        def step(progress: Progress) -> None:
            bar.update(
                task,
                description=f"epoch {progress.epoch + 1}/{progress.epochs}",
                total=progress.steps,
                completed=progress.step,
                state=f"loss {progress.loss:.4f}  {progress.samples_per_second:.0f} samples/s",
            )

        def memory() -> None:
            bar.update(task, description="embedding the memory", total=None, state="")

        yield Report(step=step, memory=memory)
