"""One run: a stream, a backbone, a head and a strategy; what comes out is an accuracy matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from nnheads import distributed
from nnheads.benchmarks.checkpoint import RunState, check_new, load_checkpoint, save_checkpoint
from nnheads.benchmarks.config import RunConfig
from nnheads.benchmarks.measures import (
    accuracy_row,
    anytime_accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    seen_accuracy,
)
from nnheads.benchmarks.results import MODEL, RESULTS, check_out, device_name, processor_name, versions, write_json
from nnheads.benchmarks.run_setup import build_learner, load_stream
from nnheads.benchmarks.tensorboard import RunLog, check_tensorboard
from nnheads.errors import ConfigError
from nnheads.strategies.quiet import quiet_avalanche
from nnheads.strategies.registry import list_strategies, strategy_spec

if TYPE_CHECKING:
    import torch

    from nnheads.benchmarks.streams import Stream
    from nnheads.strategies.learner import Learner

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known); in training at most ten
times a second, with new samples seen. What stands before the first colon says enough for a log."""

__all__ = ["Progress", "RunConfig", "evaluate_row", "run"]

EVAL_BATCH: Final = 256
_STEP_SECONDS: Final = 0.1


def run(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    progress: Progress | None = None,
    save_model: bool = True,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    tensorboard: str | Path | None = None,
) -> dict[str, Any]:
    """Train on a stream, experience after experience, and evaluate after each on the test samples of all seen so far.

    Args:
        config: the settings.
        out: folder that gets ``results.json`` and, where asked and where the strategy's classifier is a head,
            ``model/``. Nothing is written before the end. None writes nothing.
        progress: told how far the run is, see `Progress`.
        save_model: whether the model is saved beside the results.
        checkpoint: folder that gets the state of the run after every experience; None for none.
        resume: go on from that state; on a CPU the accuracies are those of an uninterrupted run.
        tensorboard: folder for a log of the accuracies after every experience; None for none.

    Started by ``torchrun``, processes share the work of the backbone, see `nnheads.distributed`; the first writes.

    Returns:
        The content of ``results.json``. Accuracies are in 0..1: ``accuracy`` over all test samples of the classes seen,
        ``forgetting``, ``accuracy_matrix`` (see `nnheads.benchmarks.measures`), ``memory_bytes`` as a whole and in
        ``memory_parts``.

    Raises:
        ConfigError: settings that cannot work, or ``out`` holds results already.
        DataError: the data are missing or unusable.
        CheckpointError: the checkpoint cannot be written, or is missing, damaged or of a run with other settings.
    """
    started = time.perf_counter()
    spec = strategy_spec(config.strategy)
    if distributed.launched() > 1 and not spec.ours:
        raise ConfigError(f"strategy {spec.name!r} cannot share its work among processes: run it without torchrun")
    main = distributed.launched_rank() == 0
    target = check_out(Path(out), resume=resume) if out is not None and main else None
    if checkpoint is None and resume:
        raise ConfigError("resume needs the checkpoint folder of the run that was interrupted")
    if checkpoint is not None and not spec.ours:
        able = ", ".join(s.name for s in list_strategies() if s.ours)
        raise ConfigError(f"strategy {spec.name!r} cannot be resumed and takes no checkpoint; these can: {able}")
    if checkpoint is not None and not resume:
        check_new(Path(checkpoint))
    if tensorboard is not None:
        check_tensorboard()
    tell = progress or _nobody
    distributed.take_device()  # before anything is put on one; the group is joined later
    stream, config = load_stream(config, spec, tell)
    from nnheads.devices import resolve_device

    device = resolve_device(config.device)
    steps = _Steps(tell)
    tell("loading Avalanche", 0, 0)
    state = load_checkpoint(Path(checkpoint), config) if checkpoint is not None and resume else RunState()
    learner = build_learner(config, spec, stream, device, steps.step)
    distributed.join()  # not before: in a group Avalanche refuses the loggers that its modules make when imported
    untrained = evaluate_row(learner, stream, -1, device, future=True) if config.future else None
    if state.matrix:
        learner.load_state(state.tensors, state.values)
    before = state.seconds
    matrix, train_seconds, eval_seconds = state.matrix, state.train_seconds, state.eval_seconds
    counts = [len(stream.test_indices(e)) for e in range(len(stream))]
    log = RunLog(Path(tensorboard), tasks=config.scenario == "task") if tensorboard is not None and main else None
    if log is not None and not log.begun:  # what an interrupted run had learned is in a log elsewhere
        for e in range(len(matrix)):
            log.experience(matrix, counts, e, {})
    for e in range(len(matrix), len(stream)):
        total = len(stream.train_indices(e)) * (config.epochs or 1)
        what = f"experience {e + 1} of {len(stream)}"
        steps.begin(f"{what}: training", total)
        moment = time.perf_counter()
        with quiet_avalanche(), distributed.data_parallel():
            learner.learn(e)
        train_seconds.append(time.perf_counter() - moment)
        tell(f"{what}: evaluating", total, total)
        moment = time.perf_counter()
        matrix.append(evaluate_row(learner, stream, e, device, future=config.future))
        eval_seconds.append(time.perf_counter() - moment)
        tell(f"{what} learned, accuracy {100 * seen_accuracy(matrix, counts):.1f} %", total, total)
        if log is not None:
            log.experience(matrix, counts, e, _sizes(learner, train_seconds[-1]))
        if checkpoint is not None:
            state.seconds = before + time.perf_counter() - started
            state.tensors, state.values = learner.state()
            if main:
                save_checkpoint(Path(checkpoint), config, state)
    if log is not None:
        log.close()
    parts = learner.memory_parts()
    results = {
        "stream": config.stream,
        "head": config.head,
        "strategy": config.strategy,
        "backbone": config.backbone,
        "seed": config.seed,
        "scenario": config.scenario,
        "accuracy": seen_accuracy(matrix, counts),
        "forgetting": forgetting(matrix),
        "average_accuracy": average_accuracy(matrix),
        "anytime_accuracy": anytime_accuracy(matrix, counts),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": (
            forward_transfer(matrix, untrained) if untrained is not None and config.strategy != "joint" else None
        ),
        "accuracy_matrix": matrix,
        "untrained_accuracy": untrained,
        "test_counts": counts,
        "classes": [[stream.class_names[c] for c in classes] for classes in stream.experiences],
        "train_seconds": sum(train_seconds),
        "eval_seconds": sum(eval_seconds),
        "train_seconds_each": train_seconds,
        "seconds": before + time.perf_counter() - started,
        "gradient_samples": learner.gradient_samples,
        "memory_bytes": sum(parts.values()),
        "memory_parts": parts,
        "exemplars": learner.exemplars,
        "centers": [_named(event, stream.class_names) for event in learner.center_history()],
        "config": config.to_dict(),
        "versions": versions(),
        "device": device_name(device),
        "processor": processor_name(),
    }
    results["processes"] = distributed.world_size()
    if target is not None:
        model = learner.headed_model() if save_model else None
        if model is not None:
            from nnheads.io import save

            save(model, target / MODEL)
        # last, because it says that the run is complete
        write_json(target / RESULTS, results)
    return results


def evaluate_row(
    learner: Learner, stream: Stream, after: int, device: torch.device, *, future: bool = False
) -> list[float | None]:
    """Row ``after`` of the accuracy matrix, -1 for the untrained model; None for experiences to come, unless they are
    asked for too."""
    count = len(stream)
    wanted = range(count if future else after + 1)
    row: list[float | None] = [None] * count
    if stream.shared_test:  # the test samples are the same for all: one pass serves
        shared = _accuracy(learner, stream, 0, device)
        for e in wanted:
            row[e] = shared
        return row
    for e in wanted:
        row[e] = _accuracy(learner, stream, e, device)
    return row


def _accuracy(learner: Learner, stream: Stream, experience: int, device: torch.device) -> float | None:
    import torch

    from nnheads.data import BatchLoader

    data = stream.test_set(experience)
    batches = BatchLoader(data, stream.preprocessing, EVAL_BATCH, device=device, channels_last=learner.channels_last)
    mask = stream.class_mask(experience).to(device) if stream.scenario == "task" else None
    right = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for x, y, _ in batches:
            scores = learner.scores(x)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            right += (scores.argmax(1) == y).sum()
    return accuracy_row([int(right)], [len(data)])[0]


def _sizes(learner: Learner, seconds: float) -> dict[str, float]:
    """What is logged beside accuracies."""
    held = {f"Memory/{name}_bytes": float(held) for name, held in learner.memory_parts().items()}
    return {
        **held,
        "Memory/exemplars": learner.exemplars,
        "Training/gradient_samples": learner.gradient_samples,
        "Training/seconds": seconds,
    }


def _named(event: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """A change of the centers with classes by name, as JSON's keys are text."""
    return {
        key: {class_names[c]: n for c, n in value.items()} if isinstance(value, dict) else value
        for key, value in event.items()
    }


@final
class _Steps:
    """Passes steps on, not more often than anyone can look."""

    def __init__(self, tell: Progress) -> None:
        self.tell = tell
        self.begin("", 0)

    def begin(self, what: str, total: int) -> None:
        """The next steps belong to this, of so many samples."""
        self.what, self.total, self.seen, self.told = what, total, 0, 0.0

    def step(self, samples: int) -> None:
        """So many new samples were seen."""
        self.seen = min(self.seen + samples, self.total)
        moment = time.monotonic()
        if moment - self.told >= _STEP_SECONDS:
            self.told = moment
            self.tell(self.what, self.seen, self.total)


def _nobody(what: str, done: int, total: int) -> None:
    """Tells nobody."""
