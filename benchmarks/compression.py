"""What compressing the centers of a saved model costs in accuracy and saves in bytes.

    python -m nnheads.benchmarks.compression MODEL --dataset cifar10 --data-dir DATA --json OUT

The images are embedded once; then the head's centers are compressed in each way and the same embeddings are answered.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.scripts import run_script
from nnheads.errors import ConfigError
from nnheads.heads import MemoryHead, build_head
from nnheads.heads.compressed import compressed_head

PAPERS_CENTERS: Final = 5994
PAPERS_WIDTH: Final = 512
PAPERS_CLASSES: Final = 200

_BATCH: Final = 128
_TIMED: Final = 8  # batches


@final
@dataclass(frozen=True)
class Way:
    """A way to keep a center; 0 bytes stands for float32."""

    size: int
    rotation: str = "pca"
    bits: Literal[4, 8] = 8


WAYS: Final = (
    Way(0),
    *(Way(size) for size in (64, 32, 16, 8, 4)),
    Way(16, bits=4),
    Way(16, "none"),
    Way(16, "pca:32"),
    Way(16, "opq:64"),
    Way(16, "opq"),
)


def measure(head: MemoryHead, z: Tensor, y: Tensor, ways: Sequence[Way] = WAYS) -> list[dict[str, Any]]:
    """Compress a head's centers in several ways.

    Args:
        head: trained; one that can compress its centers.
        z: (N, d) embeddings of test samples.
        y: (N,) their labels.
        ways: in which.

    Returns:
        For each way accuracy, log-loss, bytes of the codes (or raw centers) alone, of all that the memory holds and of
        all that is saved, CPU milliseconds a query, and seconds to train the codebooks and encode.
    """
    return [_measured(head, z, y, way) for way in ways]


@torch.no_grad()
def _measured(head: MemoryHead, z: Tensor, y: Tensor, way: Way) -> dict[str, Any]:
    started = time.process_time()
    twin = head
    if way.size:
        twin = compressed_head(head, way.size, rotation=way.rotation, code_bits=way.bits)
    seconds = time.process_time() - started
    twin.eval()
    log_probs = torch.cat([twin(part) for part in z.split(512)])
    started = time.process_time()
    for part in z.split(_BATCH)[:_TIMED]:
        twin(part)
    asked = min(len(z), _BATCH * _TIMED)
    milliseconds = 1000 * (time.process_time() - started) / asked
    return {
        "bytes_per_center": way.size or None,
        "rotation": way.rotation if way.size else None,
        "code_bits": way.bits if way.size else None,
        "accuracy": float((log_probs.argmax(1) == y).float().mean()),
        "log_loss": float(torch.nn.functional.nll_loss(log_probs, y)),
        **sizes(twin),
        "cpu_ms_per_query": milliseconds,
        "compress_cpu_seconds": seconds if way.size else None,
    }


def sizes(head: MemoryHead) -> dict[str, int]:
    """Bytes of a head's codes (or raw centers) alone, of all that its memory holds, and of the file it is saved in."""
    import safetensors.torch

    state = {name: tensor.clone().contiguous() for name, tensor in head.state_dict().items()}
    keys = (state[f"memory.{name}"] for name in ("keys", "codes") if f"memory.{name}" in state)
    return {
        "codes_bytes": sum(t.numel() * t.element_size() for t in keys),
        "memory_bytes": head.memory.bytes,
        "saved_bytes": len(safetensors.torch.save(state)),
    }


def papers_sizes(auxiliary: float = 0.0) -> dict[str, Any]:
    """The bytes of 5,994 centers of 512 numbers at 16 bytes, as in Lebedev et al. 2018, with 200 classes.

    Args:
        auxiliary: above 0, the dense layer that only training uses is saved too.
    """
    head = build_head(
        "impostor", PAPERS_WIDTH, PAPERS_CLASSES, bytes_per_center=16, auxiliary=auxiliary, centers="fixed"
    )
    assert isinstance(head, MemoryHead)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(PAPERS_CENTERS, PAPERS_WIDTH, generator=generator)
    head.add(z, torch.arange(PAPERS_CENTERS) % PAPERS_CLASSES)
    head.refreshed()
    return {"centers": PAPERS_CENTERS, "width": PAPERS_WIDTH, "classes": PAPERS_CLASSES, **sizes(head)}


def fewer_centers(head: MemoryHead, count: int) -> MemoryHead:
    """A copy of a head with so many of its centers, drawn at random."""
    import copy

    fewer = copy.deepcopy(head)
    ids = fewer.memory.ids[: len(fewer.memory)]
    if not 1 <= count <= len(ids):
        raise ConfigError(f"--centers must be 1 to {len(ids)}, the centers of the model, not {count}")
    draw = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    fewer.drop(ids[draw[count:]])
    fewer.refreshed()
    return fewer


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| bytes | rotation | bits | accuracy % | log-loss | codes KB | memory KB | saved KB | CPU ms a query |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kb = " | ".join(f"{row[name] / 1000:,.0f}" for name in ("codes_bytes", "memory_bytes", "saved_bytes"))
        lines.append(
            f"| {row['bytes_per_center'] or 'raw'} | {row['rotation'] or '-'} | {row['code_bits'] or '-'} "
            f"| {100 * row['accuracy']:.2f} | {row['log_loss']:.3f} | {kb} | {row['cpu_ms_per_query']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of nnheads.save")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--centers", type=int, help="drop all but so many, at random (default: keep all)")
    parser.add_argument("--samples", type=int, help="of the test images (default: all)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = _run(given)
    print(table(found["rows"]))
    paper = found["papers_size"]
    print(
        f"{paper['centers']:,} centers of {paper['width']} numbers at 16 bytes: codes {paper['codes_bytes']:,} bytes, "
        f"everything saved {paper['saved_bytes']:,}"
    )
    if given.json is not None:
        write_json(given.json, found)


def _run(given: argparse.Namespace) -> dict[str, Any]:
    from nnheads.benchmarks.datasets import load_dataset
    from nnheads.evaluation import embed
    from nnheads.io import load

    model = load(given.model)
    if not isinstance(model.head, MemoryHead) or "bytes_per_center" not in model.head.option_names():
        raise ConfigError(
            f"{given.model}: head {model.head.name!r} does not compress its centers: save knn or impostor"
        )
    if model.head.memory.coded:
        raise ConfigError(f"{given.model}: its centers are compressed already: take a model with raw ones")
    head = model.head if given.centers is None else fewer_centers(model.head, given.centers)
    test = load_dataset(given.dataset, given.data_dir).test
    if given.samples is not None:
        test = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: given.samples])
    z, y, _ = embed(model, test)
    head.to("cpu")
    return {
        "dataset": given.dataset,
        "head": head.name,
        "centers": len(head.memory),
        "width": head.memory.dim,
        "test_samples": len(y),
        "rows": measure(head, z.float(), y),
        "papers_size": papers_sizes(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }


if __name__ == "__main__":
    run_script(main)
