"""The options of the strategy ``impostor``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, final

from nnheads.centers import Redistribution
from nnheads.errors import ConfigError, unknown_name
from nnheads.strategies.center_rules import CenterRules

DRIFTS: Final = ("free", "frozen", "distill")


@final
@dataclass(frozen=True)
class ImpostorOptions:
    """What ``--strategy-option`` takes for the strategy ``impostor``.

    Where centers are chosen at random and keep their labels, the defaults are not Algorithm 1 as written, which
    `CenterRules` has by default, but what was measured best where the exemplars are replayed and embedded anew.

    Attributes:
        n_a, n_d, choose, drop, redistribute, ridge, rounds, balanced: see
            `nnheads.strategies.center_rules.CenterRules`.
        fine_tune: n_f, passes over the exemplars after the update of the centers; 0.3 is one over three tenths of them,
            drawn at random. Gradient samples all the same.
        views: 2 for a second view of each image in a batch, changed as SCR's are
            (`nnheads.strategies.views.ContrastiveViews`); gradient samples too.
        replay_dropped: whether exemplars that make room for an experience's own are replayed with all its batches, see
            `nnheads.strategies.replay.ReplayStrategy`; fine-tuning passes over those held then.
        exemplars: whether the centers' images are kept and replayed. Without them a center stays where the backbone put
            it when its experience was learned.
        drift: what is done about that: ``"free"``: nothing; ``"frozen"``: the backbone learns the first experience
            only; ``"distill"``: the tie of equation 8 with the embeddings of the backbone before the experience, on the
            whole batch, replayed samples too.
        drift_weight: weight of that tie, in units of one over squared distance.
        budget_bytes: memory for exemplars and centers together, in place of ``memory``.
    """

    n_a: int | None = None
    n_d: int | None = None
    choose: str = "random"
    drop: Literal["best", "random"] = "random"
    redistribute: Redistribution = "none"
    ridge: float = 1.0
    rounds: int = 1
    balanced: bool = True
    fine_tune: float = 0
    views: int = 1
    replay_dropped: bool = True
    exemplars: bool = True
    drift: Literal["free", "frozen", "distill"] = "free"
    drift_weight: float = 1.0
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("balanced", "exemplars", "replay_dropped"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name in ("drift_weight", "ridge", "fine_tune"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number, 0 or more, not {value!r}")
        given = self.budget_bytes
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise ConfigError(f"budget_bytes must be a whole number, 1 or more, not {given!r}")
        if self.views not in (1, 2) or isinstance(self.views, bool):
            raise ConfigError(f"views must be 1 or 2, not {self.views!r}")
        if self.drift not in DRIFTS:
            raise ConfigError(f"drift must be one of {', '.join(DRIFTS)}, not {self.drift!r}")
        if self.fine_tune and not self.exemplars:
            raise ConfigError("fine_tune passes over the exemplars' images: leave exemplars=true")
        if self.fine_tune and self.drift == "frozen":
            raise ConfigError("drift='frozen' trains nothing after the first experience: leave fine_tune out")
        exchanges = self.rules().exchanges
        for name, used, by in (
            ("drift_weight", self.drift == "distill", "drift='distill'"),
            ("ridge", self.redistribute == "least-squares", "redistribute='least-squares'"),
            ("balanced", self.n_a is not None, "n_a=N"),
            ("rounds", exchanges or self.drop == "best", "a choice of centers: choose='worst', drop='best' or n_a=N"),
        ):
            if not used and getattr(self, name) != getattr(ImpostorOptions, name):
                raise ConfigError(f"{name} does nothing without {by}")

    @property
    def fine_tune_epochs(self) -> int:
        """Epochs that the passes of fine-tuning take, the last of which may be a part of one."""
        return math.ceil(self.fine_tune)

    def rules(self) -> CenterRules:
        """How centers are chosen.

        Raises:
            ConfigError: a value that cannot work.
        """
        return CenterRules(
            self.n_a, self.n_d, self.choose, self.drop, self.redistribute, self.ridge, self.rounds, self.balanced
        )

    @staticmethod
    def read(given: Mapping[str, Any]) -> ImpostorOptions:
        """Options by name.

        Raises:
            ConfigError: an option that there is not, or a value that cannot work.
        """
        known = [f.name for f in fields(ImpostorOptions)]
        for name in given:
            if name not in known:
                raise unknown_name("option of strategy 'impostor'", name, known)
        return ImpostorOptions(**given)
