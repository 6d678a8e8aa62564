"""The settings of Algorithm 1 (review, section 4) and the record of what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, final, get_args

from nnheads.centers import Redistribution
from nnheads.errors import ConfigError

CHOICES: Final = ("worst", "random", "herding", "mixed:FRACTION")


@final
@dataclass(frozen=True)
class CenterRules:
    """How centers are exchanged after an experience D_e.

    Attributes:
        n_a: samples of D_e that become centers; None: as many as ``choose`` says of those that came in while the
            experience was learned, which is the share its classes are due.
        n_d: centers that go; None: as many as the budget forces out. More go where the budget forces them out.
        choose: ``"worst"``: the worst predicted samples, as in Algorithm 1; ``"random"``: what came in stays;
            ``"mixed:FRACTION"``: that fraction of what came in is exchanged for the worst predicted; ``"herding"``:
            those whose mean is nearest to the mean of their class (Welling 2009).
        drop: ``"best"``: the centers that the others predict best, as in Algorithm 1; or ``"random"``.
        redistribute: form of redistribution, see `nnheads.centers.drop_centers`.
        ridge: of the form ``least-squares``.
        rounds: in how many steps centers are dropped and added; centers and samples are scored anew before each.
        balanced: whether the classes are kept level. False as the algorithm is written.

    Raises:
        ConfigError: a value that cannot work.
    """

    n_a: int | None = None
    n_d: int | None = None
    choose: str = "worst"
    drop: Literal["best", "random"] = "best"
    redistribute: Redistribution = "influence"
    ridge: float = 1.0
    rounds: int = 1
    balanced: bool = True
    kind: str = field(init=False, repr=False)
    fraction: float = field(init=False, repr=False)

    @property
    def exchanges(self) -> bool:
        """Whether there is anything to choose after an experience."""
        return self.fraction > 0 if self.n_a is None else self.n_a > 0 or bool(self.n_d)

    def __post_init__(self) -> None:
        for name in ("n_a", "n_d"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ConfigError(f"{name} must be a whole number, 0 or more, not {value!r}")
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise ConfigError(f"rounds must be a whole number, 1 or more, not {self.rounds!r}")
        if self.drop not in ("best", "random"):
            raise ConfigError(f"drop must be best or random, not {self.drop!r}")
        if self.redistribute not in get_args(Redistribution):
            raise ConfigError(
                f"redistribute must be one of {', '.join(get_args(Redistribution))}, not {self.redistribute!r}"
            )
        if not 0 <= self.ridge < float("inf"):
            raise ConfigError(f"ridge must be 0 or more, not {self.ridge!r}")
        kind, fraction = _choice(self.choose)
        if self.n_d is not None and self.n_a is None:
            raise ConfigError("n_d needs n_a: how many samples are to become centers")
        if self.n_a is not None and self.choose.startswith("mixed"):
            raise ConfigError(f"choose={self.choose!r} says how many samples become centers: leave n_a out")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "fraction", fraction)


@final
@dataclass(frozen=True)
class CenterEvent:
    """One change of the centers.

    Attributes:
        experience: number of the experience, from 0.
        moment: ``"room"``: before an experience, so that its new classes have room; ``"update"``: after its training
            epochs; ``"end"``: as they stand when the experience is over.
        dropped, added: number of centers by class.
        label_mass: half the sum of the absolute changes of the labels of the centers that stay: 1 is the whole label of
            one center.
        centers: number of centers by class afterwards.
    """

    experience: int
    moment: str
    dropped: dict[int, int]
    added: dict[int, int]
    label_mass: float
    centers: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CenterEvent:
        """The inverse of `to_dict`, also after a passage through JSON."""
        by_class = {name: {int(c): int(n) for c, n in values[name].items()} for name in ("dropped", "added", "centers")}
        return CenterEvent(
            int(values["experience"]), str(values["moment"]), label_mass=float(values["label_mass"]), **by_class
        )


def _choice(choose: str) -> tuple[str, float]:
    kind, colon, text = choose.partition(":") if isinstance(choose, str) else ("", "", "")
    if not colon and kind in ("worst", "herding"):
        return kind, 1.0
    if not colon and kind == "random":
        return kind, 0.0
    if kind == "mixed" and colon:
        try:
            fraction = float(text)
        except ValueError:
            fraction = -1.0
        if 0 <= fraction <= 1:
            return "worst", fraction
        raise ConfigError(f"choose: the fraction in {choose!r} must be between 0 and 1, as in mixed:0.5")
    raise ConfigError(f"choose must be one of {', '.join(CHOICES)}, not {choose!r}")
