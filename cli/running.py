"""``nnheads run``: train a head on a stream whose classes arrive one after another."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nnheads.benchmarks.plots import MATRIX
from nnheads.benchmarks.results import MODEL, RESULTS
from nnheads.cli import options, screen
from nnheads.cli.folders import alone_in, results_folder, safe_stem
from nnheads.errors import ConfigError

if TYPE_CHECKING:
    from nnheads.benchmarks.config import RunConfig
    from nnheads.devices import Precision


def run(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Name of a stream; see nnheads list streams.")],
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NAME", help="See nnheads list heads (default: the strategy's own)."),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="NAME", help="How the stream is learned; see nnheads list strategies.")
    ] = "replay",
    backbone: options.Backbone = None,
    data_dir: options.DataDir = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    lr: options.LearningRate = None,
    ema: options.Ema = None,
    exemplar_bytes: options.ExemplarBytes = None,
    option: options.HeadOptions = None,
    strategy_option: options.StrategyOptions = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Of class order, first weights and batches.")
    ] = 0,
    replay_batch: options.ReplayBatch = None,
    scenario: options.Scenario = "class",
    future: Annotated[
        bool, typer.Option("--future", help="Evaluate experiences to come too, for forward transfer.")
    ] = False,
    share: options.Share = None,
    validation: options.Validation = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="DIR", help="Save the state of the run there after every experience."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --checkpoint.")] = False,
    threads: options.Threads = None,
    plots: options.Plots = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log accuracies for TensorBoard in the folder of the results.")
    ] = False,
    device: options.Device = "auto",
    precision: options.PrecisionName = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the results (by default runs/STREAM-HEAD-NNN)."),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a head on a stream, where classes arrive one after another, and save model and results."""
    head_options = options.pairs("--option", option)
    strategy_options = options.pairs("--strategy-option", strategy_option)
    if resume and checkpoint is None:
        raise ConfigError("--resume needs --checkpoint, the folder of the run that was interrupted")
    options.positive("--lr", lr)
    options.share("--ema", ema or None)  # 0: not at all
    options.share("--share", share)
    options.share("--validation", validation)
    options.set_threads(threads)
    options.note_unused_data_dir(stream, data_dir)
    with screen.interruptible(lambda: "nothing"):
        from nnheads.benchmarks.config import RunConfig
        from nnheads.distributed import launched_rank
        from nnheads.strategies.registry import strategy_spec

        config = RunConfig(
            stream=stream,
            head=head,
            strategy=strategy,
            backbone=backbone,
            data_dir=data_dir,
            epochs=epochs,
            batch_size=batch_size,
            memory=memory,
            seed=seed,
            scenario=scenario,
            replay_batch=replay_batch,
            device=device,
            precision=cast("Precision", precision),
            head_options=head_options,
            strategy_options=strategy_options,
            future=future,
            share=share,
            validation=validation,
            learning_rate=lr,
            ema=ema,
            exemplar_bytes=exemplar_bytes,
        )
        if launched_rank() > 0:  # torchrun's first process shows and writes
            from nnheads.benchmarks.runner import run as run_stream

            run_stream(config, None, checkpoint=checkpoint, resume=resume)
            return
        stem = safe_stem(f"{stream}-{strategy_spec(strategy).resolve_head(head)}")
        with results_folder(out, stem, resume=resume) as folder, alone_in(folder):
            results = _run(config, folder, quiet, checkpoint, resume, tensorboard)
            if plots:
                from nnheads.benchmarks.plots import plot_run

                with screen.interruptible(lambda: f"all but figures in {folder}"):
                    plot_run(results, folder)
    if as_json:
        screen.print_json({**results, "path": str(folder)})
        return
    if not quiet:
        _show(results, folder, data_dir)
        return
    screen.line(
        f"accuracy {screen.percent(results['accuracy'])} %, forgetting {screen.percent(results['forgetting'])} %, "
        f"{screen.duration(results['seconds'])}: {folder / RESULTS}"
    )


def _run(
    config: RunConfig, folder: Path, quiet: bool, checkpoint: Path | None, resume: bool, tensorboard: bool
) -> dict[str, Any]:
    from nnheads.benchmarks.checkpoint import experiences_done
    from nnheads.benchmarks.runner import run
    from nnheads.benchmarks.tensorboard import TENSORBOARD
    from nnheads.cli.progress import Bar

    log = folder / TENSORBOARD if tensorboard else None

    def kept() -> str:
        if checkpoint is not None and (done := experiences_done(checkpoint)):
            how = "the same command" if resume else "the same command and --resume"
            return f"{done} experience{'s' * (done > 1)} in {checkpoint}; go on with {how}"
        names = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
        return f"{', '.join(names)} in {folder}" if names else "nothing"

    with screen.interruptible(kept), Bar(shown=not quiet) as bar:
        if checkpoint is not None:
            bar.line(f"checkpoint after every experience in {checkpoint}; if this run is killed, add --resume to go on")
        return run(config, folder, progress=bar, checkpoint=checkpoint, resume=resume, tensorboard=log)


def _show(results: dict[str, Any], folder: Path, data_dir: Path | None) -> None:
    if told := screen.shares(results["config"]):
        screen.line(told)
    screen.line(f"{results['stream']}: head {results['head']}, strategy {results['strategy']}")
    screen.line(
        f"backbone {results['backbone']}, seed {results['seed']}, scenario {results['scenario']}, {results['device']}"
    )
    screen.line("")
    _show_matrix(results["accuracy_matrix"], results["classes"])
    screen.line("")
    facts = [
        ("final accuracy", f"{screen.percent(results['accuracy'])} %"),
        ("forgetting", f"{screen.percent(results['forgetting'])} %"),
        *_transfer(results),
        ("training", screen.duration(results["train_seconds"])),
        ("evaluation", screen.duration(results["eval_seconds"])),
        ("memory", _memory(results)),
        ("results", str(folder / RESULTS)),
    ]
    if (folder / MATRIX).is_file():
        facts.append(("figure", str(folder / MATRIX)))
    if (folder / MODEL).is_dir():
        facts.append(("model", str(folder / MODEL)))
    else:
        facts.append(("model", f"none saved: what {results['strategy']} decides by is no head"))
    for name, value in facts:
        screen.line(f"{name:<15} {value}")
    screen.line("")
    screen.line(f"next: {_next_command(results, data_dir)}")


def _memory(results: dict[str, Any]) -> str:
    """The whole, and what it consists of."""
    parts = [f"{name.replace('_', ' ')} {screen.size(held)}" for name, held in results["memory_parts"].items() if held]
    whole = f"{screen.size(results['memory_bytes'])} ({results['exemplars']} exemplars)"
    return f"{whole}: {', '.join(parts)}" if parts else whole


def _transfer(results: dict[str, Any]) -> list[tuple[str, str]]:
    found = results["forward_transfer"]
    return [] if found is None else [("fwd. transfer", f"{screen.percent(found)} %")]


def _show_matrix(matrix: list[list[float | None]], classes: list[list[str]]) -> None:
    """Accuracy on each experience's test images after training on each experience."""
    number = len(matrix)
    digits = 1 if number <= 10 else 0
    columns = ["after", *(str(j + 1) for j in range(number)), "mean"]
    rows = []
    for i, row in enumerate(matrix):
        seen = [value for value in row[: i + 1] if value is not None]
        mean = sum(seen) / len(seen) if seen else None
        cells = ["" if value is None else screen.percent(value, digits) for value in row]
        rows.append([str(i + 1), *cells, screen.percent(mean, digits)])
    title = "accuracy % on each experience's test images after each training"
    if screen.width(columns, rows) > screen.out().width:  # too many experiences for this terminal: the means alone
        title = "accuracy %, mean over the experiences seen, after each training"
        columns, rows = ["after", "mean"], [[row[0], row[-1]] for row in rows]
    named = " | ".join(", ".join(names) for names in classes)
    if len(named) < screen.out().width - 10:
        screen.line(f"classes:  {named}")
    screen.table(title, columns, rows)


def _next_command(results: dict[str, Any], data_dir: Path | None) -> str:
    """Something sensible to try with what there is now."""
    where = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
    if results["strategy"] == "replay" and results["head"] != "dense":
        return f"nnheads compare --stream {shlex.quote(results['stream'])} --heads dense,{results['head']}{where}"
    return f"nnheads run {shlex.quote(results['stream'])} --head impostor{where}"
