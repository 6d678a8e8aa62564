"""What a comparison of heads on a data set consists of: its settings, its configurations and what is measured."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from nnheads.errors import ConfigError, unknown_name

MEASURES: tuple[str, ...] = (
    "accuracy",
    "log_loss",
    "ece",
    "ece_scaled",
    "log_loss_scaled",
    "auroc",
    "parameters",
    "memory_bytes",
    "train_seconds",
    "ms_per_sample",
    "skipped",
    "agreement",
)
"""What is measured."""


def head_variant(text: str) -> tuple[str, dict[str, Any]]:
    """A head and options of it, from ``HEAD`` or ``HEAD+KEY=VALUE+KEY=VALUE...``, as ``impostor+centers=tied``.

    Values are read as JSON where they are JSON, else taken as text. ``biased`` also takes ``at``, the module behind
    which the backbone is cut in two (see `nnheads.attach_head`); without it nothing is cut and nothing skips.

    Raises:
        ConfigError: a part has another form or is given twice, or there is no such head or option
            (`UnknownNameError`).
    """
    from nnheads.benchmarks.variants import json_or_text
    from nnheads.heads import head_class

    name, *parts = (part.strip() for part in text.split("+"))
    known = head_class(name).option_names()
    if name == "biased":
        known.append("at")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"{part!r} in {text!r} must have the form key=value, as in impostor+centers=tied")
        if key in options:
            raise ConfigError(f"{text!r} gives {key} twice")
        if key not in known:
            raise unknown_name(f"option of head {name!r}", key, known)
        options[key] = json_or_text(value)
    return name, options


def expand_heads(heads: Sequence[str]) -> tuple[str, ...]:
    """The heads of a comparison, where ``all`` stands for every one that is registered; each once, in order."""
    from nnheads.heads import list_heads

    every = (name for text in heads for name in (list_heads() if text == "all" else [text]))
    return tuple(dict.fromkeys(every))


@final
@dataclass(frozen=True)
class Recipe:
    """How a backbone is trained on a data set unless the user says otherwise.

    Attributes:
        backbone: see `nnheads.backbones`.
        epochs: passes over the training images.
        batch_size: images a step; at least twice the number of classes, which NCA needs.
        learning_rate: the highest of the one-cycle schedule.
        augment: see `nnheads.data.get_augmentation`.
        optimizer, weight_decay: see `nnheads.fit`. AdamW's step does not depend on the scale of a head's loss, so
            that one learning rate is fair to all heads.
    """

    backbone: str
    epochs: int
    batch_size: int
    learning_rate: float
    augment: str
    optimizer: Literal["sgd", "adamw"] = "adamw"
    weight_decay: float = 0.05


RECIPES: dict[str, Recipe] = {
    "digits": Recipe("convnet", 20, 64, 0.003, "crop"),
    "mnist": Recipe("convnet", 5, 128, 0.003, "crop"),
    "fmnist": Recipe("convnet", 10, 128, 0.003, "crop-flip"),
    "cifar10": Recipe("resnet9", 10, 128, 0.003, "crop-flip"),
    "cifar100": Recipe("resnet9", 15, 256, 0.003, "crop-flip"),
    "svhn": Recipe("resnet9", 3, 128, 0.003, "crop"),
    "core50": Recipe("resnet9", 5, 128, 0.003, "crop-flip"),
    "cifar110": Recipe("resnet9", 15, 256, 0.003, "crop-flip"),
}
FOLDER_RECIPE = Recipe("resnet9", 30, 64, 0.003, "crop-flip")
"""For ``images:DIR``."""


@final
@dataclass(frozen=True)
class CompareConfig:
    """What to compare, and on what.

    Attributes:
        heads: names of heads, with options where they are to differ from the defaults; see `head_variant`.
        dataset: where the backbone is trained on all classes at once; see `nnheads.benchmarks.datasets`.
        seeds: each head is trained once with each.
        backbone, epochs, batch_size, learning_rate: None for the data set's own.
        data_dir: where the images are.
        device: "auto", "cuda", "mps" or "cpu".
        pretrained: start from the weights that the backbone's makers published; see
            `nnheads.weights.build_pretrained`. Images are normalised as these weights expect.
        weights: start from the weights in this file; see `nnheads.weights.load_weights`.
        freeze: leave the backbone as it is and train heads alone.
        image_size: side of the images in pixels, to which they are resized; None for the data set's own.
        compile: train with the backbone compiled, see `nnheads.fit`.
        ood: a data set whose test images heads are to tell from those of ``dataset``; None for none.
    """

    heads: tuple[str, ...] = ("dense", "knn", "nca")
    dataset: str = "digits"
    seeds: tuple[int, ...] = (0,)
    backbone: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    data_dir: Path | None = None
    device: str = "auto"
    pretrained: bool = False
    weights: Path | None = None
    freeze: bool = False
    image_size: int | None = None
    ood: str | None = None
    compile: bool = False

    def recipe(self) -> Recipe:
        """The training on ``dataset``: its defaults, and what the user set."""
        known = FOLDER_RECIPE if self.dataset.startswith("images:") else RECIPES[self.dataset]
        return Recipe(
            self.backbone or known.backbone,
            self.epochs or known.epochs,
            self.batch_size or known.batch_size,
            self.learning_rate or known.learning_rate,
            known.augment,
            known.optimizer,
            known.weight_decay,
        )

    def settings(self) -> dict[str, Any]:
        """All that a finished configuration must share with the others of its folder, as JSON takes it."""
        from nnheads.devices import auto_precision

        shared = {"device": self.device, "data_dir": self.data_dir.resolve().name if self.data_dir else None}
        # None where nothing was asked for, so that results made before there was such a setting still count
        start = {
            "pretrained": self.pretrained or None,
            "weights": None if self.weights is None else _named_file(self.weights),
            "freeze": self.freeze or None,
            "image_size": self.image_size,
            "ood": self.ood,
            "compile": self.compile or None,
        }
        recipe = asdict(self.recipe())
        return {"dataset": self.dataset, **recipe, **shared, **start, "precision": auto_precision(self.device)}

    def check(self) -> None:
        """Refuses what cannot work before anything is trained.

        Raises:
            ConfigError: a name that is not known (`UnknownNameError`), or an option out of its range.
        """
        from nnheads.backbones import build_backbone
        from nnheads.benchmarks.datasets import JOINED, list_datasets
        from nnheads.training import resolve_device

        if not self.heads or not self.seeds:
            raise ConfigError("compare needs at least one head and one seed")
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above 0, not {self.learning_rate}")
        for head in self.heads:
            head_variant(head)
            if [file_name(other) for other in self.heads].count(file_name(head)) > 1:
                raise ConfigError(f"head {head!r} is given twice")
        if self.dataset not in RECIPES and not self.dataset.startswith("images:"):
            raise unknown_name("data set", self.dataset, [*list_datasets(), "images:DIR"])
        if self.ood is not None and self.ood not in list_datasets() and not self.ood.startswith("images:"):
            raise unknown_name("data set", self.ood, [*list_datasets(), "images:DIR"])
        own = {self.dataset, *JOINED.get(self.dataset, ())}
        if self.ood is not None and own & {self.ood, *JOINED.get(self.ood, ())}:
            raise ConfigError(f"--ood {self.ood} holds what the heads are trained on: give another data set")
        if self.backbone is not None:
            build_backbone(self.backbone)
        for head in self.heads:
            _check_head(head, self.recipe().backbone)
        if self.image_size is not None and self.image_size < 8:
            raise ConfigError(f"image_size must be 8 or more, not {self.image_size}")
        if self.pretrained and self.weights is not None:
            raise ConfigError("weights come from one place: give --pretrained or --weights FILE, not both")
        if self.pretrained and ":" not in self.recipe().backbone:
            raise ConfigError(
                f"backbone {self.recipe().backbone!r} has no published weights: give --backbone torchvision:NAME or "
                "timm:NAME with --pretrained, or --weights FILE"
            )
        if self.weights is not None and not self.weights.exists():
            raise ConfigError(f"no such file: {self.weights}: --weights needs a safetensors file of the backbone")
        if self.freeze and not self.pretrained and self.weights is None:
            raise ConfigError(
                "--freeze without --pretrained or --weights FILE would compare heads on random features: give one"
            )
        resolve_device(self.device)


@final
@dataclass(frozen=True)
class Cell:
    """One configuration of a comparison.

    Attributes:
        head: name of the head, with options; see `head_variant`.
        seed: of the backbone's first weights, of the order of batches and of augmentation.
        folder: where its files are.
    """

    head: str
    seed: int
    folder: Path = field(repr=False)

    @property
    def results(self) -> Path:
        """What was measured."""
        return self.folder / f"{file_name(self.head)}-seed{self.seed}.json"

    @property
    def predictions(self) -> Path:
        """The classes predicted for the test images, int16 (N,)."""
        return self.folder / f"{file_name(self.head)}-seed{self.seed}.npy"


def cells(config: CompareConfig, out: Path) -> list[Cell]:
    """The configurations of a comparison, in the order in which they are made: all heads with the first seed first."""
    return [Cell(head, seed, out) for seed in config.seeds for head in config.heads]


def file_name(head: str) -> str:
    """A head with options as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", head)


def _check_head(text: str, backbone: str) -> None:
    """Raises what is wrong with a head's name or options, before anything is trained."""
    import torch

    from nnheads.attach import attach_head
    from nnheads.backbones import build_backbone
    from nnheads.heads import build_head

    name, options = head_variant(text)
    with torch.random.fork_rng(devices=[]):
        if "at" in options or isinstance(options.get("projector"), str):  # a place in this very network
            attach_head(build_backbone(backbone, 10), name, **options)
            return
        # Wide, so that no option that depends on the width of embeddings is refused here.
        build_head(name, 4096, 10, **options)


def _named_file(path: Path) -> str:
    """A file's name and the start of its hash: what tells weights apart without saying where they are."""
    file = path / "backbone.safetensors" if path.is_dir() else path
    if not file.is_file():
        return path.name
    with file.open("rb") as opened:
        return f"{path.name} {hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}"
