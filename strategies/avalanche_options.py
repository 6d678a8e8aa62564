"""Options of Avalanche's own strategies. Reading them imports neither torch nor Avalanche."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from nnheads.errors import ConfigError


@final
@dataclass(frozen=True)
class DEROptions:
    """What ``--strategy-option`` takes for the strategy ``der``. The defaults are Avalanche's.

    Attributes:
        alpha: weight of the squared distance to the logits kept with an exemplar.
        beta: weight of the cross-entropy of the exemplars, beside a weight of 1 for new samples; 0 makes it DER.
    """

    alpha: float = 0.1
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} of strategy 'der' must be a number, 0 or more, not {value!r}")


@final
@dataclass(frozen=True)
class GDumbOptions:
    """What ``--strategy-option`` takes for the strategy ``gdumb``.

    Attributes:
        last_samples: samples to pass at the last experience of the stream, in whole passes over the exemplars, in place
            of ``epochs`` passes. Each experience begins from the first weights, so that of all gradient samples only
            these reach the network that answers at the end. None: ``epochs`` passes there too.
    """

    last_samples: int | None = None

    def __post_init__(self) -> None:
        value = self.last_samples
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"last_samples of strategy 'gdumb' must be a whole number, 1 or more, not {value!r}")
