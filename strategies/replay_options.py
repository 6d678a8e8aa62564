"""The options of the strategy ``replay``. Reading them imports neither torch nor Avalanche."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from nnheads.errors import ConfigError


@final
@dataclass(frozen=True)
class ReplayOptions:
    """What ``--strategy-option`` takes for the strategy ``replay``.

    Attributes:
        replay_dropped: whether exemplars that make room for an experience's own are replayed until its end, see
            `nnheads.strategies.replay.ReplayStrategy`.
    """

    replay_dropped: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.replay_dropped, bool):
            raise ConfigError(f"replay_dropped must be true or false, not {self.replay_dropped!r}")
