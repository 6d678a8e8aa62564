"""``nnheads analyze``: at which layer of a saved model classical classifiers answer as the model does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnheads.cli import options, screen
from nnheads.cli.inference import Checkpoint, known_images, open_model
from nnheads.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from nnheads.data import ImageSet
    from nnheads.preprocessing import Preprocessing

TITLES = {"knn": "kNN", "svm": "SVM", "lr": "LR"}


def analyze(
    checkpoint: Checkpoint,
    data_dir: options.DataDir = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Its images; see nnheads list datasets.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="A,B,...", help="Layers by module name (by default the network's blocks)."),
    ] = None,
    kinds: Annotated[
        str, typer.Option("--kinds", metavar="A,B,...", help="Classifiers fitted on each layer: knn, svm, lr.")
    ] = "knn,svm,lr",
    k: Annotated[int, typer.Option("--k", min=1, metavar="K", help="Neighbours of the kNN vote.")] = 30,
    train_images: Annotated[
        int, typer.Option("--train-images", min=1, metavar="N", help="Training images at most, drawn at random.")
    ] = 10_000,
    test_images: Annotated[
        int, typer.Option("--test-images", min=1, metavar="N", help="Test images at most, drawn at random.")
    ] = 10_000,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Draw accuracy and agreement by layer as PNG.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the images drawn.")] = 0,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Fit kNN, SVM and logistic regression on every layer of a saved model, and see how far they answer as it does.

    The classifiers learn train/<class>/* of --data-dir and are judged on test/<class>/*.
    """
    from nnheads.analysis import KINDS
    from nnheads.analysis import analyze as analyze_model
    from nnheads.cli.progress import Bar

    chosen = options.names("--kinds", kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise unknown_name("classifier", kind, KINDS)
    if data_dir is None and dataset is None:
        raise ConfigError("analyze needs --data-dir DIR with train/<class>/* and test/<class>/*, or --dataset NAME")
    if figure is not None:
        options.writable("--figure", figure, ".png", what="a PNG")
    with screen.interruptible(lambda: "nothing"), Bar(shown=not as_json) as bar:
        model, preprocessing, names = open_model(checkpoint, device)
        parts = [_images(preprocessing, names, data_dir, dataset, train=train) for train in (True, False)]
        few = [_drawn(part, count, seed) for part, count in zip(parts, (train_images, test_images), strict=True)]
        found = analyze_model(
            model,
            few[0],
            few[1],
            None if layers is None else options.names("--layers", layers),
            kinds=[kind for kind in KINDS if kind in chosen],
            k=k,
            device=device,
            seed=seed,
            report=bar,
        )
    if figure is not None:
        _draw(found, figure, str(checkpoint.name), k, seed)
    if as_json:
        screen.print_json({"checkpoint": str(checkpoint), "k": k, "seed": seed, **found})
        return
    _show(found)
    if figure is not None:
        screen.line(f"figure: {figure}")


def _show(found: dict[str, Any]) -> None:
    columns = ["layer", "classifier", "width", "accuracy %", "P_SAME", "MC", "ME", "D_KL nats"]
    rows = [
        [
            row["layer"],
            TITLES[row["kind"]],
            str(row["width"]),
            screen.percent(row["accuracy"]),
            *(screen.number(row[name], 4) for name in ("p_same", "mc", "me")),
            screen.number(row["kl"]),
        ]
        for row in found["rows"]
    ]
    screen.table("", columns, rows, text=["layer", "classifier"])
    screen.line("")
    screen.line(
        f"model's accuracy {screen.percent(found['accuracy'])} %; classifiers fitted on {found['train']:,} images, "
        f"judged on {found['test']:,}"
    )


def _images(
    preprocessing: Preprocessing, names: tuple[str, ...], data_dir: Path | None, dataset: str | None, *, train: bool
) -> ImageSet:
    from nnheads.benchmarks.folders import from_folder, has_class_folders

    if dataset is not None:
        return known_images(preprocessing, names, data_dir, dataset, train=train)
    assert data_dir is not None
    folder = data_dir.expanduser() / ("train" if train else "test")
    if not has_class_folders(folder):
        raise DataError(f"no {folder.name}/<class>/* in {data_dir}: analyze needs both train/ and test/ there")
    return from_folder(folder, preprocessing, class_names=names)


def _drawn(images: ImageSet, count: int, seed: int) -> ImageSet:
    import torch

    if count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[:count].sort().values)


def _draw(found: dict[str, Any], path: Path, name: str, k: int, seed: int) -> None:
    from nnheads.benchmarks.plots import new_figure, save_figure, wrapped_title

    layers = list(dict.fromkeys(row["layer"] for row in found["rows"]))
    made = new_figure(max(6.0, 0.7 * len(layers) + 4), 4.2)
    axes = made.add_subplot()
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in found["rows"])):
        own = [row for row in found["rows"] if row["kind"] == kind]
        colour = f"C{number}"
        axes.plot([100 * row["accuracy"] for row in own], "o-", color=colour, ms=4, label=f"{TITLES[kind]}, accuracy")
        axes.plot([100 * row["p_same"] for row in own], "s:", color=colour, ms=4, label=f"{TITLES[kind]}, P_SAME")
    axes.axhline(100 * found["accuracy"], color="black", ls="--", lw=1, label="model, accuracy")
    axes.set_xticks(range(len(layers)), layers, rotation=35, ha="right", fontsize=8)
    axes.set_xlabel("layer")
    axes.set_ylabel("test images (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    size = f"fitted on {found['train']:,}, judged on {found['test']:,} images"
    made.suptitle(wrapped_title(f"{name}: classifiers on its layers, k = {k}, seed {seed}, {size}", 6.0), fontsize=9)
    save_figure(made, path)
