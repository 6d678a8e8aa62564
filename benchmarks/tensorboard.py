"""Accuracies of a run for TensorBoard, by Avalanche's logger and under its names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final, final

from nnheads.benchmarks.measures import Matrix, forgetting, seen_accuracy
from nnheads.errors import ConfigError

TENSORBOARD: Final = "tensorboard"
"""Folder of the log, inside that of the results."""


def check_tensorboard() -> None:
    """Raise ConfigError where the package ``tensorboard`` is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard")


@final
class RunLog:
    """Writes what is known after each experience; steps are experiences learned.

    Args:
        folder: of the log, made where it is missing.
        tasks: whether experiences are tasks of their own (scenario ``task``), which is in Avalanche's names.

    Attributes:
        begun: whether the folder held a log already, which this one goes on.
    """

    def __init__(self, folder: Path, *, tasks: bool) -> None:
        check_tensorboard()
        from avalanche.logging import TensorboardLogger

        self.begun = any(folder.glob("events.out.tfevents.*"))
        self._logger: Any = TensorboardLogger(folder)
        self._tasks = tasks

    def experience(self, matrix: Matrix, counts: list[int], after: int, sizes: dict[str, float]) -> None:
        """What is known after an experience.

        Args:
            matrix: the accuracy matrix, at least up to it.
            counts: test samples of each experience.
            after: the experience, from 0.
            sizes: further numbers by name.
        """
        step = after + 1
        stream = "eval_phase/test_stream"
        for e, value in enumerate(matrix[after]):
            if value is not None:
                task = e if self._tasks else 0
                self._scalar(f"Top1_Acc_Exp/{stream}/Task{task:03d}/Exp{e:03d}", value, step)
        self._scalar(f"Top1_Acc_Stream/{stream}/Task000", seen_accuracy(matrix, counts, after), step)
        self._scalar(f"StreamForgetting/{stream}", forgetting(matrix, after), step)
        for name, number in sizes.items():
            self._scalar(name, number, step)
        self._logger.writer.flush()

    def close(self) -> None:
        """Ends the log."""
        self._logger.writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._logger.log_single_metric(name, float(value), step)
