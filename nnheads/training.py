"""Train a headed model: `fit`. `evaluate` and `embed` are here too, for what is trained is then asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import torch

from nnheads import distributed
from nnheads.compiling import compiling
from nnheads.data import ImageSet
from nnheads.devices import Precision, resolve_device
from nnheads.errors import ConfigError, DataError
from nnheads.evaluation import Evaluation, embed, evaluate
from nnheads.headed import HeadedModel, check_headed
from nnheads.heads import BiasedHead
from nnheads.interrupt import InterruptFlag
from nnheads.io import is_saved_model, save
from nnheads.loaders import Data, numbered, preprocessing_of
from nnheads.progress import Progress, reporter
from nnheads.storage import check_replaceable
from nnheads.training_run import History, TrainingRun, fills_first, refreshes_after

__all__ = ["Evaluation", "History", "Progress", "embed", "evaluate", "fit", "fit_gate", "resolve_device"]


def fit(
    model: HeadedModel,
    data: Data,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.1,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    weight_decay: float = 5e-4,
    schedule: Literal["onecycle", "constant"] = "onecycle",
    augment: str = "none",
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    refresh: Literal["auto"] | int = "auto",
    ema: float | None = None,
    compile: bool | str = False,
    seed: int = 0,
    progress: bool | Callable[[Progress], None] = True,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains backbone and head with the head's own objective, and leaves the memory filled and fresh.

    The memory costs little: heads that train with their centers store each embedding as the first epoch produces
    it, and centers then follow their samples, so the only extra pass is the last one, in evaluation mode. The kernel
    head's centers follow their samples too, but where the backbone is frozen and ``track=False`` they are learned. On
    a CPU, the same seed gives the same weights; the caller's random numbers are left as they were. Where the biased
    head cuts the backbone in two, training ends with ``fit_gate``.

    Started by ``torchrun``, processes share the backbone's work, see `nnheads.distributed`; each gets the model, the
    first one writes the checkpoint and shows progress. ``batch_size`` is that of all together.

    Args:
        model: what ``attach_head`` returned. It stays on ``device``, in evaluation mode.
        data: an `ImageSet`, a map-style data set of (x, y) or (x, y, id), or a loader of batches of these. Ids are
            added where there are none (a ``DataLoader`` is rebuilt with its sampler, workers and collate function).
            Transforms inside a data set also apply to what the memory stores; ``augment`` does not. An `ImageSet` also
            gives the model its class names and, from its own statistics, a preprocessing, where it has none. A sample
            that the memory holds already under the same id is replaced; others that it holds stay as they are.
        epochs: passes over the data; 0 only fills the memory.
        batch_size: of what is not a loader already.
        lr: learning rate, the highest one of the schedule.
        optimizer: ``"sgd"``, with Nesterov momentum 0.9, or ``"adamw"``.
        weight_decay: not applied to biases, norms and other one-dimensional parameters.
        schedule: ``"onecycle"`` (30 % warm-up, then cosine decay; by step) or ``"constant"``.
        augment: of uint8 images, see `nnheads.data.get_augmentation`.
        device: see `resolve_device`.
        precision: see `nnheads.devices.resolve_precision`.
        refresh: epochs between passes that embed all stored samples anew; 0: before and after training only.
            ``"auto"``: before where centers are fixed, every 4 epochs where they do not follow their samples.
            After training there always is one, except where learned or fixed centers are to stay.
        ema: decay of an average of the weights, for instance 0.99; the averaged model is what is left, and embeds the
            memory. Batch-norm statistics are averaged likewise. The decay starts low and rises to the value given.
        compile: train and embed with the backbone compiled, see `nnheads.evaluate`. What is saved is the plain one.
        seed: of order, augmentation and dropout.
        progress: a progress bar, or a line an epoch where there is no terminal, on stderr; or a function, called
            after each step, on a GPU after every twentieth; or False.
        checkpoint: folder to `nnheads.save` the model to, at the end or on Ctrl-C.

    Returns:
        See `History`.

    Raises:
        ConfigError: an option that cannot work, no compiler, or the loss becomes NaN or infinite.
        DataError: there are no samples, or a memory head gets a loader without ids or ids that name several samples;
            or an `ImageSet` numbers its named classes otherwise than the model.
        CheckpointError: the checkpoint cannot be written, which is told before training.
        KeyboardInterrupt: on Ctrl-C, after the current step is finished, a usable memory made (centers are left as
            training has them; an empty memory gets 4,096 samples) and the checkpoint written. A second Ctrl-C ends at
            once. Only the main thread can be interrupted so.
    """
    check_headed("fit", model)
    _check_options(epochs, batch_size, lr, weight_decay, optimizer, schedule, refresh, ema)
    refresh = refresh if refresh == "auto" else int(refresh)
    if checkpoint is not None and distributed.launched_rank() == 0:
        check_replaceable(Path(checkpoint), is_saved_model)
    distributed.join()
    if not distributed.is_main():
        progress = False
    started = time.perf_counter()
    where = resolve_device(device)
    if isinstance(data, ImageSet):
        _describe(model, data)
    model.to(where)
    devices = [where.index or 0] if where.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        reporter(progress) as report,
        InterruptFlag() as interrupt,
        distributed.data_parallel(model),
        compiling(model, compile),
    ):
        torch.manual_seed(seed)
        run = TrainingRun(model, data, where, precision, lr, report, interrupt)
        run.prepare(epochs, batch_size, optimizer, weight_decay, schedule, augment, ema, seed)
        try:
            if model.head.uses_memory and fills_first(model.head, refresh, epochs):
                run.embed_memory()
            for epoch in range(epochs):
                run.epoch(epoch)
                if interrupt.requested:
                    break
                if run.trains_with_memory and epoch + 1 < epochs and refreshes_after(model.head, refresh, epoch):
                    run.embed_memory()
            run.finish()
            if model.thumbnails is not None and isinstance(data, ImageSet):
                model.thumbnails.renew(data)
        finally:
            model.eval()
            if run.reordered:  # saved and loaded weights are in this order: outputs stay the same to the last bit
                model.backbone.to(memory_format=torch.contiguous_format)
        run.history.seconds = time.perf_counter() - started
        if checkpoint is not None:
            _save_once(model, checkpoint)
        if interrupt.requested:
            raise KeyboardInterrupt(
                f"interrupted after {run.step} steps" + (f"; saved to {checkpoint}" if checkpoint is not None else "")
            )
    head = model.head
    if epochs and model.at is not None and isinstance(head, BiasedHead) and head.gate_epochs and not head.gating:
        fit_gate(
            model,
            data,
            epochs=head.gate_epochs,
            batch_size=batch_size,
            augment=augment,
            device=device,
            precision=precision,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )
        run.history.seconds = time.perf_counter() - started
    return run.history


def fit_gate(
    model: HeadedModel,
    data: Data,
    *,
    epochs: int = 3,
    batch_size: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    augment: str = "none",
    calibration: Data | None = None,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    seed: int = 0,
    progress: bool | Callable[[Progress], None] = True,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains projector, memory and gate of a biased head; f1, f2 and the classifier stay as they are.

    The network is one that is trained already: by ``fit``, which ends with this, or before the head was attached. The
    loss is `BiasedHead.gate_loss`; then the centers are chosen anew and, where it is automatic, the threshold.

    Args:
        model: what ``attach_head(network, "biased", at=...)`` returned.
        data: the training set, as in ``fit``.
        epochs: passes over it; 0 chooses centers and threshold only.
        batch_size, lr, weight_decay, augment, device, precision, seed, progress, checkpoint: as in ``fit``, with AdamW.
        calibration: labelled samples that nothing was trained on, to choose the threshold on. By default the share of
            the training set that the head's ``holdout`` says, by id, which teaches neither projector nor gate; but the
            network was trained on these, so that what skipping costs is overestimated and the threshold is high.

    Returns:
        See ``fit``.

    Raises:
        ConfigError: the model is not cut in two; or as in ``fit``.
        DataError: as in ``fit``.
    """
    head = model.gated_head()
    started = time.perf_counter()
    if calibration is not None and head.gate.option != "auto":
        raise ConfigError("fit_gate: calibration= is to choose the threshold, which the head was given: leave one out")
    if checkpoint is not None and distributed.launched_rank() == 0:
        check_replaceable(Path(checkpoint), is_saved_model)
    try:
        with _frozen_backbone(model), head.training_the_gate():
            if epochs and not len(head.memory):
                fit(model, data, epochs=0, device=device, precision=precision, progress=False)
            history = fit(
                model,
                data,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                optimizer="adamw",
                weight_decay=weight_decay,
                augment=augment,
                device=device,
                precision=precision,
                seed=seed,
                progress=progress,
            )
    except KeyboardInterrupt:
        if checkpoint is not None:
            _save_once(model, checkpoint)
        raise
    if calibration is not None:
        z, y, _ = embed(model, calibration, batch_size=batch_size, device=device, precision=precision)
        head.calibrate(z.to(model.device), y.to(model.device))
    if checkpoint is not None:
        _save_once(model, checkpoint)
    history.seconds = time.perf_counter() - started
    return history


def _save_once(model: HeadedModel, checkpoint: str | Path) -> None:
    """Written by the first process, there when any of them goes on."""
    if distributed.is_main():
        save(model, checkpoint)
    distributed.wait()


# ---- setting up --------------------------------------------------------------------------------------------------


def _check_options(
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    optimizer: str,
    schedule: str,
    refresh: str | int,
    ema: float | None,
) -> None:
    for name, value, allowed in (
        ("optimizer", optimizer, ("sgd", "adamw")),
        ("schedule", schedule, ("onecycle", "constant")),
    ):
        if value not in allowed:
            raise ConfigError(f"fit: {name} must be one of {', '.join(allowed)}, got {value!r}")
    for name, count, least in (("epochs", epochs, 0), ("batch_size", batch_size, 1)):
        if not _is_whole(count) or count < least:
            raise ConfigError(f"fit: {name} must be a whole number, {least} or more, got {count!r}")
    if not _is_number(lr) or lr <= 0:
        raise ConfigError(f"fit: lr must be a number above 0, got {lr!r}")
    if not _is_number(weight_decay) or weight_decay < 0:
        raise ConfigError(f"fit: weight_decay must be a number, 0 or more, got {weight_decay!r}")
    if refresh != "auto" and (not _is_whole(refresh) or int(refresh) < 0):
        raise ConfigError(f"fit: refresh must be 'auto' or a number of epochs, got {refresh!r}")
    if ema is not None and (not _is_number(ema) or not 0 < ema < 1):
        raise ConfigError(f"fit: ema must be a number between 0 and 1, got {ema!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _describe(model: HeadedModel, data: ImageSet) -> None:
    """What an image set knows and the model does not: classes, their names, preprocessing."""
    if not len(data):
        raise DataError("there is nothing to train on: the data set is empty")
    model.head.widen(int(data.labels.max()) + 1)
    if model.preprocessing is None:
        model.preprocessing = preprocessing_of(data)
    known, named = model.class_names, data.class_names
    if known is None and (
        len(named) == model.head.num_classes or (not numbered(named) and _has_room_for(model, named))
    ):
        model.class_names = named
    elif known is not None and not numbered(known) and named[: len(known)] == known and _has_room_for(model, named):
        model.class_names = named  # classes that are new


def _has_room_for(model: HeadedModel, names: tuple[str, ...]) -> bool:
    return len(names) <= model.head.num_classes


@contextmanager
def _frozen_backbone(model: HeadedModel) -> Iterator[None]:
    needed = [p for p in model.backbone.parameters() if p.requires_grad]
    for p in needed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in needed:
            p.requires_grad_(True)
