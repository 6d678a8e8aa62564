"""The strategies by name. Listing them imports neither torch nor Avalanche."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, final

from nnheads.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from nnheads.strategies.learner import Learner, Setup

__all__ = ["STRATEGIES", "StrategySpec", "list_strategies", "strategy_spec"]

_OWN = "nnheads.strategies.replay_learner"
_AVALANCHE = "nnheads.strategies.avalanche"


@final
@dataclass(frozen=True)
class StrategySpec:
    """A strategy by name.

    Attributes:
        name: what ``--strategy`` takes.
        factory: ``module:function`` of what builds it from a `Setup`; imported by `build`.
        description: one line.
        classifier: ``"any"`` where it takes any head; ``"dense"`` where it trains the backbone's own dense classifier;
            otherwise what it decides by instead of a head.
        default_head: the head where the user names none.
        uses_memory: whether the memory budget means anything to it.
        options: ``module:class`` of the dataclass of its own options, ``strategy_options``; empty where it has none.
        replays: whether it needs replayed samples in each step.
        new_classes: whether it needs experiences with classes of their own.
        kernels: whether it takes only heads that vote with Gaussian kernels.
        ema: decay of the averaged weights where the user gives none; 0 for none.
        averages: whether weights can be averaged, as it trains some.
        compresses: whether exemplars are stored as the stream proposes where the user says nothing.
    """

    name: str
    factory: str
    description: str
    classifier: str = "dense"
    default_head: str = "dense"
    uses_memory: bool = True
    options: str = ""
    replays: bool = False
    new_classes: bool = False
    kernels: bool = False
    ema: float = 0.0
    averages: bool = True
    compresses: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this project's own and no strategy of Avalanche's: it takes any head and raw images with
        ids, and can be saved and resumed between experiences."""
        return self.classifier == "any"

    @property
    def brings_own_classifier(self) -> bool:
        """Whether it decides by something else than a head, so that no head can be chosen."""
        return self.classifier not in ("any", "dense")

    def option_names(self) -> list[str]:
        """Names of its own options."""
        return list(self.option_defaults())

    def option_defaults(self) -> dict[str, Any]:
        """Its own options, as they are where the user gives none."""
        if not self.options:
            return {}
        module, _, name = self.options.partition(":")
        return {field.name: field.default for field in fields(vars(importlib.import_module(module))[name])}

    def resolve_head(self, head: str | None) -> str:
        """The name of the head that a run has, or of what stands in its place.

        Raises:
            ConfigError: the strategy cannot work with the head that was named.
        """
        if self.classifier == "any":
            if self.kernels and head is not None:
                self._check_kernels(head)
            return head or self.default_head
        if head is None or (head == "dense" and self.classifier == "dense"):
            return self.classifier
        if self.brings_own_classifier:
            raise ConfigError(
                f"strategy {self.name!r} brings its own classifier ({self.classifier}) and cannot take head {head!r}: "
                "leave --head out, or take --strategy replay, which works with any head"
            )
        raise ConfigError(
            f"strategy {self.name!r} trains the backbone's dense classifier and cannot take head {head!r}: leave "
            "--head out, or take --strategy replay, which works with any head"
        )

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Raises:
        ConfigError: a value of one of its own options that cannot work.
        """
        if self.options:
            module, _, name = self.options.partition(":")
            vars(importlib.import_module(module))[name](**given)

    def _check_kernels(self, head: str) -> None:
        from nnheads.heads import head_class
        from nnheads.heads.kernel_vote import KernelVoteHead

        if not issubclass(head_class(head), KernelVoteHead):
            raise ConfigError(
                f"strategy {self.name!r} needs a head that votes with Gaussian kernels (impostor, nngk), not {head!r}"
            )

    def build(self, setup: Setup) -> Learner:
        """The strategy itself."""
        module, _, function = self.factory.partition(":")
        make: Callable[[Setup], Learner] = vars(importlib.import_module(module))[function]
        return make(setup)


def _avalanche(
    name: str,
    function: str,
    description: str,
    classifier: str = "dense",
    uses_memory: bool = True,
    options: str = "",
    replays: bool = False,
    new_classes: bool = False,
    averages: bool = True,
) -> StrategySpec:
    options = options and f"{_AVALANCHE}_options:{options}"
    return StrategySpec(
        name,
        f"{_AVALANCHE}:{function}",
        description,
        classifier,
        uses_memory=uses_memory,
        options=options,
        replays=replays,
        new_classes=new_classes,
        averages=averages,
    )


STRATEGIES: dict[str, StrategySpec] = {
    spec.name: spec
    for spec in (
        StrategySpec(
            "replay",
            f"{_OWN}:build_replay",
            "class-balanced exemplars, replayed beside the new samples and the head's memory at test; any head",
            classifier="any",
            default_head="impostor",
            options="nnheads.strategies.replay_options:ReplayOptions",
        ),
        StrategySpec(
            "impostor",
            "nnheads.strategies.impostor:build_impostor",
            "replay whose exemplars are the centers, chosen at random or by Algorithm 1; a head that votes by kernels",
            classifier="any",
            default_head="impostor",
            options="nnheads.strategies.impostor_options:ImpostorOptions",
            kernels=True,
            ema=0.99,
            compresses=True,
        ),
        _avalanche("naive", "naive", "plain fine-tuning on each experience (lower bound)", uses_memory=False),
        _avalanche("avalanche-replay", "replay", "Avalanche's Replay, the same exemplar budget", replays=True),
        _avalanche("er-ace", "er_ace", "ER-ACE, asymmetric cross-entropy (Caccia et al. 2022)", replays=True),
        _avalanche(
            "der",
            "der",
            "DER++, dark experience replay (Buzzega et al. 2020); alpha, beta",
            options="DEROptions",
            replays=True,
        ),
        _avalanche(
            "icarl",
            "icarl",
            "iCaRL, herding and distillation (Rebuffi et al. 2017)",
            "nearest-class-mean",
            new_classes=True,
        ),
        _avalanche(
            "gdumb",
            "gdumb",
            "GDumb, from scratch on the exemplars alone (Prabhu et al. 2020); last_samples",
            options="GDumbOptions",
        ),
        _avalanche("scr", "scr", "supervised contrastive replay (Mai et al. 2021)", "nearest-class-mean", replays=True),
        _avalanche(
            "slda", "slda", "streaming LDA on a frozen backbone (Hayes et al. 2020)", "lda", False, averages=False
        ),
        _avalanche("ewc", "ewc", "elastic weight consolidation (Kirkpatrick et al. 2017)", uses_memory=False),
        _avalanche("gem", "gem", "gradient episodic memory (Lopez-Paz and Ranzato 2017)"),
        _avalanche("si", "si", "synaptic intelligence (Zenke et al. 2017)", uses_memory=False),
        _avalanche("joint", "joint", "all experiences at once, shuffled (upper bound)", uses_memory=False),
        _avalanche("cumulative", "cumulative", "each experience with all before it (upper bound)", uses_memory=False),
    )
}


def list_strategies() -> list[StrategySpec]:
    """The strategies, in the order in which they are listed to a user."""
    return list(STRATEGIES.values())


def strategy_spec(name: str) -> StrategySpec:
    """A strategy by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    return STRATEGIES[name]
