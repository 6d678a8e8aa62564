"""The exceptions that nnheads raises for a mistake a user can make.

Each carries one line: what was wrong, where, and what would be right. The command line prints that line and exits
with code 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NNHeadsError(Exception):
    """Base of every error that nnheads raises on purpose."""


class ConfigError(NNHeadsError, ValueError):
    """An option has a value that cannot work."""


class DivergedError(ConfigError):
    """Training whose numbers are not finite any more: the learning rate is too high."""


class UnknownNameError(ConfigError):
    """A head, stream, strategy, backbone or layer that is not known by that name."""


class ShapeError(NNHeadsError, ValueError):
    """A tensor has the wrong shape, dtype or values (NaN, labels out of range)."""


class DataError(NNHeadsError, ValueError):
    """Images or labels that cannot be read or do not fit together."""


class EmptyMemoryError(NNHeadsError, RuntimeError):
    """A memory head was asked to train before it holds any sample."""


class AttachError(NNHeadsError, ValueError):
    """A model whose classifier cannot be found or replaced."""


class CheckpointError(NNHeadsError, RuntimeError):
    """A saved model or run that is missing, truncated, or from something else."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not registered, with the nearest known one as a suggestion.

    Args:
        kind: what the name stands for, for instance ``"head"``.
        name: what the user gave.
        known: the names that would have worked.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}; known: {', '.join(names) or 'none'}{hint}")
