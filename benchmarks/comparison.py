"""What a comparison of heads on a data set consists of: its settings, its configurations and what is measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from nnheads.errors import ConfigError, unknown_name

MEASURES: tuple[str, ...] = (
    "accuracy",
    "log_loss",
    "ece",
    "parameters",
    "memory_bytes",
    "train_seconds",
    "ms_per_sample",
    "agreement",
)
"""What is measured."""


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
        heads: names of heads.
        dataset: where the backbone is trained on all classes at once; see `nnheads.benchmarks.datasets`.
        seeds: each head is trained once with each.
        backbone, epochs, batch_size, learning_rate: None for the data set's own.
        data_dir: where the images are.
        device: "auto", "cuda", "mps" or "cpu".
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
        shared = {"device": self.device, "data_dir": self.data_dir.resolve().name if self.data_dir else None}
        return {"dataset": self.dataset, **asdict(self.recipe()), **shared}

    def check(self) -> None:
        """Refuses what cannot work before anything is trained.

        Raises:
            ConfigError: a name that is not known (`UnknownNameError`), or an option out of its range.
        """
        from nnheads.backbones import build_backbone
        from nnheads.benchmarks.datasets import list_datasets
        from nnheads.heads import head_class
        from nnheads.training import resolve_device

        if not self.heads or not self.seeds:
            raise ConfigError("compare needs at least one head and one seed")
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be above 0, not {self.learning_rate}")
        for head in self.heads:
            head_class(head)
        if self.dataset not in RECIPES and not self.dataset.startswith("images:"):
            raise unknown_name("data set", self.dataset, [*list_datasets(), "images:DIR"])
        if self.backbone is not None:
            build_backbone(self.backbone)
        resolve_device(self.device)


@final
@dataclass(frozen=True)
class Cell:
    """One configuration of a comparison.

    Attributes:
        head: name of the head.
        seed: of the backbone's first weights, of the order of batches and of augmentation.
        folder: where its files are.
    """

    head: str
    seed: int
    folder: Path = field(repr=False)

    @property
    def results(self) -> Path:
        """What was measured."""
        return self.folder / f"{self.head}-seed{self.seed}.json"

    @property
    def predictions(self) -> Path:
        """The classes predicted for the test images, int16 (N,)."""
        return self.folder / f"{self.head}-seed{self.seed}.npy"


def cells(config: CompareConfig, out: Path) -> list[Cell]:
    """The configurations of a comparison, in the order in which they are made: all heads with the first seed first."""
    return [Cell(head, seed, out) for seed in config.seeds for head in config.heads]
