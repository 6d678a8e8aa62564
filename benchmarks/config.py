"""The settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from nnheads.errors import ConfigError
from nnheads.strategies.registry import StrategySpec

if TYPE_CHECKING:
    from nnheads.benchmarks.specs import StreamSpec


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
        precision: see `nnheads.devices.resolve_precision`.
        head_options: options of the head.
        ema: decay of averaged weights; strategy ``replay``.
        exemplar_bytes: bytes an exemplar's image is compressed to, lossy WebP; None: as it is. Own strategies.
        dense_loss: weight of an auxiliary dense classifier's cross-entropy; strategy ``replay``.
        batch_centers: count the batch's embeddings as centers in training; strategy ``replay``.
        strategy_options: further options of the strategy, as JSON values; strategy ``impostor``, see
            `nnheads.strategies.impostor_options.ImpostorOptions`.
        future: evaluate experiences to come as well, so that the matrix is full.
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
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    dense_loss: float = 0.0
    batch_centers: bool = False
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    future: bool = False

    def __post_init__(self) -> None:
        whole = (
            ("epochs", self.epochs, 1),
            ("batch_size", self.batch_size, 1),
            ("memory", self.memory, 1),
            ("replay_batch", self.replay_batch, 0),
            ("seed", self.seed, 0),
            ("exemplar_bytes", self.exemplar_bytes, 1),
        )
        for name, value, least in whole:
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name} must be a whole number, {least} or more, not {value!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must be between 0 and 1, not {self.ema}")
        if not 0 <= self.dense_loss < float("inf"):
            raise ConfigError(f"dense_loss must be 0 or more, not {self.dense_loss}")
        if self.scenario not in ("class", "task"):
            raise ConfigError(f"scenario must be class or task, not {self.scenario!r}")

    def resolve(self, stream: StreamSpec, strategy: StrategySpec) -> RunConfig:
        """The same with every None replaced, except ``data_dir`` and ``ema``.

        Raises:
            ConfigError: settings that the strategy cannot follow.
        """
        from nnheads.heads import head_class  # torch: not needed to name a run

        head = strategy.resolve_head(self.head)
        if strategy.classifier != "any" and self.head_options:
            raise ConfigError(f"strategy {strategy.name!r} takes no head options, got {', '.join(self.head_options)}")
        own = {
            "ema": self.ema is not None,
            "exemplar_bytes": self.exemplar_bytes is not None,
            "dense_loss": self.dense_loss > 0,
            "batch_centers": self.batch_centers,
        }
        if not strategy.own_options and any(own.values()):
            given = ", ".join(name for name, is_given in own.items() if is_given)
            raise ConfigError(f"strategy {strategy.name!r} does not know {given}: take --strategy replay")
        if self.strategy_options and not strategy.takes_options:
            raise ConfigError(
                f"strategy {strategy.name!r} has no options of its own, got {', '.join(self.strategy_options)}"
            )
        known = head_class(head).option_names() if strategy.classifier == "any" else []
        head_options = {name: value for name, value in stream.head_options if name in known} | dict(self.head_options)
        batch_size = self.batch_size or stream.batch_size
        return replace(
            self,
            head=head,
            head_options=head_options,
            backbone=self.backbone or stream.backbone,
            epochs=self.epochs or stream.epochs,
            batch_size=batch_size,
            replay_batch=batch_size if self.replay_batch is None else self.replay_batch,
            memory=self.memory or stream.memory,
            learning_rate=self.learning_rate or stream.learning_rate,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = asdict(self)
        # Where the data lie on this machine is nobody else's business; their folder's name tells them apart.
        fields["data_dir"] = None if self.data_dir is None else Path(self.data_dir).resolve().name
        fields["head_options"] = dict(self.head_options)
        fields["strategy_options"] = dict(self.strategy_options)
        return fields
