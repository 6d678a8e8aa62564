"""What a comparison on a stream consists of: strategies and what is changed about them, memories and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, final

from nnheads.benchmarks.config import RunConfig
from nnheads.benchmarks.specs import stream_spec
from nnheads.benchmarks.stream_cell import StreamCell
from nnheads.benchmarks.variants import Variant
from nnheads.errors import ConfigError
from nnheads.strategies.registry import strategy_spec

REFERENCE: Final = "avalanche-replay"
"""The row whose wall time the others are divided by; the first row where it is missing."""

_MOST_FURTHER: Final = 6
"""Rates tried beyond a grid at most: a network that learns nothing at any of them has no best one."""


@final
@dataclass(frozen=True)
class StreamComparison:
    """Every variant is run with every memory and every seed.

    Attributes:
        variants: the rows.
        memory: exemplars that may be kept; None for the stream's own number. Once only for a strategy that keeps none
            and for a variant with a memory of its own.
        seeds: of a run.
        base: everything else; strategy, memory and seed in it count for nothing. Its ``ema``,
            ``exemplar_bytes`` and ``strategy_options`` are for those strategies that know them.
        rates: learning rates to choose from, for variants without a rate of their own: each is tried with the first
            memory and the first seed on a share ``base.validation`` of the training images, and the one with the best
            accuracy there is taken for all runs, which are then tested on the test images. Empty for no such choice.
        extend_rates: whether rates beyond ``rates`` are tried for a variant whose best is the lowest or highest tried,
            in the grid's own steps, until it is neither.
        trial_share: share of the training images each rate is tried on; None for ``base.share``.
    """

    variants: tuple[Variant, ...]
    memory: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0,)
    base: RunConfig = field(default_factory=RunConfig)
    rates: tuple[float, ...] = ()
    extend_rates: bool = False
    trial_share: float | None = None

    def check(self) -> None:
        """Refuses what cannot work before anything is trained.

        Raises:
            ConfigError: a name or an option that is not known, or that does not fit.
        """
        import torch

        from nnheads.backbones import build_backbone
        from nnheads.benchmarks.datasets import DATASETS
        from nnheads.devices import resolve_device
        from nnheads.heads import build_head

        if not self.variants or not self.memory or not self.seeds:
            raise ConfigError("a comparison needs at least one strategy, one memory and one seed")
        if self.rates and self.base.validation is None:
            raise ConfigError("learning rates are chosen on held-out training images: give --validation, as 0.1")
        if self.rates and not self.free_variants:
            raise ConfigError(
                "every strategy has a learning rate of its own or trains no weights: there is none to choose"
            )
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"strategy {name!r} is given twice")
        stream = stream_spec(self.base.stream)
        specs = [strategy_spec(variant.strategy) for variant in self.variants]
        if self.base.ema is not None and not any(spec.averages for spec in specs):
            raise ConfigError(
                "--ema averages the weights that are trained, and none of the strategies given trains any"
            )
        if self.base.exemplar_bytes is not None and not any(spec.uses_memory for spec in specs):
            raise ConfigError("--exemplar-bytes compresses exemplars, and none of the strategies given keeps any")
        for name in self.base.strategy_options:
            if not any(name in spec.option_names() for spec in specs):
                raise ConfigError(f"--strategy-option {name}: none of the strategies given has that option")
        known = DATASETS.get(stream.dataset)  # of a folder of images the runner knows it
        classes = stream.classes or (known.classes if known is not None else 0)
        for variant, spec in zip(self.variants, specs, strict=True):
            for memory in self.memory:
                resolved = self.config(variant, memory, self.seeds[0]).resolve(stream, spec)
                if spec.uses_memory and (resolved.memory or 0) < classes:
                    raise ConfigError(
                        f"memory of {resolved.memory} exemplars is smaller than the {classes} classes of "
                        f"{stream.name}: give at least one exemplar a class"
                    )
                spec.check_options(resolved.strategy_options)
                if spec.ours:
                    with torch.random.fork_rng(devices=[]):
                        # Wide, so that no option that depends on the width of embeddings is refused here.
                        build_head(str(resolved.head), 4096, max(2, classes), **resolved.head_options)
            build_backbone(str(resolved.backbone))
        resolve_device(self.base.device)

    def config(self, variant: Variant, memory: int | None, seed: int) -> RunConfig:
        """The settings of one run."""
        spec = strategy_spec(variant.strategy)
        known = spec.option_names()
        base = replace(
            self.base,
            memory=memory,
            seed=seed,
            ema=self.base.ema if spec.averages else None,
            exemplar_bytes=self.base.exemplar_bytes if spec.uses_memory else None,
            head_options=self.base.head_options if spec.ours else {},
            strategy_options={name: value for name, value in self.base.strategy_options.items() if name in known},
        )
        return variant.apply(base)

    @property
    def free_variants(self) -> list[Variant]:
        """Those that train weights, at a learning rate that is not given."""
        return [
            variant
            for variant in self.variants
            if "learning_rate" not in variant.settings and strategy_spec(variant.strategy).averages
        ]

    def trials(self, rates: Mapping[str, Sequence[float]] | None = None) -> StreamComparison:
        """The runs by which learning rates are chosen: one variant for each rate.

        Args:
            rates: those tried, by variant; None for ``self.rates`` everywhere.
        """
        variants = tuple(
            variant.with_setting("lr", rate)
            for variant in self.free_variants
            for rate in (self.rates if rates is None else rates[variant.name])
        )
        base = self.base if self.trial_share is None else replace(self.base, share=self.trial_share)
        return replace(self, variants=variants, base=base, memory=self.memory[:1], seeds=self.seeds[:1], rates=())

    def rate_beyond(self, tried: Sequence[float], best: float) -> float | None:
        """The next rate to try where the best one is the lowest or highest of those tried; None elsewhere.

        It is a step of the grid's outermost pair away, rounded to as few digits as do: 0.3 behind 0.01, 0.03, 0.1.
        """
        grid = sorted(set(self.rates))
        if len(grid) < 2 or len(tried) >= len(grid) + _MOST_FURTHER or min(tried) < best < max(tried):
            return None
        step = grid[-1] / grid[-2] if best == max(tried) else grid[0] / grid[1]
        rounded = (float(f"{best * step:.{digits}g}") for digits in (1, 2, 3))
        return next((rate for rate in rounded if not min(tried) <= rate <= max(tried)), None)

    def with_rates(self, chosen: dict[str, float]) -> StreamComparison:
        """The same, on the test images, with these learning rates by variant."""
        variants = tuple(
            replace(v, settings={"learning_rate": chosen[v.name], **v.settings}) if v.name in chosen else v
            for v in self.variants
        )
        return replace(self, variants=variants, base=replace(self.base, validation=None), rates=())


def stream_cells(plan: StreamComparison, out: Path, only: Sequence[str] = ()) -> list[StreamCell]:
    """The runs of a comparison, in the order in which they are made: all rows with the first seed first.

    Args:
        plan: what to compare.
        out: the folder.
        only: names of the runs wanted, where ``*`` stands for anything; empty for all.

    Raises:
        ConfigError: two rows have the same file, or there is no run of a name in ``only``.
    """
    cells: dict[str, StreamCell] = {}
    for seed in plan.seeds:
        for memory in plan.memory:
            for variant in plan.variants:
                fixed = "memory" in variant.settings or not strategy_spec(variant.strategy).uses_memory
                own = None if fixed else memory
                cell = StreamCell(variant, own, seed, plan.config(variant, own, seed), out)
                if cells.setdefault(cell.name, cell).variant != variant:
                    raise ConfigError(f"{variant.name!r} and {cells[cell.name].variant.name!r} have the same file name")
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in cells):
            raise ConfigError(f"--only {pattern}: there is no such run; there are {', '.join(cells)}")
    return [c for name, c in cells.items() if not only or any(fnmatchcase(name, pattern) for pattern in only)]
