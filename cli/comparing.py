"""``nnheads compare``: the same training with one head after another, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnheads.cli import options, screen
from nnheads.cli.folders import newest, results_folder
from nnheads.errors import ConfigError

if TYPE_CHECKING:
    from nnheads.benchmarks.comparison import CompareConfig

STEM = "compare"


def compare(
    heads: Annotated[
        str, typer.Option("--heads", metavar="A,B,...", help="Heads to compare; see nnheads list heads.")
    ] = "dense,knn,nca",
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Train on all classes at once (default: digits)."),
    ] = None,
    stream: Annotated[
        str | None, typer.Option("--stream", metavar="NAME", help="Train on classes that arrive one after another.")
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME", help="How a stream is learned; see nnheads list strategies.")
    ] = "replay",
    backbone: options.Backbone = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    memory: options.Memory = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,...", help="Train once with each seed.")] = "0",
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the results (by default runs/compare-NNN).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished in --out, or in the newest runs/compare-NNN.")
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the same backbone from the same seed with each head and compare what comes out."""
    if dataset is not None and stream is not None:
        raise ConfigError("give --dataset or --stream, not both")
    if stream is None and memory is not None:
        raise ConfigError("--memory is for --stream: on a data set a head stores all training samples")
    options.positive("--lr", lr)
    given_heads, given_seeds = options.names("--heads", heads), options.seeds(seeds)
    if resume and out is None:
        out = newest(STEM)
        if out is None:
            raise ConfigError("--resume found no runs/compare-NNN here: name the folder with --out")
    with screen.interruptible(lambda: "nothing"):
        from nnheads.benchmarks.comparison import CompareConfig

        config = CompareConfig(
            heads=given_heads,
            dataset=dataset or "digits",
            stream=stream,
            strategy=strategy,
            seeds=given_seeds,
            backbone=backbone,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=lr,
            memory=memory,
            data_dir=data_dir,
            device=device,
        )
        config.check()
        with results_folder(out, STEM) as folder:
            summary = _compare(config, folder, resume, quiet)
    if as_json:
        screen.print_json({**summary, "path": str(folder)})
    elif not quiet:
        _show(summary)
    if not as_json:
        screen.line(f"{'' if quiet else chr(10)}results: {folder / 'summary.json'}")


def _compare(config: CompareConfig, folder: Path, resume: bool, quiet: bool) -> dict[str, Any]:
    from nnheads.benchmarks.compare import compare
    from nnheads.benchmarks.comparison import cells
    from nnheads.cli.progress import Bar

    made = cells(config, folder)

    def kept() -> str:
        done = sum(cell.results.is_file() for cell in made)
        if not done:
            return "nothing"
        return f"{done} of {len(made)} configurations in {folder}; go on with --resume --out {folder}"

    with screen.interruptible(kept), Bar(shown=not quiet) as bar:

        def finished(result: dict[str, Any]) -> None:
            spent = screen.duration(result["train_seconds"])
            accuracy = screen.percent(result["accuracy"])
            bar.line(f"{result['head']}, seed {result['seed']}: accuracy {accuracy} %, trained in {spent}")

        return compare(config, folder, resume=resume, progress=bar, finished=finished)


def _show(summary: dict[str, Any]) -> None:
    settings = summary["settings"]
    seeds = ", ".join(map(str, summary["seeds"]))
    what = settings.get("dataset") or settings["stream"]
    facts = [f"backbone {settings['backbone']}" if settings["backbone"] else "", f"seed{'s' * (',' in seeds)} {seeds}"]
    if settings["epochs"]:
        facts.insert(1, f"{settings['epochs']} epoch{'s' * (settings['epochs'] > 1)}")
    screen.line(f"{what}: {', '.join(fact for fact in facts if fact)}")
    formats = _DATASET if summary["kind"] == "dataset" else _STREAM
    screen.table("", *_fitting(summary["rows"], formats), text=["head", "measure"])
    if len(summary["seeds"]) > 1:
        screen.line(f"± is the sample standard deviation over {len(summary['seeds'])} seeds")


# A measure's heading, where a "|" marks where it may break, and its form.
_DATASET: dict[str, tuple[str, screen.Format]] = {
    "accuracy": ("accuracy|%", screen.percent),
    "log_loss": ("log-loss", screen.number),
    "ece": ("ECE|%", screen.percent),
    "parameters": ("para-|meters", screen.count),
    "memory_bytes": ("memory", screen.size),
    "train_seconds": ("train|s", screen.tenths),
    "ms_per_sample": ("ms a|sample", screen.number),
    "agreement": ("agrees with|dense %", screen.percent),
}
_STREAM: dict[str, tuple[str, screen.Format]] = {
    "accuracy": ("accuracy|%", screen.percent),
    "forgetting": ("forgetting|%", screen.percent),
    "train_seconds": ("train|s", screen.tenths),
    "eval_seconds": ("evaluation|s", screen.tenths),
    "memory_bytes": ("memory", screen.size),
}


def _fitting(
    rows: list[dict[str, Any]], formats: dict[str, tuple[str, screen.Format]]
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells in the first arrangement that the screen has room for."""
    room = screen.out().width
    for wide in (True, False):
        columns = ["head", *(_heading(text, wide) for text, _ in formats.values())]
        cells = [
            [row["head"], *(_cell(row[measure], form, wide) for measure, (_, form) in formats.items())] for row in rows
        ]
        if screen.width(columns, cells) <= room:
            return columns, cells
    # a narrow screen or long names: a column for each head
    names = ["measure", *(row["head"] for row in rows)]
    turned = [
        [_heading(text, True), *(_cell(row[measure], form, True) for row in rows)]
        for measure, (text, form) in formats.items()
    ]
    return names, turned


def _heading(text: str, wide: bool) -> str:
    return text.replace("-|", "").replace("|", " ") if wide else text.replace("|", "\n")


def _cell(value: dict[str, float | None] | None, form: screen.Format, wide: bool) -> str:
    if value is None:
        return screen.DASH
    text = form(value["mean"])
    if value["spread"] is None:
        return text
    spread = form(value["spread"])
    # What is the same whatever the seed, as the number of parameters, needs no spread.
    return text if not value["spread"] else f"{text}{' ' if wide else chr(10)}±{spread}"
