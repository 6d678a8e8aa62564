"""``nnheads compare``: heads on a data set, or strategies and heads on a stream, in one table."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nnheads.cli import options, screen
from nnheads.cli.compare_tables import show_heads, show_strategies
from nnheads.cli.folders import newest, results_folder
from nnheads.errors import ConfigError

if TYPE_CHECKING:
    from nnheads.benchmarks.comparison import CompareConfig
    from nnheads.benchmarks.stream_comparison import StreamComparison
    from nnheads.devices import Precision

STEM = "compare"
HEADS = "dense,knn,nca"


def compare(
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            metavar="A,B,...",
            help=f"Heads to compare, also as impostor+centers=tied, or all; see nnheads list heads (default {HEADS}).",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Train on all classes at once (default: digits)."),
    ] = None,
    stream: Annotated[
        str | None, typer.Option("--stream", metavar="NAME", help="Train on classes that arrive one after another.")
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies",
            metavar="A,B,...",
            help="Strategies to compare on the stream; settings of one are joined to it, as impostor+n_a=0+n_d=0 or "
            "replay+ema=0.99+head=dense.",
        ),
    ] = None,
    backbone: options.Backbone = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the weights published for --backbone torchvision:, timm:.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Start from these weights of the backbone (safetensors)."),
    ] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Leave the backbone as it is; train heads alone.")] = False,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=8, metavar="N", help="Resize images to N x N pixels.")
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option("--ood", metavar="NAME", help="Data set whose images heads are to tell from their own (AUROC)."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Train with the backbone compiled by torch.compile.")
    ] = False,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: Annotated[
        str | None,
        typer.Option("--lr", metavar="RATE,...", help="Learning rate; on a stream several make a row each."),
    ] = None,
    pick_lr: Annotated[
        bool,
        typer.Option("--pick-lr", help="Choose each strategy's rate among --lr on --validation, then run on test."),
    ] = False,
    extend_lr: Annotated[
        bool,
        typer.Option("--extend-lr", help="With --pick-lr: try rates beyond --lr where the best is at its end."),
    ] = False,
    pick_share: Annotated[
        float | None,
        typer.Option("--pick-share", metavar="SHARE", help="Try rates on this share of the training images."),
    ] = None,
    share: options.Share = None,
    validation: options.Validation = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="M,...", help="Exemplars kept, over all classes (streams).")
    ] = None,
    ema: options.Ema = None,
    exemplar_bytes: options.ExemplarBytes = None,
    strategy_option: options.StrategyOptions = None,
    replay_batch: options.ReplayBatch = None,
    scenario: options.Scenario = "class",
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,...", help="Train once with each seed.")] = "0",
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    precision: options.PrecisionName = "auto",
    threads: options.Threads = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the results (by default runs/compare-NNN).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished in --out, or in the newest runs/compare-NNN.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="RUN",
            help="Make these runs alone, as 'replay-*-s0', and try rates for their rows alone; may be given again.",
        ),
    ] = None,
    plots: options.Plots = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Train with each head on a data set, or with each strategy on a stream, and compare what comes out.

    Several processes with the same --out and --resume share the work on a stream.
    """
    if dataset is not None and stream is not None:
        raise ConfigError("give --dataset or --stream, not both")
    given_seeds = options.seeds(seeds)
    given_heads = None if heads is None else options.names("--heads", heads)
    rates = () if lr is None else options.numbers("--lr", lr)
    options.share("--ema", ema or None)  # 0: not at all
    options.share("--share", share)
    options.share("--pick-share", pick_share)
    options.share("--validation", validation)
    on_stream = {
        "--strategies": strategies,
        "--memory": memory,
        "--ema": ema,
        "--exemplar-bytes": exemplar_bytes,
        "--strategy-option": strategy_option,
        "--replay-batch": replay_batch,
        "--share": share,
        "--validation": validation,
        "--pick-lr": pick_lr or None,
        "--extend-lr": extend_lr or None,
        "--pick-share": pick_share,
        "--precision": None if precision == "auto" else precision,
        "--only": only,
        "--scenario": None if scenario == "class" else scenario,
    }
    if stream is None:
        for option, value in on_stream.items():
            if value is not None:
                raise ConfigError(f"{option} is for --stream: on a data set a head is trained on all classes at once")
        if len(rates) > 1:
            raise ConfigError("several learning rates are for --stream: give one")
    else:
        on_dataset = {
            "--pretrained": pretrained,
            "--weights": weights is not None,
            "--freeze": freeze,
            "--image-size": image_size is not None,
            "--ood": ood is not None,
            "--compile": compiled,
        }
        for option, given in on_dataset.items():
            if given:
                raise ConfigError(f"{option} is for --dataset: a stream is learned from the first weights on")
    if pick_lr and (len(rates) < 2 or validation is None):
        raise ConfigError(
            "--pick-lr chooses among several rates on held-out images: give --lr 0.03,0.1 --validation 0.1"
        )
    if extend_lr and not pick_lr:
        raise ConfigError("--extend-lr is for --pick-lr, which chooses among the rates of --lr")
    if pick_share is not None and not pick_lr:
        raise ConfigError("--pick-share is for --pick-lr; --share takes less for all runs")
    if resume and out is None:
        out = newest(STEM)
        if out is None:
            raise ConfigError("--resume found no runs/compare-NNN here: name the folder with --out")
    options.set_threads(threads)
    if ood is None:  # whose images may be there
        options.note_unused_data_dir(stream or dataset or "digits", data_dir)
    with screen.interruptible(lambda: "nothing"):
        work: Callable[[Path], dict[str, Any]]
        if stream is None:
            from nnheads.benchmarks.comparison import CompareConfig, expand_heads

            config = CompareConfig(
                heads=expand_heads(given_heads or options.names("--heads", HEADS)),
                dataset=dataset or "digits",
                seeds=given_seeds,
                backbone=backbone,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=rates[0] if rates else None,
                data_dir=data_dir,
                device=device,
                pretrained=pretrained,
                weights=weights,
                freeze=freeze,
                image_size=image_size,
                ood=ood,
                compile=compiled,
            )
            config.check()

            def work(folder: Path) -> dict[str, Any]:
                return _heads(config, folder, resume, quiet)

        else:
            from nnheads.benchmarks.comparison import expand_heads
            from nnheads.benchmarks.config import RunConfig
            from nnheads.benchmarks.stream_comparison import StreamComparison
            from nnheads.benchmarks.variants import variants

            one_rate = len(rates) == 1
            plan = StreamComparison(
                variants=variants(
                    None if strategies is None else options.names("--strategies", strategies),
                    expand_heads(given_heads or (() if strategies else options.names("--heads", HEADS))),
                    () if one_rate or pick_lr else rates,
                ),
                memory=(None,) if memory is None else options.numbers("--memory", memory, int),
                seeds=given_seeds,
                base=RunConfig(
                    stream=stream,
                    data_dir=data_dir,
                    backbone=backbone,
                    epochs=epochs,
                    batch_size=batch_size,
                    replay_batch=replay_batch,
                    learning_rate=rates[0] if one_rate else None,
                    ema=ema,
                    exemplar_bytes=exemplar_bytes,
                    strategy_options=options.pairs("--strategy-option", strategy_option),
                    scenario=scenario,
                    share=share,
                    validation=validation,
                    device=device,
                    precision=cast("Precision", precision),
                ),
                rates=rates if pick_lr else (),
                extend_rates=extend_lr,
                trial_share=pick_share,
            )
            plan.check()

            def work(folder: Path) -> dict[str, Any]:
                return _strategies(plan, folder, resume, only or [], quiet)

        with results_folder(out, STEM) as folder:
            summary = work(folder)
            if plots and stream is not None:
                from nnheads.benchmarks.plots import plot_comparison

                with screen.interruptible(lambda: f"all but figures in {folder}"):
                    plot_comparison(summary, folder)
    if as_json:
        screen.print_json({**summary, "path": str(folder)})
    elif not quiet and stream is None:
        show_heads(summary)
    elif not quiet:
        show_strategies(summary)
    if not as_json:
        screen.line(f"{'' if quiet else chr(10)}results: {folder / 'summary.json'}")


def _heads(config: CompareConfig, folder: Path, resume: bool, quiet: bool) -> dict[str, Any]:
    from nnheads.benchmarks.compare import compare
    from nnheads.benchmarks.comparison import cells
    from nnheads.cli.progress import Bar

    made = cells(config, folder)

    def kept() -> str:
        return _kept(sum(cell.results.is_file() for cell in made), len(made), folder)

    with screen.interruptible(kept), Bar(shown=not quiet) as bar:

        def finished(result: dict[str, Any]) -> None:
            spent = screen.duration(result["train_seconds"])
            accuracy = screen.percent(result["accuracy"])
            bar.line(f"{result['head']}, seed {result['seed']}: accuracy {accuracy} %, trained in {spent}")

        return compare(config, folder, resume=resume, progress=bar, finished=finished)


def _strategies(plan: StreamComparison, folder: Path, resume: bool, only: list[str], quiet: bool) -> dict[str, Any]:
    from nnheads.benchmarks.checkpoint import experiences_done
    from nnheads.benchmarks.compare_streams import all_cells, compare_streams
    from nnheads.cli.progress import Bar

    made = all_cells(plan, folder, only)

    def kept() -> str:
        done = sum(cell.results.is_file() for cell in made)
        begun = {cell.name: experiences_done(cell.checkpoint) for cell in made}
        parts = [f"{number} experience{'s' * (number > 1)} of {name}" for name, number in begun.items() if number]
        return _kept(done, len(made), folder, parts)

    with screen.interruptible(kept), Bar(shown=not quiet) as bar:

        def finished(result: dict[str, Any], done: int, total: int) -> None:
            memory = "" if result["memory"] is None else f", memory {result['memory']}"
            bar.line(
                f"{done} of {total}: {result['variant']}{memory}, seed {result['seed']}: accuracy "
                f"{screen.percent(result['accuracy'])} %, forgetting {screen.percent(result['forgetting'])} %, "
                f"{screen.duration(result['train_seconds'] + result['eval_seconds'])}"
            )

        return compare_streams(plan, folder, resume=resume, only=only, progress=bar, finished=finished)


def _kept(done: int, total: int, folder: Path, begun: Sequence[str] = ()) -> str:
    parts = [f"{done} of {total} configurations"] * (done > 0) + list(begun)
    again = shlex.quote(str(folder))
    return f"{', '.join(parts)} in {folder}; go on with --resume --out {again}" if parts else "nothing"
