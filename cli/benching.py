"""``nnheads bench``: what searching, training and growing cost, beside the peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnheads.cli.options import writable
from nnheads.cli.screen import note


def bench(
    name: Annotated[str, typer.Argument(help="What to measure; 'list' names it all.")] = "list",
    rounds: Annotated[int, typer.Option(help="Rounds after a warm-up, the contenders in turn.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: whether it works, not what it costs.")] = False,
    only: Annotated[str, typer.Option(help="Only cases whose name holds this.")] = "",
    threads: Annotated[int | None, typer.Option(help="CPU threads of everyone alike.")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Real embeddings: 'embeddings' writes this file, others read it.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of the backbone that 'embeddings' trains.")] = 3,
    data_dir: Annotated[Path | None, typer.Option(help="Where CIFAR-10 and CIFAR-100 are.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for rows, versions and device.")] = None,
) -> None:
    """Measure speed and memory beside the peers (FAISS, torch, scikit-learn, pytorch-metric-learning)."""
    from nnheads.benchmarks.scripts import check_whole
    from nnheads.benchmarks.speed.registry import BENCHES, find_bench, measure
    from nnheads.errors import ConfigError

    if name == "list":
        for each in BENCHES.values():
            typer.echo(f"{each.name:12} {each.title}\n{'':12} bar: {each.bar}")
        typer.echo(f"{'embeddings':12} makes the real embeddings that some of these need: --embeddings FILE")
        return
    if name != "embeddings":
        find_bench(name)
    check_whole("--rounds", rounds)
    check_whole("--epochs", epochs)
    if out is not None:
        writable("--out", out, ".json", what="a JSON file")
    if threads is not None:
        _pin(threads)
    if name == "embeddings":
        from nnheads.benchmarks.speed.embeddings import make_embeddings

        if embeddings is None:
            raise ConfigError("name the file to write: --embeddings FILE")
        share, epochs = (0.02, 1) if quick else (1.0, epochs)
        typer.echo(f"embeddings: {make_embeddings(embeddings, data_dir, epochs=epochs, share=share)}")
        return
    from nnheads.benchmarks.results import write_json
    from nnheads.benchmarks.speed.harness import Settings

    settings = Settings(rounds=rounds, quick=quick, data_dir=data_dir, embeddings=embeddings, only=only)
    found = measure(name, settings, typer.echo)
    typer.echo(f"bar: {found['bar']}; met in {found['met']}")
    if quick:
        note("quick sizes: these figures are no measurement")
    if out is not None:
        typer.echo(f"results: {write_json(out, found)}")


def _pin(threads: int) -> None:
    """The same number of threads for torch, FAISS and whatever asks the environment when it is loaded."""
    import os

    from nnheads.benchmarks.scripts import check_whole

    check_whole("--threads", threads)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    import torch

    torch.set_num_threads(threads)
    from nnheads._faiss import faiss_available, load_faiss

    if faiss_available():
        load_faiss().omp_set_num_threads(threads)
