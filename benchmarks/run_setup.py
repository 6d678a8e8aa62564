"""What a run needs before it starts: the stream, the settings checked against it, and the strategy at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Final, cast

from nnheads.benchmarks.config import RunConfig
from nnheads.errors import ConfigError
from nnheads.strategies.quiet import import_avalanche, quiet_avalanche
from nnheads.strategies.registry import StrategySpec

if TYPE_CHECKING:
    import torch

    from nnheads.benchmarks.streams import Scenario, Stream
    from nnheads.strategies.learner import Learner

WHITENING_SHARE: Final = 0.1
"""Most that the map of Mahalanobis distances may take of a memory by default: beside that of 512 features the bytes of
200 images would have room for 44 exemplars in place of 1,127."""


def load_stream(
    config: RunConfig, spec: StrategySpec, tell: Callable[[str, int, int], None]
) -> tuple[Stream, RunConfig]:
    """The stream and the settings as resolved, checked against each other."""
    from nnheads.benchmarks.specs import stream_spec
    from nnheads.benchmarks.streams import make_stream

    config.resolve(stream_spec(config.stream), spec)  # mistakes are told before the data are loaded
    stream = make_stream(
        config.stream,
        data_dir=config.data_dir,
        seed=config.seed,
        scenario=cast("Scenario", config.scenario),
        progress=tell,
    )
    if config.validation is not None:
        stream = stream.holdout(config.validation, config.seed)
    if config.share is not None:
        stream = stream.thinned(config.share, config.seed)
    # what a folder of images needs is known only now
    resolved = _within_budget(config, config.resolve(stream.spec, spec), stream)
    if spec.uses_memory and resolved.memory is not None and resolved.memory < stream.num_classes:
        raise ConfigError(
            f"memory of {resolved.memory} exemplars is smaller than the {stream.num_classes} classes of "
            f"{config.stream}: give at least one exemplar a class"
        )
    if resolved.exemplar_bytes and not spec.ours:  # ours compress what they are given themselves
        tell("compressing images", 0, 0)
        stream = _compressed(stream, resolved.exemplar_bytes)
    return stream, resolved


def _within_budget(asked: RunConfig, resolved: RunConfig, stream: Stream) -> RunConfig:
    """The settings without the whitening that the stream proposes, where its map would take more than
    `WHITENING_SHARE` of the bytes that there are for exemplars and centers."""
    if "whiten" in asked.head_options or "whiten" not in resolved.head_options or not resolved.exemplar_bytes:
        return resolved
    import torch

    from nnheads.attach import attach_head
    from nnheads.backbones import build_backbone
    from nnheads.heads.whitening import Whitening

    form = stream.preprocessing
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(str(resolved.backbone), stream.num_classes, form.channels)
        features = attach_head(backbone, "dense").in_features
    budget = resolved.strategy_options.get("budget_bytes") or (resolved.memory or 1) * form.channels * prod(form.size)
    if Whitening(features, 1.0).bytes <= WHITENING_SHARE * budget:
        return resolved
    return replace(resolved, head_options={k: v for k, v in resolved.head_options.items() if k != "whiten"})


def _compressed(stream: Stream, exemplar_bytes: int) -> Stream:
    """The same stream whose training images are as they are after compression.

    Raises:
        ConfigError: too few bytes for an image, or not fewer than it has.
    """
    from nnheads.strategies.codec import WebPCodec

    images = stream.train.images
    channels, height, width = images.shape[1:]
    codec = WebPCodec((channels, height, width), exemplar_bytes)
    return replace(stream, train=replace(stream.train, images=codec.decode(codec.encode(images))))


def build_learner(
    config: RunConfig, spec: StrategySpec, stream: Stream, device: torch.device, on_step: Callable[[int], None]
) -> Learner:
    """The strategy at work, everything seeded."""
    import random

    import numpy as np
    import torch

    from nnheads.backbones import build_backbone
    from nnheads.strategies.learner import Setup

    import_avalanche()
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002  # Avalanche's own strategies draw from it
    torch.manual_seed(config.seed)
    backbone = build_backbone(
        str(config.backbone), num_classes=stream.num_classes, in_channels=stream.preprocessing.channels
    )
    setup = Setup(
        backbone=backbone,
        head=str(config.head),
        head_options=config.head_options,
        benchmark=stream.avalanche_benchmark(transformed=True, ids=False) if not spec.ours else stream.benchmark,
        preprocessing=stream.preprocessing,
        class_names=stream.class_names,
        augment=stream.spec.augment,
        epochs=config.epochs or 1,
        batch_size=config.batch_size or 1,
        replay_batch=config.replay_batch or 0,
        memory=config.memory or 1,
        learning_rate=config.learning_rate or 0.1,
        seed=config.seed,
        device=device,
        precision=config.precision,
        ema=config.ema or None,
        exemplar_bytes=config.exemplar_bytes or None,
        strategy_options=config.strategy_options,
        on_step=on_step,
    )
    with quiet_avalanche():
        return spec.build(setup)
