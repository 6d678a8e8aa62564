"""How the measurements that are run by ``python -m`` end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nnheads.errors import ConfigError, NNHeadsError


def run_script(main: Callable[[], None]) -> None:
    """Runs a measurement; a mistake of the user's ends it with one line on stderr and status 2, as in ``nnheads``."""
    try:
        main()
    except NNHeadsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_whole(flag: str, value: int, least: int = 1) -> None:
    """ConfigError where a number is below ``least``; ``flag`` is what the user calls it."""
    if value < least:
        raise ConfigError(f"{flag} must be {least} or more, got {value}")
