"""A run that can go on after it was interrupted: its state after each experience, as JSON and safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from nnheads.benchmarks.config import changed_settings
from nnheads.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from nnheads.benchmarks.config import RunConfig

FORMAT: Final = "nnheads-run"
FORMAT_VERSION: Final = 1
_META: Final = "run.json"
_TENSORS: Final = "run.safetensors"
_FREE: Final = frozenset({"data_dir"})
"""Settings that may differ when a run goes on: data move."""


@final
@dataclass
class RunState:
    """How far a run is.

    Attributes:
        matrix: rows of the accuracy matrix, one for each experience learned.
        train_seconds, eval_seconds: for each experience learned.
        seconds: spent altogether.
        tensors, values: of the strategy, see `nnheads.strategies.learner.Learner.state`.
    """

    matrix: list[list[float | None]] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    eval_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint, readable or not; one that was being replaced is brought back."""
    from nnheads.storage import recover

    recover(path)
    return (path / _META).exists()


def check_new(path: Path) -> None:
    """Raise ConfigError where something is there already, which a new run would overwrite or could not replace."""
    if is_checkpoint(path):
        raise ConfigError(f"--checkpoint {path} holds a checkpoint already: add --resume or name another folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--checkpoint {path} is a file: name a folder")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"--checkpoint {path} holds something that is not a checkpoint: name another folder")
    from nnheads.storage import folder_beside

    try:
        folder_beside(path).rmdir()
    except OSError as error:
        raise ConfigError(f"--checkpoint {path} cannot be written ({error.strerror}): name another folder") from None


def experiences_done(path: Path) -> int:
    """How many experiences the run in a checkpoint has learned; 0 where there is no checkpoint."""
    try:
        return len(json.loads((path / _META).read_text(encoding="utf-8"))["matrix"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def learning_rate(path: Path) -> float | None:
    """With which learning rate the run in a checkpoint was started; None where there is no checkpoint."""
    try:
        return float(json.loads((path / _META).read_text(encoding="utf-8"))["config"]["learning_rate"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_checkpoint(path: Path, config: RunConfig, state: RunState) -> None:
    """Replace the checkpoint in a folder: the old one or the new one is there, whole, whatever happens.

    Raises:
        CheckpointError: the disk does not take it, or the folder holds something else.
    """
    from nnheads.storage import replacing, write_tensors, write_text

    with replacing(path, lambda folder: (folder / _META).is_file()) as folder:
        recorded = write_tensors(folder / _TENSORS, state.tensors)
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": config.to_dict(),
            "matrix": state.matrix,
            "train_seconds": state.train_seconds,
            "eval_seconds": state.eval_seconds,
            "seconds": state.seconds,
            "values": state.values,
            "tensors": recorded,
        }
        write_text(folder / _META, json.dumps(content, indent=2) + "\n")


def load_checkpoint(path: Path, config: RunConfig) -> RunState:
    """The state that was saved last.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of a run with other settings, which are named.
    """
    from nnheads.storage import read_tensors, recover

    recover(path)
    try:
        content = json.loads((path / _META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint in {path}: leave --resume out to start anew") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / _META} ({error}): remove {path} to start anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path / _META} was not written by nnheads run: name the folder given to --checkpoint")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {content.get('format_version')!r}, not {FORMAT_VERSION}: start anew")
    try:
        _check_same(path, content["config"], config.to_dict())
        return RunState(
            [list(row) for row in content["matrix"]],
            list(content["train_seconds"]),
            list(content["eval_seconds"]),
            float(content["seconds"]),
            read_tensors(path / _TENSORS, content["tensors"]),
            dict(content["values"]),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _META} is incomplete ({error}): start anew in another folder") from error


def _check_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = changed_settings(saved, json.loads(json.dumps(wanted)), _FREE)
    if different:
        told = ", ".join(different)
        raise CheckpointError(
            f"the run in {path} was started with {told}: resume with the same settings, or start anew elsewhere"
        )
