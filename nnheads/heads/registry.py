"""Heads by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ConfigError, unknown_name
from .base import Head

_HEADS: dict[str, type[Head]] = {}
H = TypeVar("H", bound=type[Head])


def register_head(name: str) -> Callable[[H], H]:
    """Class decorator that makes a head available by name to `build_head`, `attach_head` and the command line.

    Registering another class under a name that is taken raises `ConfigError`; registering the same class again (a
    module that is reloaded) replaces it.
    """

    def register(cls: H) -> H:
        taken = _HEADS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ConfigError(f"head {name!r} is already registered by {taken.__module__}.{taken.__qualname__}")
        cls.name = name
        _HEADS[name] = cls
        return cls

    return register


def list_heads() -> list[str]:
    """Names of the registered heads, sorted."""
    return sorted(_HEADS)


def head_class(name: str) -> type[Head]:
    """The class registered under a name; `UnknownNameError` with a suggestion where there is none."""
    try:
        return _HEADS[name]
    except KeyError:
        raise unknown_name("head", name, _HEADS) from None


def build_head(name: str, in_features: int, num_classes: int, **options: Any) -> Head:
    """Build a registered head.

    Args:
        name: see `list_heads`.
        in_features: width d of the embeddings.
        num_classes: number of classes C to begin with.
        options: the head's own; an unknown one raises `ConfigError` and lists those there are.
    """
    cls = head_class(name)
    known = cls.option_names()
    for option in options:
        if option not in known:
            raise ConfigError(f"head {name!r} has no option {option!r}; options: {', '.join(known) or 'none'}")
    return cls(in_features, num_classes, **options)
