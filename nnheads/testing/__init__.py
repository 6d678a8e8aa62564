"""The contract of a head, as checks that anyone can run on a head of their own.

    import nnheads.testing
    import my_heads  # registers "mine"
    nnheads.testing.check_head("mine", k=5)

or one test a check, with `head_checks` and ``pytest.mark.parametrize``. A check raises `AssertionError` with one line
that says what the head does and what the contract asks for. Everything runs on the CPU in well under a second.
"""

from __future__ import annotations

from typing import Any

from . import _answers, _samples, _training  # noqa: F401  (each registers its checks, in this order)
from ._material import CHECKS, IN_FEATURES, NUM_CLASSES, Check

__all__ = ["IN_FEATURES", "NUM_CLASSES", "Check", "check_head", "head_checks"]


def head_checks() -> dict[str, Check]:
    """All checks by name, in the order in which `check_head` runs them."""
    return dict(CHECKS)


def check_head(name: str, **options: Any) -> None:
    """Run every check on a registered head.

    Args:
        name: see `nnheads.list_heads`.
        options: the head's options, as JSON takes them; a ``k`` among them may be larger than the number of samples.

    Raises:
        AssertionError: the head breaks the contract; the check is named.
    """
    for check in CHECKS.values():
        check(name, **options)
