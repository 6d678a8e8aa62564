"""A backbone with a head, trained by `nnheads.fit` as a cell's settings say."""

from __future__ import annotations

from typing import Any, Final

import torch

from nnheads.attach import attach_head
from nnheads.backbones import build_backbone
from nnheads.benchmarks.datasets import ImageData
from nnheads.benchmarks.studies.study import Job, Settings
from nnheads.headed import HeadedModel
from nnheads.training import History, Progress, fit
from nnheads.weights import build_pretrained

FIT = ("epochs", "batch_size", "lr", "optimizer", "weight_decay", "schedule", "augment", "refresh", "precision")

SMALL_NETWORK: Final[Settings] = {
    "dataset": "cifar10",
    "form": None,
    "backbone": "resnet9",
    "backbone_options": {"width": 16},
    "pretrained": False,
    "optimizer": "adamw",
    "lr": 3e-3,
    "batch_size": 64,
}
"""What a study of fine-grained recognition takes below the scale ``paper``, in place of a pretrained network."""


def headed_model(job: Job, data: ImageData, **options: Any) -> HeadedModel:
    """A model by the settings ``backbone``, ``backbone_options``, ``pretrained``, ``head`` and ``head_options``.

    Args:
        job: what is run; its seed draws the first weights.
        data: gives classes, channels and preprocessing.
        **options: of `attach_head`, beside those in the settings.
    """
    settings = job.settings
    torch.manual_seed(job.seed)
    channels, more = data.train.images.shape[1], dict(settings.get("backbone_options") or {})
    if settings.get("pretrained"):
        backbone = build_pretrained(settings["backbone"], channels, **more)
    else:
        backbone = build_backbone(settings["backbone"], data.train.num_classes, channels, **more)
    return attach_head(
        backbone,
        settings["head"],
        num_classes=data.train.num_classes,
        preprocessing=data.preprocessing,
        class_names=data.train.class_names,
        **{**dict(settings.get("head_options") or {}), **options},
    )


def trained_model(job: Job, data: ImageData, **options: Any) -> tuple[HeadedModel, History]:
    """`headed_model`, trained by `nnheads.fit` with those of its options that the settings name."""
    model = headed_model(job, data, **options)
    return model, fitted(job, data, model)


def fitted(job: Job, data: ImageData, model: HeadedModel, **more: Any) -> History:
    """Trains a model by the settings."""

    def report(progress: Progress) -> None:
        if progress.step % 10 == 0:
            total = progress.epochs * (progress.steps or 0)
            job.report("training", progress.epoch * (progress.steps or 0) + progress.step, total)

    given = {key: job.settings[key] for key in FIT if job.settings.get(key) is not None}
    return fit(model, data.train, device=job.device, seed=job.seed, progress=report, **{**given, **more})
