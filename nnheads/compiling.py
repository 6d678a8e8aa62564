"""``torch.compile`` for a model's backbone, for as long as it is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nnheads.errors import ConfigError, unknown_name
from nnheads.headed import HeadedModel

_COMPILERS = ("g++", "clang++", "c++", "cl")


@contextmanager
def compiling(model: HeadedModel, compile: bool | str) -> Iterator[None]:
    """Run the backbone compiled for a while; heads, whose searches are no fixed graph, run as they are.

    The modules stay what they are: nothing is wrapped, so that parameters, state dicts and saved models are those of
    the plain backbone. What was compiled is used again by a later call.

    Args:
        model: what ``attach_head`` returned.
        compile: False for nothing, True for torch's own compiler, inductor, or the name of another backend, see
            ``torch.compiler.list_backends``.

    Raises:
        UnknownNameError: no backend has that name.
        ConfigError: the backbone is cut in two, there is no compiler, or compiling fails.
    """
    if not compile:
        yield
        return
    if model.at is not None:
        raise ConfigError("a backbone that is cut in two cannot be compiled as one: leave compile out")
    backend = "inductor" if compile is True else compile
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise unknown_name("backend of torch.compile", backend, known)
    if backend == "inductor":
        _need_compiler()
    model.run_by(_one_line(torch.compile(model.backbone, backend=backend)))
    try:
        yield
    finally:
        model.run_by(None)


def _need_compiler() -> None:
    """ConfigError where inductor would find nothing to compile its C++ with; for CUDA, Triton needs one too."""
    chosen = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([chosen] if chosen else _COMPILERS)):
        what = f"CXX={chosen} is not there" if chosen else "none is on PATH"
        raise ConfigError(f"torch.compile needs a C++ compiler ({what}): install g++, or leave compile out")


def _one_line(compiled: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same, its failures to compile told in one line."""
    import torch._dynamo.exc as dynamo

    def run(x: Tensor) -> Any:
        try:
            return compiled(x)
        except dynamo.TorchDynamoException as error:
            # The first line names the backend, the second what it said.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()][:2] or [type(error).__name__]
            raise ConfigError(f"torch.compile failed ({' '.join(lines)}): leave compile out") from error

    return run
