"""The settings of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from nnheads.errors import ConfigError, unknown_name
from nnheads.strategies.registry import StrategySpec

if TYPE_CHECKING:
    from nnheads.benchmarks.specs import StreamSpec
    from nnheads.devices import Precision

CENTER_BYTES: Final = 16
"""Bytes a center of the strategy ``impostor`` takes where exemplars are compressed, unless the user says otherwise."""

WHITENED_MEMORY: Final = 100
"""Exemplars below which no stream proposes Mahalanobis distances."""


@final
@dataclass(frozen=True)
class RunConfig:
    """The settings of a run; what is None is taken from the stream or the strategy.

    Attributes:
        stream: see `nnheads.benchmarks.streams.stream_spec`.
        head: see `nnheads.list_heads`; None for the strategy's own default.
        strategy: see `nnheads.strategies.list_strategies`.
        backbone: see `nnheads.list_backbones`.
        data_dir: where the data are.
        epochs: passes over each experience.
        batch_size: new samples a step.
        replay_batch: replayed samples a step; as many as new ones by default.
        memory: exemplars that may be kept.
        learning_rate: of SGD, constant.
        seed: of class order, weights, batches, augmentation and exemplars.
        scenario: ``"class"``, or ``"task"``: at test the classes outside the sample's experience are masked.
        device: see `nnheads.devices.resolve_device`.
        precision: see `nnheads.devices.resolve_precision`; for Avalanche's own strategies ``"auto"`` is float32.
        head_options: options of the head. Where strategy ``impostor`` compresses exemplars, ``bytes_per_center`` is 16
            unless given; 0 keeps centers as they are. Where ``memory`` is below 100, the stream's ``whiten`` is left
            out: so few samples say little of a covariance. So it is where the memory is counted in bytes and the map
            would take more than a tenth of them, once the data are loaded.
        ema: decay of averaged weights that take the place of the trained ones after each experience. None: what the
            strategy proposes, 0.99 for ``impostor`` and none for others; 0: none.
        exemplar_bytes: bytes an exemplar's image is compressed to, lossy WebP; new images are seen so too.
            ``memory`` is then the bytes of so many uncompressed images; centers, and what DER keeps with each exemplar,
            count too. None: for ``impostor`` what the stream proposes; 0: images as they are.
        strategy_options: further options of the strategy, as JSON values; of our own, see
            `nnheads.strategies.impostor_options.ImpostorOptions` and
            `nnheads.strategies.replay_options.ReplayOptions`.
        future: evaluate experiences to come and the untrained model as well, for forward transfer.
        share: share of each class's training images that is learned from, to try settings quickly; None for all.
        validation: share of each class's training images that is held out and takes the place of the test images, to
            choose settings by; None for the test images.
    """

    stream: str = "split-digits"
    head: str | None = None
    strategy: str = "replay"
    backbone: str | None = None
    data_dir: str | Path | None = None
    epochs: int | None = None
    batch_size: int | None = None
    memory: int | None = None
    seed: int = 0
    scenario: str = "class"
    device: str = "auto"
    head_options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    ema: float | None = None
    replay_batch: int | None = None
    exemplar_bytes: int | None = None
    precision: Precision = "auto"
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    future: bool = False
    share: float | None = None
    validation: float | None = None

    def __post_init__(self) -> None:
        whole = (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("memory", self.memory, 1),
            ("replay_batch", self.replay_batch, 0),
            ("seed", self.seed, 0),
            ("exemplar_bytes", self.exemplar_bytes, 0),
        )
        for name, value, least in whole:
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} must be a whole number, {least} or more, not {value!r}")
        if self.seed >= 2**64:
            raise ConfigError(f"seed must be below 2 ** 64, not {self.seed}")
        if self.learning_rate is not None and not (
            _is_number(self.learning_rate) and 0 < self.learning_rate < math.inf
        ):
            raise ConfigError(f"learning_rate must be above 0, not {self.learning_rate!r}")
        if self.ema is not None and not (_is_number(self.ema) and 0 <= self.ema < 1):
            raise ConfigError(f"ema must be between 0 and 1, not {self.ema!r}")
        for name, part in (("share", self.share), ("validation", self.validation)):
            if part is not None and not (_is_number(part) and 0 < part < 1):
                raise ConfigError(f"{name} must be between 0 and 1, not {part!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision must be auto, float32 or bfloat16, not {self.precision!r}")
        if self.scenario not in ("class", "task"):
            raise ConfigError(f"scenario must be class or task, not {self.scenario!r}")

    def resolve(self, stream: StreamSpec, strategy: StrategySpec) -> RunConfig:
        """The same with every None replaced, except ``data_dir``, and the precision that ``"auto"`` is on this machine.

        Raises:
            ConfigError: settings that the strategy cannot follow, or a device that there is not.
        """
        from nnheads.devices import auto_precision
        from nnheads.heads import head_class  # torch: not needed to name a run

        head = strategy.resolve_head(self.head)
        if not strategy.ours and self.head_options:
            raise ConfigError(f"strategy {strategy.name!r} takes no head options, got {', '.join(self.head_options)}")
        if self.ema is not None and not strategy.averages:
            raise ConfigError(f"strategy {strategy.name!r} trains no weights, so that ema means nothing to it")
        if self.exemplar_bytes is not None and not strategy.uses_memory:
            raise ConfigError(
                f"strategy {strategy.name!r} keeps no exemplars, so that exemplar_bytes means nothing to it"
            )
        if strategy.replays and self.replay_batch == 0:
            raise ConfigError(
                "replay_batch must be 1 or more for a strategy that replays; take --strategy naive for none"
            )
        if strategy.new_classes and stream.kind == "instances":
            raise ConfigError(
                f"strategy {strategy.name!r} needs experiences with classes of their own: take a split- stream"
            )
        own = strategy.option_defaults()
        for name in self.strategy_options:
            if not own:
                raise ConfigError(f"strategy {strategy.name!r} has no options of its own, got {name}")
            if name not in own:
                raise unknown_name(f"option of strategy {strategy.name!r}", name, list(own))
        known = head_class(head).option_names() if strategy.ours else []
        # proposed to heads that vote by kernels: others have a k too, which means something else to them
        proposed = {name: value for name, value in stream.head_options if name in known and "auxiliary" in known}
        memory = self.memory or stream.memory
        if memory < WHITENED_MEMORY:
            proposed.pop("whiten", None)
        head_options = proposed | dict(self.head_options)
        batch_size = self.batch_size or stream.batch_size
        images = self.strategy_options.get("exemplars") is not False  # to embed by other weights, and to compress
        if self.ema and not images:
            raise ConfigError("ema needs the centers' images, to embed them by the averaged backbone: exemplars=true")
        ema = strategy.ema if images else 0.0
        exemplar_bytes = stream.exemplar_bytes if images and strategy.compresses else 0
        exemplar_bytes = exemplar_bytes if self.exemplar_bytes is None else self.exemplar_bytes
        if exemplar_bytes and strategy.compresses and "bytes_per_center" in known:
            # Raw, a center would take as much as its compressed image or more.
            head_options = {"bytes_per_center": CENTER_BYTES, **head_options}
        precision = self.precision
        if precision == "auto" and strategy.ours:
            precision = auto_precision(self.device)
        return replace(
            self,
            head=head,
            precision=precision,
            head_options=head_options,
            backbone=self.backbone or stream.backbone,
            epochs=self.epochs or stream.epochs,
            batch_size=batch_size,
            replay_batch=batch_size if self.replay_batch is None else self.replay_batch,
            memory=memory,
            ema=ema if self.ema is None else self.ema,
            exemplar_bytes=exemplar_bytes,
            learning_rate=self.learning_rate or stream.learning_rate,
            strategy_options=own | dict(self.strategy_options),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = asdict(self)
        # Where the data lie on this machine is nobody else's business; their folder's name tells them apart.
        fields["data_dir"] = None if self.data_dir is None else Path(self.data_dir).resolve().name
        fields["head_options"] = dict(self.head_options)
        fields["strategy_options"] = dict(self.strategy_options)
        return fields


_BEFORE: Final = {"replay_dropped": False}
"""Options of strategies that are newer than results and checkpoints may be: what was done before there were any."""


def options_then(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Strategy options of results or a checkpoint, with those that are newer and are among the options now."""
    return {**{name: value for name, value in _BEFORE.items() if name in now}, **saved}


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any], free: frozenset[str] = frozenset()) -> list[str]:
    """In which resolved settings, as JSON values, a run from before differs from one now, as ``name=then (now ...)``.

    Options are told one by one. Those of the strategy that ``saved`` does not hold had their defaults: once only those
    were written that the user had given; but see `options_then`.
    """
    told = []
    for name, value in now.items():
        then = saved.get(name)
        if name == "precision" and then == "auto" and value != "auto":
            then = unwritten_precision(now["device"])
        if name in free or then == value:
            continue
        if not isinstance(value, Mapping) or not isinstance(then, Mapping):
            told.append(f"{name}={then!r} (now {value!r})")
            continue
        if name == "strategy_options":
            then = options_then(then, value)
        for option in then if name == "strategy_options" else {**then, **value}:
            if then.get(option) != value.get(option):
                told.append(f"{option}={then.get(option)!r} (now {value.get(option)!r})")
    return told


def unwritten_precision(device: str) -> Precision:
    """What a precision of ``"auto"`` was on this machine before it was written down, and AVX512-BF16 counted."""
    from nnheads.devices import auto_precision, cpu_bfloat16, resolve_device

    counted = resolve_device(device).type != "cpu" or cpu_bfloat16() == "AMX"
    return auto_precision(device) if counted else "float32"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
