"""Training practice, on dense and kNN heads: augmentation, test-time augmentation, rare classes, transfer, measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from nnheads.analysis import confusion, embedding_neighbors, roc
from nnheads.benchmarks.datasets import ImageData
from nnheads.benchmarks.studies.augmentations import BY_NAME, mixed_up
from nnheads.benchmarks.studies.fitting import Recipe, Training, train
from nnheads.benchmarks.studies.head_training import headed_model
from nnheads.benchmarks.studies.images import study_images
from nnheads.benchmarks.studies.pictures import as_png
from nnheads.benchmarks.studies.practice_tables import AUGMENTS, HEADS, RARE, TRANSFERS, VIEWS, tables
from nnheads.benchmarks.studies.study import Cell, Job, Outcome, Scale, Settings, Study
from nnheads.data import BatchLoader, ImageSet
from nnheads.headed import HeadedModel
from nnheads.training import embed, evaluate, resolve_device


def run(job: Job) -> Outcome:
    """Trains a model as the cell says, and measures it as the cell's kind asks."""
    kind = job.settings["kind"]
    if kind == "transfer":
        return _transfer(job)
    data = study_images(job)
    if kind == "imbalance":
        data = replace(data, train=_imbalanced(data.train, job))
    model, done = _trained(job, data)
    found = evaluate(model, data.test, device=job.device)
    measures: dict[str, float | None] = {
        "test": found.accuracy,
        "log_loss": found.log_loss,
        "ece": found.ece,
        "train_seconds": done.seconds,
    }
    series: dict[str, dict[str, list[Any]]] = {}
    if kind == "tta":
        measures |= _views(job, data, model)
    if kind == "imbalance":
        rare = data.test.labels < int(job.settings["rare_classes"])
        right = found.predictions == found.labels
        measures |= {"rare": _mean(right[rare]), "others": _mean(right[~rare])}
    if kind == "measures":
        more, series = _measures(job, data, model, found.log_probs, found.predictions)
        measures |= more
    return Outcome(measures, series)


def _trained(job: Job, data: ImageData) -> tuple[HeadedModel, Training]:
    model = headed_model(job, data)
    classes = data.train.num_classes

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(module, HeadedModel)
        if job.settings["mixup"]:
            x, soft = mixed_up(x, y, classes)
            return module.loss(x, soft)
        return module.loss(x, y)

    return model, _fitted(job, data, model, Recipe.of(job.settings), loss)


def _fitted(job: Job, data: ImageData, model: HeadedModel, recipe: Recipe, loss: Any) -> Training:
    done = train(
        model, loss, data.train, data.preprocessing, recipe, seed=job.seed, device=job.device, report=job.report
    )
    model.memorize(BatchLoader(data.train, data.preprocessing, 512, device=resolve_device(job.device)))
    return done


def _imbalanced(images: ImageSet, job: Job) -> ImageSet:
    """A share of the first classes alone; with ``rare_augment``, filled up with augmented copies of these images."""
    rare, share = int(job.settings["rare_classes"]), float(job.settings["rare_share"])
    generator = torch.Generator().manual_seed(job.seed)
    keep = torch.ones(len(images), dtype=torch.bool)
    for label in range(rare):
        own = (images.labels == label).nonzero().squeeze(1)
        order = own[torch.randperm(len(own), generator=generator)]
        keep[order[max(2, round(share * len(own))) :]] = False
    kept = images.subset(keep)
    if job.settings["rare_augment"]:
        few = (kept.labels < rare).nonzero().squeeze(1)
        copies = few.repeat(max(1, round(1 / share)) - 1)
        if len(copies):
            made = BY_NAME[job.settings["rare_augment"]](kept.images[copies], generator)
            pixels, labels = torch.cat([kept.images, made]), torch.cat([kept.labels, kept.labels[copies]])
            return ImageSet(pixels, labels, class_names=images.class_names)
    return replace(kept, ids=torch.arange(len(kept)))


def _views(job: Job, data: ImageData, model: HeadedModel) -> dict[str, float | None]:
    """Test-time augmentation: the mean of the posteriors of several views, and the seconds it takes."""
    import time

    augment, device = BY_NAME[job.settings["tta_augment"]], resolve_device(job.device)
    found: dict[str, float | None] = {}
    for count in VIEWS:
        generator = torch.Generator().manual_seed(job.seed)
        started, right = time.perf_counter(), 0
        for start in range(0, len(data.test), 256):
            part, labels = data.test.images[start : start + 256], data.test.labels[start : start + 256]
            total = torch.zeros(len(part), data.train.num_classes)
            for view in range(count):
                seen = part if not view else augment(part, generator)
                with torch.no_grad():
                    total += model(data.preprocessing(seen).to(device)).exp().cpu()
            right += int((total.argmax(1) == labels).sum())
        found[f"views_{count}"] = right / len(data.test)
        found[f"seconds_{count}"] = time.perf_counter() - started
    return found


def _measures(
    job: Job, data: ImageData, model: HeadedModel, log_probs: Tensor, predictions: Tensor
) -> tuple[dict[str, float | None], dict[str, dict[str, list[Any]]]]:
    """Confusion matrix, one-vs-rest ROC, and 1-NN in the latent space and in that of the pixels."""
    labels, names = data.test.labels, data.train.class_names
    matrix = confusion(predictions, labels, len(names))
    curves = roc(log_probs, labels)
    known, asked = (embed(model, part, device=job.device)[0] for part in (data.train, data.test))
    near = embedding_neighbors(known, asked, 5, metric="l1")
    pixels = [part.images.flatten(1).float() for part in (data.train, data.test)]
    by_pixels = embedding_neighbors(pixels[0], pixels[1], 1, metric="l1")
    wrong = matrix.clone().fill_diagonal_(0)
    worst = divmod(int(wrong.argmax()), len(names))
    measures: dict[str, float | None] = {
        "nearest_latent": _mean(data.train.labels[near[:, 0]] == labels),
        "nearest_pixels": _mean(data.train.labels[by_pixels[:, 0]] == labels),
        "auc": sum(each.auc for each in curves.values()) / max(1, len(curves)),
        "auc_lowest": min((each.auc for each in curves.values()), default=None),
        "most_confused": float(wrong[worst]) / max(1, len(labels)),
    }
    series: dict[str, dict[str, list[Any]]] = {
        "confusion": {"class": list(names), **{n: matrix[:, i].tolist() for i, n in enumerate(names)}},
        "roc": {
            "class": [names[label] for label in curves],
            "auc": [each.auc for each in curves.values()],
            "threshold": [each.threshold for each in curves.values()],
            "false positives": [each.closest[0] for each in curves.values()],
            "true positives": [each.closest[1] for each in curves.values()],
        },
    }
    grid = torch.linspace(0, 1, 51, dtype=torch.float64)
    series["roc_curve"] = {"false positive rate": (100 * grid).tolist()}
    for label, each in curves.items():
        place = torch.searchsorted(each.false_positive_rate.contiguous(), grid, right=True) - 1
        series["roc_curve"][f"class {label}"] = each.true_positive_rate[place].tolist()
    shown = _one_of_each(labels)
    rows = [[int(i), *near[i].tolist()] for i in shown]
    series["nearest"] = {
        "class": [names[int(labels[i])] for i in shown],
        "png": [as_png([data.test.images[row[0]], *(data.train.images[i] for i in row[1:])]) for row in rows],
        "labels": [[names[int(data.train.labels[i])] for i in row[1:]] for row in rows],
    }
    return measures, series


def _one_of_each(labels: Tensor, most: int = 6) -> list[int]:
    return [int((labels == label).nonzero()[0]) for label in labels.unique()[:most]]


def _transfer(job: Job) -> Outcome:
    """A network trained on the first half of the classes, then on few images of the others in one of three ways."""
    data, settings = study_images(job), job.settings
    half = data.train.num_classes // 2
    first, second = (_classes(data, part) for part in (range(half), range(half, data.train.num_classes)))
    model, _ = _trained(job, first)
    per_class = int(settings["target_per_class"])
    second = replace(second, train=_few(second.train, per_class, job.seed))
    how, recipe = settings["transfer"], Recipe.of({**settings, **settings["target"]})
    target = headed_model(job, second)
    if how != "from scratch":
        target.backbone.load_state_dict(model.backbone.state_dict())
    frozen = how in ("frozen", "head first")
    for parameter in target.backbone.parameters():
        parameter.requires_grad_(not frozen)

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(module, HeadedModel)
        if frozen:
            module.backbone.eval()  # frozen norms keep the statistics they belong to
        return module.loss(x, y)

    seconds = _fitted(job, second, target, recipe, loss).seconds
    if how == "head first":
        frozen = False
        for parameter in target.backbone.parameters():
            parameter.requires_grad_(True)
        seconds += _fitted(job, second, target, replace(recipe, lr=recipe.lr / 10), loss).seconds
    found = evaluate(target, second.test, device=job.device)
    return Outcome({"test": found.accuracy, "log_loss": found.log_loss, "train_seconds": seconds})


def _classes(data: ImageData, labels: range) -> ImageData:
    parts = []
    for part in (data.train, data.test):
        own = part.subset((part.labels >= labels.start) & (part.labels < labels.stop))
        names = part.class_names[labels.start : labels.stop]
        parts.append(replace(own, labels=own.labels - labels.start, class_names=names))
    return ImageData(replace(parts[0], ids=torch.arange(len(parts[0]))), parts[1], data.preprocessing)


def _few(images: ImageSet, per_class: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    chosen = [order[images.labels[order] == label][:per_class] for label in images.labels.unique()]
    kept = images.subset(torch.cat(chosen))
    return replace(kept, ids=torch.arange(len(kept)))


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


# ---- cells --------------------------------------------------------------------------------------------------------

_PAPER: Final[Settings] = {
    "dataset": "cifar10",
    "backbone": "resnet18_cifar",
    "backbone_options": {},
    "epochs": 30,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "schedule": "onecycle",
    "augment": "none",
    "mixup": False,
    "head_options": {},
}


def _cells() -> Iterator[Cell]:
    for head in HEADS:
        base = {**_PAPER, "head": head}
        for name, augment in AUGMENTS.items():
            mixup = name == "mixup"
            yield Cell(f"augment-{name}-{head}", {**base, "kind": "augment", "augment": augment, "mixup": mixup})
        geometric = AUGMENTS["geometric"]
        yield Cell(f"tta-{head}", {**base, "kind": "tta", "augment": geometric, "tta_augment": geometric})
        for name in RARE:
            rare = {"rare_classes": 3, "rare_share": 0.05, "rare_augment": geometric if name == "augmented" else None}
            yield Cell(f"imbalance-{name}-{head}", {**base, "kind": "imbalance", **rare})
        for name, title in TRANSFERS.items():
            target = {"epochs": 20, "batch_size": 32, "lr": 0.02, "schedule": "onecycle"}
            more = {"transfer": title, "target_per_class": 50, "target": target}
            yield Cell(f"transfer-{name}-{head}", {**base, "kind": "transfer", **more})
        yield Cell(f"measures-{head}", {**base, "kind": "measures", "augment": geometric})


_SMALL: Final[Settings] = {"backbone": "resnet9", "backbone_options": {"width": 16}, "lr": 0.1, "batch_size": 64}

STUDY: Final = Study(
    name="training-practice",
    title="augmentation, test-time augmentation, rare classes, transfer, and measures, for dense and kNN heads",
    source="Training convolutional networks: lecture slides, which have no numbers of their own",
    cells=tuple(_cells()),
    tables=tuple(tables()),
    scales={
        "smoke": Scale(
            "digits in place of CIFAR-10, 300 images, 2 epochs of a small convolutional network.",
            {
                "dataset": "digits",
                "backbone": "convnet",
                "backbone_options": {"width": 8},
                "train_images": 300,
                "test_images": 100,
                "epochs": 2,
                "batch_size": 32,
                "target_per_class": 10,
                "target": {"epochs": 1, "batch_size": 16, "lr": 0.02, "schedule": "onecycle"},
            },
            cells=(
                "augment-mixup-*",
                "augment-geometric-dense",
                "augment-photometric-knn",
                "tta-knn",
                "imbalance-augmented-dense",
                "transfer-head-first-knn",
                "measures-knn",
            ),
        ),
        "cpu": Scale(
            "CIFAR-10, 5,000 training and 2,000 test images, 10 epochs of a ResNet-9 of width 16.",
            {**_SMALL, "train_images": 5_000, "test_images": 2_000, "epochs": 10},
        ),
        "paper": Scale("CIFAR-10, all images, 30 epochs of a ResNet-18."),
    },
    run=run,
)
