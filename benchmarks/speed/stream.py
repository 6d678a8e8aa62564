"""Learning a stream beside Avalanche's Replay and beside a plain PyTorch loop: what the library adds to a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.backbones import build_backbone
from nnheads.benchmarks.config import RunConfig
from nnheads.benchmarks.run_setup import build_learner, load_stream
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, Timings, in_turn
from nnheads.benchmarks.streams import Stream
from nnheads.data import get_augmentation
from nnheads.devices import autocast_for, prefers_channels_last, resolve_device
from nnheads.strategies.quiet import quiet_avalanche
from nnheads.strategies.registry import strategy_spec

DENSE = f"{OURS}, dense head"
IMPOSTOR = f"{OURS}, strategy impostor"
AVALANCHE = "Avalanche Replay, float32"
AVALANCHE_HALF = "Avalanche Replay, bfloat16"
ICARL = "Avalanche iCaRL, float32"
PLAIN = "plain PyTorch loop"
_EXPERIENCES = 2
_SHARE = 0.06  # of the images and of the memory: what is done once an experience keeps its part of the whole


def rows(settings: Settings, report: Report) -> list[Row]:
    """Milliseconds of two experiences of split-cifar10, the second of them with replay, and our ratios to the others.

    Building models and data sets is not counted. The plain loop has our batches, augmentation and precision. With one
    thread of a CPU times are processor time: what else runs on the core does not count.
    """
    name, share = ("split-digits", 0.2) if settings.quick else ("split-cifar10", _SHARE)
    base = RunConfig(stream=name, data_dir=None if settings.quick else settings.data_dir, share=share, epochs=1)
    ours = replace(base, strategy="replay")
    peer = replace(base, strategy="avalanche-replay")
    contenders: dict[str, _Learners | _Plain] = {
        OURS: _Learners(ours),
        DENSE: _Learners(replace(ours, head="dense")),
        IMPOSTOR: _Learners(replace(base, strategy="impostor")),
        AVALANCHE: _Learners(peer),
        AVALANCHE_HALF: _Learners(replace(peer, precision="bfloat16")),
        ICARL: _Learners(replace(base, strategy="icarl")),
        PLAIN: _Plain(ours),
    }
    for contender in contenders.values():
        contender.prepare(settings.rounds + 2)  # the warm-up takes up to two
    with quiet_avalanche():
        timings = in_turn(contenders, settings.rounds)
    samples = {name: contender.gradient_samples for name, contender in contenders.items()}
    row = timings.row(f"{_EXPERIENCES} experiences of {name}, {share:.0%} of the images")
    row["gradient_samples"] = samples
    found = [row]
    for case, mine, other, bar in (
        ("over Avalanche's Replay", OURS, AVALANCHE, 0.65),
        ("over Avalanche's Replay in bfloat16", OURS, AVALANCHE_HALF, None),
        ("over a plain loop", OURS, PLAIN, 1.1),
        ("with a dense head over a plain loop", DENSE, PLAIN, None),
        ("strategy impostor over Avalanche's Replay", IMPOSTOR, AVALANCHE, 1.0),
        ("strategy impostor over Avalanche's Replay in bfloat16", IMPOSTOR, AVALANCHE_HALF, None),
        ("strategy impostor over Avalanche's iCaRL, a sample", IMPOSTOR, ICARL, None),
    ):
        found.append(_compared(case, timings, mine, other, samples, bar))
        report(f"{case}: {found[-1]['ratio']:.3f} ({timings.median(mine):.2f} s, {timings.median(other):.2f} s)")
    return found


def _compared(case: str, timings: Timings, name: str, other: str, samples: dict[str, int], bar: float | None) -> Row:
    """The ratio of the times of equal numbers of samples that pass the backbone with a gradient."""
    ratio = timings.ratio(name, other) * samples[other] / samples[name]
    return {"case": case, "ratio": ratio} | ({} if bar is None else {"bar": bar, "met": ratio <= bar})


def _scaled(config: RunConfig) -> tuple[Stream, RunConfig]:
    """The stream and the settings, with as small a share of the memory as of the images."""
    stream, resolved = load_stream(config, strategy_spec(config.strategy), lambda *_: None)
    # at least what Avalanche takes whole batches from
    memory = max(2 * (resolved.replay_batch or 0), round((resolved.memory or 0) * (config.share or 1)))
    return stream, replace(resolved, memory=memory)


@final
class _Learners:
    """A strategy, built anew for each call."""

    def __init__(self, config: RunConfig) -> None:
        self.stream, self.config = _scaled(config)
        self.waiting: list[Callable[[], int]] = []
        self.gradient_samples = 0

    def prepare(self, count: int) -> None:
        self.waiting = [self._one() for _ in range(count)]

    def _one(self) -> Callable[[], int]:
        spec = strategy_spec(self.config.strategy)
        learner = build_learner(self.config, spec, self.stream, resolve_device(), lambda _: None)

        def learn() -> int:
            for experience in range(_EXPERIENCES):
                learner.learn(experience)
            return learner.gradient_samples

        return learn

    def __call__(self) -> None:
        self.gradient_samples = self.waiting.pop()()


@final
class _Plain:
    """A loop as one writes it: uint8 images in memory, a reservoir of them (Vitter 1985), autocast, SGD."""

    def __init__(self, config: RunConfig) -> None:
        self.stream, self.config = _scaled(config)
        self.device = resolve_device()
        self.channels_last = prefers_channels_last(self.device)
        self.gradient_samples = 0

    def prepare(self, count: int) -> None:
        """Nothing: a network is made in milliseconds."""

    def __call__(self) -> None:
        config, stream = self.config, self.stream
        torch.manual_seed(config.seed)
        channels = stream.preprocessing.channels
        network = build_backbone(str(config.backbone), stream.num_classes, in_channels=channels).to(self.device)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=config.learning_rate or 0.1)
        self.gradient_samples = 0
        for x, y in self._batches(config.memory or 1, config.batch_size or 1, config.replay_batch or 0):
            with autocast_for(self.device):
                scores = network(x)
            loss = F.cross_entropy(scores.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.gradient_samples += len(y)

    def _batches(self, memory: int, size: int, replayed: int) -> Iterator[tuple[Tensor, Tensor]]:
        stream = self.stream
        augment, generator = get_augmentation(stream.spec.augment), torch.Generator().manual_seed(self.config.seed)
        images = torch.empty(memory, *stream.train.images.shape[1:], dtype=torch.uint8)
        labels = torch.zeros(memory, dtype=torch.int64)
        seen = 0
        for experience in range(_EXPERIENCES):
            data = stream.train_set(experience)
            held, old_images, old_labels = min(seen, memory), images.clone(), labels.clone()
            for rows in torch.randperm(len(data), generator=generator).split(size):
                new, y = data.images[rows], data.labels[rows]
                batch = [augment(new.to(self.device), generator)]
                classes = [y]
                if held:
                    drawn = torch.randint(held, (replayed,), generator=generator)
                    batch.append(augment(old_images[drawn].to(self.device), generator))
                    classes.append(old_labels[drawn])
                x = stream.preprocessing(torch.cat(batch), channels_last=self.channels_last)
                yield x, torch.cat(classes).to(self.device)
                for image, label in zip(new, y, strict=True):
                    place = seen if seen < memory else int(torch.randint(seen + 1, (1,), generator=generator))
                    if place < memory:
                        images[place], labels[place] = image, label
                    seen += 1
