"""Continual-learning strategies on Avalanche.

What trains is imported when it is first asked for: it imports Avalanche, which takes seconds and warns of solvers that
nothing here uses.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nnheads.strategies.registry import STRATEGIES, StrategySpec, list_strategies, strategy_spec

if TYPE_CHECKING:
    from nnheads.strategies.buffer import ExemplarBuffer
    from nnheads.strategies.center_plugin import CenterPlugin
    from nnheads.strategies.impostor import ImpostorContinual
    from nnheads.strategies.impostor_options import ImpostorOptions
    from nnheads.strategies.replay import ReplayStrategy

_LATER = {
    "CenterPlugin": "center_plugin",
    "ExemplarBuffer": "buffer",
    "ImpostorContinual": "impostor",
    "ImpostorOptions": "impostor_options",
    "ReplayStrategy": "replay",
}

__all__ = [
    "STRATEGIES",
    "CenterPlugin",
    "ExemplarBuffer",
    "ImpostorContinual",
    "ImpostorOptions",
    "ReplayStrategy",
    "StrategySpec",
    "list_strategies",
    "strategy_spec",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nnheads.strategies.quiet import import_avalanche

    import_avalanche()
    return vars(importlib.import_module(f"nnheads.strategies.{_LATER[name]}"))[name]
