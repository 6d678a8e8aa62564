"""What a run leaves behind: `results.json` and the saved model, never half written."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnheads.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

RESULTS = "results.json"
MODEL = "model"
SUMMARY = "summary.json"

_PACKAGES = {
    "nnheads": ("nnheads",),
    "torch": ("torch",),
    "avalanche": ("avalanche-lib",),
    "faiss": ("faiss-gpu", "faiss-cpu", "faiss"),
}


def check_out(out: Path, *, resume: bool = False) -> Path:
    """The folder, where results can be written to it.

    Args:
        out: the folder.
        resume: whether an interrupted run goes on, which may have saved its model but not its results.

    Raises:
        ConfigError: it holds results or a model already, or is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: name a folder that is empty or does not exist yet")
    for name in (RESULTS,) if resume else (RESULTS, MODEL):
        if (out / name).exists():
            raise ConfigError(f"--out {out} holds {name} already: name another folder, nothing is overwritten")
    return out


def check_same_comparison(out: Path, kind: str, name: str) -> None:
    """ConfigError where a folder holds results of another comparison, which would be mixed with these.

    Args:
        out: the folder.
        kind: ``"stream"`` or ``"dataset"``.
        name: of the stream or data set.
    """
    for file in sorted(out.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            # a run of strategies has what was asked for, one of heads its settings, a summary its kind
            held = "stream" if "asked" in content else "dataset" if "head" in content else content["kind"]
            where = content.get("asked") or content.get("settings") or {}
            found = where.get(held) or content.get(held) or name
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # whoever needs it tells what is wrong with it
        if (held, found) != (kind, name):
            raise ConfigError(f"{out} holds a comparison on {held} {found}, not on {kind} {name}: give another --out")


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON beside the path and move it there when it is complete.

    Raises:
        CheckpointError: the disk does not take it.
    """
    from nnheads.storage import replace_text  # torch

    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(path: str | Path) -> dict[str, Any]:
    """What a run wrote, given its folder or file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no results in {path}: give a folder that nnheads run wrote") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file} ({error}): run again") from error
    if not isinstance(content, dict) or "accuracy_matrix" not in content:
        raise CheckpointError(f"{file} was not written by nnheads run: give a folder that it wrote")
    return content


def versions() -> dict[str, str]:
    """Versions of what a run depends on; ``none`` for what is not installed."""
    found = {name: _version(packages) for name, packages in _PACKAGES.items()}
    return {**found, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """A device as a reader of results wants it named."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)


def processor_name() -> str:
    """The CPU's model as the system names it, by which runs of one machine are told from those of another."""
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        listed = ""
    named = (line.partition(":")[2].strip() for line in listed.splitlines() if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _version(packages: Sequence[str]) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
