"""Options that several commands take, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nnheads.benchmarks.variants import json_or_text
from nnheads.cli.screen import note
from nnheads.errors import ConfigError

_EXAMPLES = {"--option": "k=16", "--strategy-option": "fine_tune=1"}

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder of images: torchvision's layout, or train/<class>/*, test/<class>/*."
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME", help="Network in front of the head; see nnheads list backbones."),
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", min=1, metavar="N", help="Passes over the images of each training.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, metavar="N", help="Images a step.")]
LearningRate = Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate; above 0.")]
Memory = Annotated[
    int | None, typer.Option("--memory", min=1, metavar="M", help="Exemplars kept, over all classes (streams).")
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cuda, mps or cpu.")]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Of the network's products: bfloat16, float32, or auto: bfloat16 where it is faster, and float32 "
        "for Avalanche's own strategies.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the last line only.")]
HeadOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the head, as k=16; may be given several times."),
]


StrategyOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy-option",
        metavar="KEY=VALUE",
        help="Option of the strategy, as fine_tune=1; may be given several times.",
    ),
]
Ema = Annotated[
    float | None,
    typer.Option("--ema", metavar="DECAY", help="Answer with weights averaged over steps, as 0.99; 0: not."),
]
ExemplarBytes = Annotated[
    int | None,
    typer.Option(
        "--exemplar-bytes",
        min=0,
        metavar="N",
        help="Store exemplars as WebP of N bytes, as 384 for 32x32, more in the same memory; 0: as they are.",
    ),
]
ReplayBatch = Annotated[
    int | None,
    typer.Option("--replay-batch", min=0, metavar="N", help="Exemplars replayed a step (by default --batch-size)."),
]
Scenario = Annotated[
    str, typer.Option("--scenario", metavar="NAME", help="class, or task: at test the experience is known.")
]
Validation = Annotated[
    float | None,
    typer.Option(
        "--validation", metavar="SHARE", help="Test on this share of the training images, to choose settings by."
    ),
]
Share = Annotated[
    float | None,
    typer.Option("--share", metavar="SHARE", help="Learn from this share of the training images, to try settings."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads of this process (default: torch's).")
]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures beside the results.")]


def set_threads(count: int | None) -> None:
    """Let torch compute with so many threads; None leaves it as it is."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def pairs(option: str, given: list[str] | None) -> dict[str, Any]:
    """Reads ``key=value`` pairs; a value is read as JSON where it is JSON, else taken as text.

    Args:
        option: the option that gave them, for the message.
        given: the pairs.

    Raises:
        ConfigError: if one has another form or a key comes twice.
    """
    options: dict[str, Any] = {}
    for pair in given or ():
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{option} {pair!r} must have the form key=value, as in {option} {_EXAMPLES[option]}")
        if key in options:
            raise ConfigError(f"{option} {key} is given twice")
        options[key] = json_or_text(text)
    return options


def positive(option: str, value: float | None) -> None:
    """Raises:
    ConfigError: if the value of an option is given and is not a finite number above 0.
    """
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{option} must be a number above 0, not {value:g}")


def note_unused_data_dir(source: str, data_dir: Path | None) -> None:
    """A note on stderr where ``--data-dir`` counts for nothing, as the images are elsewhere.

    Args:
        source: name of the data set or the stream.
        data_dir: what was given.
    """
    of = source.removeprefix("new-instances:")
    if data_dir is None or of == "images:":
        return
    if of.startswith("images:"):
        note(f"note: --data-dir is not used: {of} names its folder itself")
    elif of in ("digits", "split-digits"):
        note(f"note: --data-dir is not used: {of} comes with scikit-learn")


def writable(option: str, path: Path, *endings: str, what: str) -> None:
    """Says before the work whether a file can be written where it is wanted.

    Args:
        option: the option that named it, for the message.
        path: of the file; what is there already is replaced only where its name ends as such a file's does.
        endings: of such a file's name, as ``".png"``; one that is to be made may have any.
        what: kind of file, with its article, for the message.

    Raises:
        ConfigError: it is a folder, its folder is not there, or something else is there.
    """
    path = path.expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{option} {path} must be a file in a folder that is there")
    if path.exists() and path.suffix.lower() not in endings:
        raise ConfigError(f"{option} {path} is there already and not {what}: name another file")


def share(option: str, value: float | None) -> None:
    """Raises:
    ConfigError: if the value of an option is given and is not between 0 and 1.
    """
    if value is not None and not 0 < value < 1:
        raise ConfigError(f"{option} must be between 0 and 1, not {value:g}")


def names(option: str, text: str) -> tuple[str, ...]:
    """Reads a list of names with commas between them; each counts once.

    Raises:
        ConfigError: if there is none.
    """
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise ConfigError(f"{option} needs at least one name, with commas between several")
    return found


def numbers(option: str, text: str, kind: type[int] | type[float] = float) -> tuple[Any, ...]:
    """Reads numbers above 0 with commas between them; each counts once.

    Raises:
        ConfigError: if one is not such a number.
    """
    found = []
    for name in names(option, text):
        try:
            value = kind(name)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            what = "whole numbers from 1 on" if kind is int else "numbers above 0"
            raise ConfigError(f"{option} must be {what}, with commas between several, not {name!r}")
        found.append(value)
    return tuple(dict.fromkeys(found))


def seeds(text: str) -> tuple[int, ...]:
    """Reads seeds with commas between them.

    Raises:
        ConfigError: if one is not a whole number from 0 on.
    """
    found = []
    for name in names("--seeds", text):
        if not name.isascii() or not name.isdigit():
            raise ConfigError(f"--seeds must be whole numbers from 0 on, as in 0,1,2, not {name!r}")
        if int(name) >= 2**64:
            raise ConfigError(f"--seeds must be below 2 ** 64, not {name}")
        found.append(int(name))
    return tuple(dict.fromkeys(found))
