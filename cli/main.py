"""The ``nnheads`` program: its commands, and what becomes of errors.

Nothing heavy is imported here or at the top of a command's module, so that ``nnheads --help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from nnheads.cli import analyzing, benching, comparing, explaining, inference, learning, listing, running, studying
from nnheads.cli.screen import error, note
from nnheads.errors import NNHeadsError

# Typer brings its own copy of Click from 0.26 on; the public BadParameter leads to the base of all usage errors.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What goes wrong where output goes to a file on a disk that does not take it."""

app = typer.Typer(
    name="nnheads",
    help="Nearest-neighbour heads for any PyTorch backbone: decide by training samples.",
    epilog="Start with: nnheads run split-digits --head impostor",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(running.run)
app.command("compare")(comparing.compare)
app.command("predict")(inference.predict)
app.command("eval")(inference.evaluate)
app.command("analyze")(analyzing.analyze)
app.command("explain")(explaining.explain)
app.command("add")(learning.add)
app.command("forget")(learning.forget)
app.command("calibrate")(learning.calibrate)
app.command("bench")(benching.bench)
app.command("list")(listing.show)
app.command("study")(studying.study)


def _print_version(wanted: bool) -> None:
    if wanted:
        import nnheads

        typer.echo(f"nnheads {nnheads.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program and exits: 0 when all went well, 2 after a mistake of the user, 130 after Ctrl-C.

    Args:
        arguments: what stands behind the program's name; by default those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end a run
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="nnheads", standalone_mode=False)
        sys.stdout.flush()  # here a disk that is full can still be told of
    except NNHeadsError as mistake:
        error(str(mistake))
        code = 2
    except UsageError as mistake:
        error(_usage(mistake))
        code = 2
    except KeyboardInterrupt:
        note("interrupted; kept: nothing")
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough, as in `nnheads list heads | head -1`
        sys.stderr.close()
        code = 141
    except OSError as problem:
        if problem.errno not in _FULL or problem.filename is not None:
            raise
        error(f"cannot write the output ({problem.strerror})")
        _abandon_output()
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _abandon_output() -> None:
    """What is left to print goes nowhere: Python would try to write it once more at its end, and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(mistake: Exception) -> str:
    """A usage error of Typer's in our one line, with where to look."""
    # Each of these belongs to Click's UsageError, whichever copy of Click raised it.
    message = mistake.format_message().rstrip(".").replace("Value error, ", "")  # type: ignore[attr-defined]
    context = mistake.ctx  # type: ignore[attr-defined]
    return f"{message}; see {context.command_path if context is not None else 'nnheads'} --help"


if __name__ == "__main__":
    main()
