"""One row of a comparison on a stream: a strategy and what is changed about it, in one word."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, final

from nnheads.benchmarks.config import RunConfig
from nnheads.errors import ConfigError, unknown_name
from nnheads.strategies.registry import strategy_spec

_SHARED: Final = frozenset(
    [
        "stream",
        "strategy",
        "data_dir",
        "seed",
        "scenario",
        "device",
        "head_options",
        "strategy_options",
        "future",
        "share",
        "validation",
    ]
)
"""Fields of `RunConfig` that are the same for all rows, or have a place of their own in a variant."""

SETTINGS: Final[Mapping[str, str]] = {
    "lr": "learning_rate",
    "batch": "batch_size",
    "replay": "replay_batch",
    **{field.name: field.name for field in fields(RunConfig) if field.name not in _SHARED},
}
"""What a variant may set of a run, and the field of `RunConfig` that it is; some have a short name too."""


def json_or_text(text: str) -> Any:
    """A value as JSON where it is JSON, else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@final
@dataclass(frozen=True)
class Variant:
    """A strategy with settings of its own, as ``impostor+n_a=0+n_d=0`` or ``replay+ema=0.99+head=dense``.

    Attributes:
        name: as the user wrote it, which names its row and its files.
        strategy: the strategy.
        settings: fields of `RunConfig`.
        head_options, strategy_options: options of the head and of the strategy.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any]
    head_options: Mapping[str, Any]
    strategy_options: Mapping[str, Any]

    @staticmethod
    def read(text: str) -> Variant:
        """Reads ``STRATEGY`` or ``STRATEGY+KEY=VALUE+KEY=VALUE...``.

        A key is one of `SETTINGS`, else an option of the strategy, else an option of the head. A value is read as JSON
        where it is JSON, else taken as text.

        Raises:
            ConfigError: something has another form, is given twice, or is not known (`UnknownNameError`).
        """
        from nnheads.heads import head_class

        strategy, *parts = (part.strip() for part in text.split("+"))
        spec = strategy_spec(strategy)
        given: dict[str, Any] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key or not value:
                raise ConfigError(
                    f"{part!r} in {text!r} must have the form key=value, as in replay+ema=0.99+head=dense"
                )
            key = key.replace("-", "_")
            if key in given or SETTINGS.get(key, key) in map(SETTINGS.get, given):
                raise ConfigError(f"{text!r} gives {key} twice")
            given[key] = json_or_text(value)
        settings = {SETTINGS[key]: given[key] for key in given if key in SETTINGS}
        if not isinstance(settings.get("head", ""), str):
            raise ConfigError(f"head={given['head']} in {text!r} is not the name of a head")
        rest = {key: value for key, value in given.items() if key not in SETTINGS}
        own = spec.option_names()
        of_strategy = {key: value for key, value in rest.items() if key in own}
        of_head = {key: value for key, value in rest.items() if key not in own}
        if of_head:
            head = spec.resolve_head(settings.get("head"))
            known = head_class(head).option_names() if spec.ours else []
            for key in of_head:
                if key not in known:
                    raise unknown_name(f"setting in {text!r}", key, [*SETTINGS, *own, *known])
        return Variant(text.replace(" ", ""), strategy, settings, of_head, of_strategy)

    def with_setting(self, key: str, value: Any) -> Variant:
        """The same with one more of the `SETTINGS`; itself where that is set already."""
        field = SETTINGS[key]
        if field in self.settings:
            return self
        return replace(self, name=f"{self.name}+{key}={value}", settings={**self.settings, field: value})

    def apply(self, config: RunConfig) -> RunConfig:
        """The settings of a run with those of the variant in their place."""
        return replace(
            config,
            strategy=self.strategy,
            head_options={**config.head_options, **self.head_options},
            strategy_options={**config.strategy_options, **self.strategy_options},
            **self.settings,
        )

    @property
    def file_name(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^A-Za-z0-9._+=-]+", "-", self.name)


def variants(
    strategies: Sequence[str] | None, heads: Sequence[str] | None = None, rates: Sequence[float] = ()
) -> tuple[Variant, ...]:
    """Every strategy with every head and every learning rate.

    Args:
        strategies: see `Variant.read`; None for ``replay``.
        heads: for every strategy that has no head of its own in its text, also with options as
            ``impostor+centers=tied``; None for what the strategies take.
        rates: the same for learning rates.

    Raises:
        ConfigError: see `Variant.read`; or a strategy cannot work with a head.
    """
    found = [Variant.read(text) for text in strategies or ("replay",)]
    if heads:
        every = [
            variant if "head" in variant.settings else Variant.read(f"{variant.name}+head={head}")
            for variant in found
            for head in heads
        ]
        found = list({variant.name: variant for variant in every}.values())
    if rates:
        every = [variant.with_setting("lr", rate) for variant in found for rate in rates]
        found = list({variant.name: variant for variant in every}.values())
    for variant in found:
        strategy_spec(variant.strategy).resolve_head(variant.settings.get("head"))
    return tuple(found)
