"""The same training with one head after another: who is how accurate, how well calibrated, how big and how fast.

Every configuration (head, seed) is one JSON file, written when it is finished, so that an interrupted comparison goes
on where it was; ``summary.json`` holds the means and spreads that are made from these files.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from nnheads.benchmarks.comparison import MEASURES, RECIPES, Cell, CompareConfig, Recipe, cells, head_variant
from nnheads.benchmarks.config import unwritten_precision
from nnheads.benchmarks.measures import mean_and_spread
from nnheads.benchmarks.results import SUMMARY, check_same_comparison, device_name, versions, write_json
from nnheads.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from nnheads.benchmarks.datasets import ImageData
    from nnheads.data import ImageSet
    from nnheads.headed import HeadedModel
    from nnheads.training import Progress as FitProgress

__all__ = ["MEASURES", "RECIPES", "Cell", "CompareConfig", "Recipe", "cells", "compare", "summarize"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is (0: not known)."""

REFERENCE = "dense"
"""The head whose predictions the others are compared with."""

TIMED_SAMPLES = 1024
TIMED_ROUNDS = 5


def compare(
    config: CompareConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains the same backbone from the same seeds with each head and measures it.

    Args:
        config: what to compare.
        out: folder of the results, made where it is missing: ``HEAD-seedN.json`` for each configuration and
            ``summary.json``.
        resume: keep the configurations that ``out`` holds already; without it, such a folder is refused.
        progress: called as the work goes on.
        finished: called with the results of each configuration once they are written.

    Returns:
        The summary, as `summarize` makes it.

    Raises:
        ConfigError: see `CompareConfig.check`; or ``out`` holds results and ``resume`` is False, or they were made
            with other settings.
        DataError: the images are missing or damaged.
        CheckpointError: a file in ``out`` cannot be read.
    """
    config.check()
    settings = config.settings()
    wanted = cells(config, out)
    held = sorted(out.glob("*.json")) if out.is_dir() else []
    if held and not resume:
        raise ConfigError(f"{out} holds results already: give another --out, or --resume to finish what is there")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: give a folder")
    check_same_comparison(out, "dataset", config.dataset)
    found = {cell: _finished(cell, settings) for cell in wanted}
    data: ImageData | None = None
    foreign: ImageSet | None = None
    results = []
    for done, cell in enumerate(wanted):
        result = found[cell]
        if result is None:
            if data is None:
                data = _load(config, progress)
                foreign = _load_foreign(config, data)
            report = _Report(progress, f"{cell.head}, seed {cell.seed}", done, len(wanted))
            result = _train(config, cell, data, foreign, report)
            result = {"head": cell.head, "seed": cell.seed, "settings": settings, **result}
            write_json(cell.results, result)
            if finished is not None:
                finished(result)
        results.append(result)
    summary = summarize(config, results, _agreements(config, out))
    write_json(out / SUMMARY, summary)
    return summary


def summarize(
    config: CompareConfig, results: Sequence[dict[str, Any]], agreements: dict[tuple[str, int], float]
) -> dict[str, Any]:
    """One row a head: the mean of each measure over the seeds and its spread.

    Args:
        config: what was compared.
        results: one a configuration.
        agreements: by head and seed, the share of test images that the head and the dense one answer alike.

    Returns:
        ``kind``, the ``dataset``, ``seeds``, ``settings`` and ``rows``; a row has ``head`` and, for each
        of the `MEASURES`, ``mean`` and ``spread`` (sample standard deviation, None for one seed), or None where there
        is nothing to measure.
    """
    rows = []
    for head in config.heads:
        row: dict[str, Any] = {"head": head}
        own = [result for result in results if result["head"] == head]
        for measure in MEASURES:
            values: list[float | None]
            if measure == "agreement":
                values = [agreements.get((head, seed)) for seed in config.seeds]
            else:
                # None where it was made before there was such a measure
                values = [result.get(measure) for result in own]
            row[measure] = mean_and_spread(values)
        rows.append(row)
    return {
        "kind": "dataset",
        "dataset": config.dataset,
        "seeds": list(config.seeds),
        "settings": config.settings(),
        "rows": rows,
    }


def _finished(cell: Cell, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not cell.results.is_file() or not cell.predictions.is_file():
        return None
    try:
        result = json.loads(cell.results.read_text(encoding="utf-8"))
        made_with = {"precision": unwritten_precision(settings["device"]), **result["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{cell.results} cannot be read ({error}): remove it and it is made again") from None
    for name, value in settings.items():
        if made_with.get(name) != value:
            raise ConfigError(
                f"{cell.results} was made with {name} {made_with.get(name)}, not {value}: give another --out"
            )
    return dict(result)


@final
class _Report:
    """Progress of one configuration as a part of the whole."""

    def __init__(self, progress: Progress | None, name: str, done: int, cells: int) -> None:
        self.progress, self.name, self.done, self.cells = progress, name, done, cells

    def __call__(self, what: str, share: float) -> None:
        """``share`` of this configuration is done, 0 to 1."""
        if self.progress is not None:
            self.progress(f"{self.name}: {what}", round(100 * (self.done + share)), 100 * self.cells)


def _load(config: CompareConfig, progress: Progress | None) -> ImageData:
    from nnheads.benchmarks.datasets import load_dataset

    return load_dataset(config.dataset, config.data_dir, size=config.image_size, progress=progress)


def _load_foreign(config: CompareConfig, data: ImageData) -> ImageSet | None:
    from nnheads.benchmarks.datasets import load_foreign

    return None if config.ood is None else load_foreign(config.ood, config.data_dir, data.preprocessing)


def _train(
    config: CompareConfig, cell: Cell, data: ImageData, foreign: ImageSet | None, report: _Report
) -> dict[str, Any]:
    import numpy as np
    import torch

    from nnheads.calibration import cross_fitted
    from nnheads.gating import skipped_share
    from nnheads.heads import MemoryHead
    from nnheads.training import evaluate, fit

    recipe = config.recipe()
    # The backbone is built right after the seed is set, so its first weights are the same for every head.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = _build(config, cell, data)
    epochs = recipe.epochs if _learns(model) else 0

    def step(now: FitProgress) -> None:
        within = now.step / now.steps if now.steps else 0.0
        report(f"epoch {now.epoch + 1}/{now.epochs}, loss {now.loss:.3f}", (now.epoch + within) / (now.epochs + 1))

    history = fit(
        model,
        data.train,
        epochs=epochs,
        batch_size=recipe.batch_size,
        lr=recipe.learning_rate,
        optimizer=recipe.optimizer,
        weight_decay=recipe.weight_decay,
        augment=recipe.augment,
        device=config.device,
        compile=config.compile,
        seed=cell.seed,
        progress=step,
    )
    report("evaluating", epochs / (epochs + 1))
    found = evaluate(model, data.test, device=config.device)
    # Written before the results, whose file says that the configuration is finished.
    _write_array(cell.predictions, found.predictions.numpy().astype(np.int16))
    scaled = cross_fitted(found)
    held = model.head.bytes if isinstance(model.head, MemoryHead) else 0
    return {
        "dataset": config.dataset,
        "backbone": recipe.backbone,
        "accuracy": found.accuracy,
        # JSON has no infinity, which a head that is certain and wrong can reach
        "log_loss": found.log_loss if math.isfinite(found.log_loss) else None,
        "ece": found.ece,
        "ece_scaled": scaled.ece,
        "log_loss_scaled": scaled.log_loss,
        **_outliers(model, data.test, foreign, config.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "memory_bytes": int(held),
        "train_seconds": history.seconds,
        "ms_per_sample": _inference_ms(model, data, config.device),
        "skipped": None if model.at is None else skipped_share(model, data.test, device=config.device),
        "train_samples": len(data.train),
        "test_samples": len(data.test),
        "gradient_samples": history.gradient_samples,
        "versions": versions(),
        "device": device_name(model.device),
    }


def _build(config: CompareConfig, cell: Cell, data: ImageData) -> HeadedModel:
    """The backbone with its first weights, and the head on it."""
    from nnheads.attach import attach_head
    from nnheads.backbones import build_backbone
    from nnheads.weights import build_pretrained, freeze, load_weights, published_statistics

    name, classes = config.recipe().backbone, data.train.num_classes
    channels, preprocessing = data.preprocessing.channels, data.preprocessing
    if config.pretrained:
        backbone = build_pretrained(name, channels)
        known = published_statistics(name, backbone)
        if known is not None and len(known[0]) == channels:
            preprocessing = replace(preprocessing, mean=known[0], std=known[1])
    else:
        backbone = build_backbone(name, classes, channels)
    head, options = head_variant(cell.head)
    model = attach_head(
        backbone,
        head,
        num_classes=classes,
        preprocessing=preprocessing,
        class_names=data.train.class_names,
        **options,
    )
    if config.weights is not None:
        load_weights(model, config.weights)
    if config.freeze:
        freeze(model)
    return model


def _learns(model: HeadedModel) -> bool:
    """Whether training changes the answers: with a frozen backbone, not those of a head that only its memory makes."""
    if any(parameter.requires_grad for parameter in model.backbone.parameters()):
        return True
    head = model.head
    return bool(list(head.parameters())) and not (head.uses_memory and head.trains_with == "objective")


def _outliers(model: HeadedModel, own_images: ImageSet, foreign: ImageSet | None, device: str) -> dict[str, Any]:
    from nnheads.benchmarks.outliers import auroc

    if foreign is None:
        return {"auroc": None}
    own, by_score = auroc(model, own_images, foreign, device)
    return {"auroc": own, "auroc_by_score": by_score}


def _inference_ms(model: HeadedModel, data: ImageData, device: str) -> float:
    """Milliseconds for one image of a batch of 128: the median of several rounds after a warm-up."""
    import torch

    from nnheads.training import evaluate

    sample = data.test.subset(torch.arange(min(TIMED_SAMPLES, len(data.test))))
    rounds = [evaluate(model, sample, batch_size=128, device=device).seconds for _ in range(TIMED_ROUNDS + 1)]
    return 1000 * statistics.median(rounds[1:]) / len(sample)


def _agreements(config: CompareConfig, out: Path) -> dict[tuple[str, int], float]:
    """By head and seed, the share of test images answered as by the dense head of the same seed."""
    import numpy as np

    shares: dict[tuple[str, int], float] = {}
    if REFERENCE not in config.heads:
        return shares
    for seed in config.seeds:
        reference = np.load(Cell(REFERENCE, seed, out).predictions, allow_pickle=False)
        for head in config.heads:
            own = np.load(Cell(head, seed, out).predictions, allow_pickle=False)
            shares[head, seed] = float((own == reference).mean())
    return shares


def _write_array(path: Path, array: Any) -> None:
    import numpy as np

    from nnheads.storage import replacing_file

    with replacing_file(path) as made, made.open("wb") as file:
        np.save(file, array, allow_pickle=False)
