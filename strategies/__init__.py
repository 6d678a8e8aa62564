"""Continual-learning strategies on Avalanche."""

from nnheads.strategies.registry import STRATEGIES, StrategySpec, list_strategies, strategy_spec

__all__ = ["STRATEGIES", "StrategySpec", "list_strategies", "strategy_spec"]
