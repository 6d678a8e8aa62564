"""``nnheads predict`` and ``nnheads eval``: a saved model at work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnheads.cli import options, screen
from nnheads.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from nnheads.data import ImageSet, Preprocessing
    from nnheads.headed import HeadedModel

UNLIKE = "unlike the training samples: the 50th nearest is farther than of nearly all held-out images"
"""What is said of an image beyond the limit that ``calibrate`` chose."""

BATCH = 64
"""Images opened and decided at a time, so that memory does not grow with their number."""

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a saved model, or of a run that holds one.")
]


def predict(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Classes shown for each image.")] = 3,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Predict the classes of images with a saved model, and name the training samples that decided."""
    with screen.interruptible(lambda: "nothing"):
        model, preprocessing, names = open_model(checkpoint, device)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(images), BATCH):
            answers += _predict(model, preprocessing, names, images[start : start + BATCH], top)
        if as_json:
            screen.print_json(answers)
            return
        for answer in answers:
            classes = ", ".join(f"{c['class']} {100 * c['probability']:.1f} %" for c in answer["classes"])
            screen.line(f"{answer['image']}: {classes}")
            if answer["neighbors"]:
                near = ", ".join(f"{n['id']} ({n['class']})" for n in answer["neighbors"])
                screen.line(f"  nearest training samples: {near}")
            if answer.get("unlike_training_samples"):
                screen.line(f"  {UNLIKE}")


def outliers(model: HeadedModel, x: Tensor) -> list[bool | None]:
    """Whether each of a batch is unlike the training samples, by the limit ``calibrate`` chose; None without one."""
    import torch

    limit = float(model.head.outlier_threshold)
    if not math.isfinite(limit):
        return [None] * len(x)
    with torch.no_grad():
        beyond: list[bool | None] = (model.head.outlier_scores(model.features(x)) > limit).tolist()
    return beyond


def _predict(
    model: HeadedModel, preprocessing: Preprocessing, names: tuple[str, ...], paths: list[Path], top: int
) -> list[dict[str, Any]]:
    import torch

    from nnheads.heads import MemoryHead

    x = preprocessing(torch.stack([preprocessing.open(path) for path in paths])).to(model.device)
    with torch.inference_mode():
        best = model(x).exp().topk(min(top, len(names)))
        unlike = outliers(model, x)
    near: list[list[dict[str, Any]]] = [[] for _ in paths]
    if isinstance(model.head, MemoryHead):
        found = model.explain(x, k=5)
        for row, ids, labels, distances in zip(
            near, found.ids.tolist(), found.labels.tolist(), found.distances.tolist(), strict=True
        ):
            row += [
                {"id": i, "class": names[label], "distance": d}
                for i, label, d in zip(ids, labels, distances, strict=True)
                if i >= 0
            ]
    return [
        {
            "image": str(path),
            "classes": [{"class": names[c], "probability": p} for c, p in zip(classes, shares, strict=True)],
            "neighbors": neighbors,
            **({} if beyond is None else {"unlike_training_samples": beyond}),
        }
        for path, classes, shares, neighbors, beyond in zip(
            paths, best.indices.tolist(), best.values.tolist(), near, unlike, strict=True
        )
    ]


def evaluate(
    checkpoint: Checkpoint,
    data_dir: options.DataDir = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Its test images; see nnheads list datasets."),
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option("--ood", metavar="NAME", help="Data set whose test images are to be told from these (AUROC)."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images a step.")] = 256,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Measure a saved model on a folder of test images: test/<class>/* or <class>/* of --data-dir."""
    with screen.interruptible(lambda: "nothing"):
        if data_dir is None and dataset is None:
            raise ConfigError("eval needs --data-dir DIR with <class>/* or test/<class>/*, or --dataset NAME")
        model, preprocessing, names = open_model(checkpoint, device)
        data = held_out_images(preprocessing, names, data_dir, dataset)
        result = _measure(model, preprocessing, names, data, batch_size, device)
        if ood is not None:
            from nnheads.benchmarks.datasets import load_foreign
            from nnheads.benchmarks.outliers import auroc

            foreign = load_foreign(ood, data_dir if dataset is not None else None, preprocessing)
            own, by_score = auroc(model, data, foreign, device)
            result |= {"ood": ood, "auroc": own, "auroc_by_score": by_score}
    if as_json:
        screen.print_json({"checkpoint": str(checkpoint), **result})
        return
    rows = [
        [row["class"], str(row["images"]), screen.percent(row["accuracy"]), row["most mistaken for"] or screen.DASH]
        for row in result["classes"]
    ]
    screen.table("", ["class", "images", "accuracy %", "most mistaken for"], rows, text=["class", "most mistaken for"])
    screen.line("")
    screen.line(
        f"accuracy {screen.percent(result['accuracy'])} %, log-loss {screen.number(result['log_loss'])}, "
        f"expected calibration error {screen.number(result['ece'])}, {result['images']} images"
    )
    if ood is not None:
        scores = ", ".join(f"{name} {screen.percent(value)}" for name, value in result["auroc_by_score"].items())
        screen.line(f"AUROC against {ood} {screen.percent(result['auroc'])} % (by score: {scores})")


def _measure(
    model: HeadedModel,
    preprocessing: Preprocessing,
    names: tuple[str, ...],
    data: ImageSet,
    batch_size: int,
    device: str,
) -> dict[str, Any]:
    import torch

    from nnheads.data import BatchLoader
    from nnheads.training import evaluate as evaluate_model

    found = evaluate_model(model, BatchLoader(data, preprocessing, batch_size), device=device)
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((found.labels, found.predictions), torch.tensor(1), accumulate=True)
    classes = []
    for label, name in enumerate(names):
        count, right = int(confusion[label].sum()), int(confusion[label, label])
        wrong = confusion[label].clone()
        wrong[label] = 0
        worst = int(wrong.argmax()) if int(wrong.max()) else None
        classes.append(
            {
                "class": name,
                "images": count,
                "accuracy": right / count if count else None,
                "most mistaken for": None if worst is None else names[worst],
            }
        )
    return {
        "images": len(data),
        "accuracy": found.accuracy,
        "log_loss": found.log_loss,
        "ece": found.ece,
        "seconds": found.seconds,
        "classes": classes,
    }


def model_folder(checkpoint: Path) -> Path:
    """The folder of the model that the user named, itself or the run that holds it."""
    inside = checkpoint / "model"
    return inside if inside.is_dir() else checkpoint


def open_model(checkpoint: Path, device: str) -> tuple[HeadedModel, Preprocessing, tuple[str, ...]]:
    """A saved model in evaluation mode, how images are prepared for it, and the names of its classes."""
    from nnheads.explain import label_names
    from nnheads.io import load
    from nnheads.training import resolve_device

    model = load(model_folder(checkpoint), device=resolve_device(device))
    model.eval()
    if model.preprocessing is None:
        raise CheckpointError(
            f"{checkpoint} does not say how images are prepared: save the model again, attached with preprocessing="
        )
    return model, model.preprocessing, label_names(model)


def held_out_images(
    preprocessing: Preprocessing,
    names: tuple[str, ...],
    data_dir: Path | None,
    dataset: str | None,
    parts: tuple[str, ...] = ("test",),
) -> ImageSet:
    """Labelled images of a model's classes: those of the first part that a folder has, or of the folder itself."""
    from nnheads.benchmarks.folders import class_folders, from_folder, has_class_folders

    if dataset is None:
        assert data_dir is not None
        folder = data_dir.expanduser()
        folder = next((folder / part for part in parts if has_class_folders(folder / part)), folder)
        data = from_folder(folder, preprocessing, class_names=names)
        missing = [name for name in names if name not in {child.name for child in class_folders(folder)}]
        if missing:
            some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            screen.note(f"note: {folder} has no images of {len(missing)} of the model's classes: {some}")
        return data
    return known_images(preprocessing, names, data_dir, dataset, train=False)


def known_images(
    preprocessing: Preprocessing, names: tuple[str, ...], data_dir: Path | None, dataset: str, *, train: bool
) -> ImageSet:
    """One half of a data set, labelled as the model does, which may know more classes."""
    from nnheads.benchmarks.datasets import load_images

    data = load_images(dataset, data_dir, train=train)
    unknown = [name for name in data.class_names if name not in names]
    if unknown:
        raise DataError(
            f"data set {dataset!r} has classes the model does not know: {', '.join(unknown[:5])}; "
            f"it knows {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    shape = (preprocessing.channels, *preprocessing.size)
    if tuple(data.images.shape[1:]) != shape:
        raise DataError(
            f"data set {dataset!r} has images of {tuple(data.images.shape[1:])}, but the model takes {shape}: "
            "give the images as files with --data-dir, which are resized"
        )
    return data.relabeled(names)
