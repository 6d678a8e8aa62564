"""One run of a comparison on a stream: where its files are, and whether what they hold is what is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from nnheads.benchmarks.checkpoint import learning_rate
from nnheads.benchmarks.config import RunConfig, changed_settings, options_then
from nnheads.benchmarks.results import write_json
from nnheads.benchmarks.specs import stream_spec
from nnheads.benchmarks.variants import Variant
from nnheads.errors import CheckpointError, ConfigError, DivergedError
from nnheads.strategies.registry import strategy_spec

_FREE: Final = frozenset({"data_dir"})
"""Settings that may differ when a comparison goes on: data move."""

_NEEDED: Final = (
    "asked",
    "config",
    "strategy",
    "head",
    "accuracy",
    "forgetting",
    "anytime_accuracy",
    "accuracy_matrix",
    "test_counts",
    "gradient_samples",
    "memory_bytes",
    "train_seconds",
    "eval_seconds",
)
"""What results must hold to be compared."""


@final
@dataclass(frozen=True)
class StreamCell:
    """One run of a comparison.

    Attributes:
        variant: its row.
        memory: its memory, None where the strategy keeps nothing or knows better.
        seed: its seed.
        config: its settings.
        folder: where its files are.
    """

    variant: Variant
    memory: int | None
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """The name of its files, which ``--only`` takes."""
        memory = "" if self.memory is None else f"-m{self.memory}"
        return f"{self.variant.file_name}{memory}-s{self.seed}"

    @property
    def results(self) -> Path:
        """What was measured."""
        return self.folder / f"{self.name}.json"

    @property
    def divergence(self) -> Path:
        """The record that its training diverged."""
        return self.folder / f"{self.name}.diverged.json"

    @property
    def lock(self) -> Path:
        """Held while it is being made."""
        return self.folder / f".{self.name}.lock"

    @property
    def checkpoint(self) -> Path:
        """How far it is, where it can be resumed."""
        return self.folder / f".{self.name}.checkpoint"

    def finished(self) -> dict[str, Any] | None:
        """Its results, None where there are none.

        Raises:
            CheckpointError: they cannot be read.
            ConfigError: they were made with other settings.
        """
        try:
            result = dict(json.loads(self.results.read_text(encoding="utf-8")))
            lacking = [name for name in _NEEDED if name not in result]
            if lacking:
                raise ValueError(f"it has no {', '.join(lacking)}")
            then, resolved = self._asked_then(result), dict(result["config"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.results} cannot be read ({error}): remove it and it is made again") from None
        for name, value in self.asked().items():
            if name not in _FREE and then[name] != value:
                raise ConfigError(
                    f"{self.results} was made with {name}={then[name]!r}, not {value!r}: give another --out"
                )
        self._check_defaults(resolved)
        return result

    def diverged(self) -> DivergedError | None:
        """That its training diverged, where that is on record for the same settings; see `record_divergence`."""
        try:
            record = json.loads(self.divergence.read_text(encoding="utf-8"))
            asked, resolved, why = record["asked"], record["config"], str(record["diverged"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.divergence} cannot be read ({error}): remove it and the run is made again"
            ) from None
        if _settled(asked) != _settled(self.asked()) or _settled(resolved) != _settled(self._resolved()):
            return None
        return DivergedError(f"{why} (or remove {self.divergence} to try it again)")

    def record_divergence(self, error: DivergedError) -> None:
        """Note that its training diverged, so that it is not tried again, and remove how far it was."""
        write_json(
            self.divergence,
            {
                "variant": self.variant.name,
                "memory": self.memory,
                "asked": self.asked(),
                "config": self._resolved(),
                "diverged": str(error),
            },
        )
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def set_aside(self) -> None:
        """Rename what was made with another learning rate, where one was chosen since.

        Results that differ in nothing else become ``RUN.lr=RATE.json.old``, an interrupted run
        ``.RUN.lr=RATE.checkpoint.old``. What was set aside before and has the rate that is chosen now comes back.
        """
        rate = self.config.learning_rate
        if rate is None:
            return
        made = None
        try:
            before = self._asked_then(json.loads(self.results.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or `finished` tells what is wrong with them
        else:
            different = {name for name, value in self.asked().items() if name not in _FREE and before[name] != value}
            made = before["learning_rate"] if different == {"learning_rate"} else rate
        _swap(self.results, made, rate)
        if not self.results.exists():  # else what is left of an interrupted run stays where it is
            _swap(self.checkpoint, learning_rate(self.checkpoint), rate)

    def _check_defaults(self, made: Mapping[str, Any]) -> None:
        """ConfigError where what was not asked for was something else when the results were made."""
        spec = stream_spec(self.config.stream)
        now = self._resolved()
        # left out where its map would take the place of too many exemplars, which is known once the data are loaded
        if "whiten" not in {**self.asked()["head_options"], **dict(made.get("head_options") or {})}:
            now["head_options"].pop("whiten", None)
        # which backbone images in a folder get depends on their size
        free = _FREE | ({"backbone"} if spec.dataset.startswith("images:") else set())
        changed = changed_settings({**now, **made}, now, free)  # what is newer than the results counts for nothing
        if changed:
            raise ConfigError(
                f"{self.results} was made with other defaults, {', '.join(changed)}: "
                "give another --out, or ask for what they were by --strategy-option, --option or --ema"
            )

    def _asked_then(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What results were asked for, with strategy options that are asked for now as they were. A setting that there
        was not then had its default."""
        then = {**RunConfig().to_dict(), **result["asked"]}
        now = self.asked()["strategy_options"]
        used = dict(result.get("config", {})).get("strategy_options") or {}
        made = {**{name: used[name] for name in now if name in used}, **then["strategy_options"]}
        return {**then, "strategy_options": options_then(made, now)}

    def asked(self) -> dict[str, Any]:
        """Its settings as JSON has them."""
        return _as_json(self.config)

    def _resolved(self) -> dict[str, Any]:
        """The same with every default, as far as they are known before the data are loaded."""
        return _as_json(self.config.resolve(stream_spec(self.config.stream), strategy_spec(self.config.strategy)))


def _settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _FREE}


def _swap(path: Path, made: float | None, wanted: float) -> None:
    """Set aside what was made with another learning rate than the one wanted, and put back what was set aside with that
    one, where nothing is in its place.

    Args:
        path: the results or the checkpoint of a run.
        made: the learning rate it was made with; None where there is none.
        wanted: the learning rate that is chosen now.
    """

    def aside(rate: float) -> Path:
        return path.with_name(f"{path.stem}.lr={rate:g}{path.suffix}.old")

    if made is not None and made != wanted:
        if aside(made).is_dir():  # an older one: a folder does not take the place of another
            shutil.rmtree(aside(made))
        path.rename(aside(made))
    if not path.exists() and aside(wanted).exists():
        aside(wanted).rename(path)


def _as_json(config: RunConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(config.to_dict())))
