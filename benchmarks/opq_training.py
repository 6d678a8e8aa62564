"""How long a rotation for product quantization takes to train, and what it is worth: FAISS's own setting beside ours.

    python -m nnheads.benchmarks.opq_training MODEL --json OUT

The centers of a saved model are embeddings of a real network. 1,000 of them are held out as queries; recall is that of
their nearest others when these are codes. Times are of the CPU, over all threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nnheads._codebooks import train_codebooks
from nnheads._faiss import load_faiss
from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.scripts import check_whole, run_script
from nnheads.errors import ConfigError
from nnheads.quantize import ProductQuantizer

QUERIES: Final = 1000
_ROUNDS: Final = 25


def measure(keys: Tensor, queries: Tensor, size: int = 16, settings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train quantizers and look for the nearest rows among codes.

    Args:
        keys: (N, d) rows to encode.
        queries: (B, d) rows to look for.
        size: bytes a row.
        settings: rotations, see `ProductQuantizer.fit`, or ``"faiss"`` for OPQ as FAISS trains it by default; all of
            them unless given.

    Returns:
        For each setting CPU seconds of training (rotation and codebooks), squared error over variance, ``recall_1``
        (the nearest row found first), ``recall_1_at_10`` (found among ten) and ``recall_10`` (share of the ten nearest
        found among ten).
    """
    exact = torch.cdist(queries, keys).topk(10, largest=False).indices
    return [
        _measured(keys, queries, exact, size, name) for name in settings or ("faiss", "opq", "opq:64", "pca", "none")
    ]


def _measured(keys: Tensor, queries: Tensor, exact: Tensor, size: int, name: str) -> dict[str, Any]:
    started = time.process_time()
    quantizer = _faiss_default(keys, size) if name == "faiss" else ProductQuantizer.fit(keys, size, rotation=name)
    seconds = time.process_time() - started
    assert quantizer is not None
    codes = quantizer.encode(keys)
    decoded = quantizer.decode(codes)
    found = torch.cdist(queries, decoded).topk(10, largest=False).indices
    return {
        "rotation": name,
        "train_cpu_seconds": seconds,
        "error": float((decoded - keys).square().sum() / (keys - keys.mean(0)).square().sum()),
        "recall_1": float((found[:, 0] == exact[:, 0]).float().mean()),
        "recall_1_at_10": float((found == exact[:, :1]).any(1).float().mean()),
        "recall_10": float((found.unsqueeze(2) == exact.unsqueeze(1)).any(2).float().mean()),
    }


def _faiss_default(keys: Tensor, size: int) -> ProductQuantizer:
    """OPQ of the whole width with every setting as FAISS has it."""
    faiss = load_faiss()
    width = keys.shape[1]
    mean = keys.mean(0)
    opq = faiss.OPQMatrix(width, size)
    opq.train((keys - mean).contiguous().numpy())
    rotation = torch.from_numpy(faiss.vector_to_array(opq.A).copy()).view(width, width)
    books = train_codebooks((keys - mean) @ rotation.T, size, 8, 0, _ROUNDS)
    return ProductQuantizer(width=width, codebooks=books, rotation=rotation, mean=mean)


def widened(keys: Tensor, width: int) -> Tensor:
    """Embeddings (N, d) as those of a wider network: a further layer of random weights and ReLU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(keys.shape[1], width, generator=generator) * (2 / keys.shape[1]) ** 0.5
    wide: Tensor = (keys @ weight).relu()
    return wide


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| rotation | training, CPU s | error | recall 1 | recall 1 at 10 | recall 10 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = "OPQ, FAISS's default" if row["rotation"] == "faiss" else f"`{row['rotation']}`"
        shares = " | ".join(f"{row[key]:.3f}" for key in ("error", "recall_1", "recall_1_at_10", "recall_10"))
        lines.append(f"| {name} | {row['train_cpu_seconds']:.1f} | {shares} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of nnheads.save, with raw centers")
    parser.add_argument("--bytes", type=int, default=16, help="of a code (default: 16)")
    parser.add_argument("--width", type=int, help="put a random layer of so many units behind the embeddings")
    parser.add_argument("--rows", type=int, help="take so many centers (default: all)")
    parser.add_argument("--settings", help="with commas between them; faiss is its default")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = _run(given)
    print(table(found["settings"]))
    if given.json is not None:
        write_json(given.json, found)


def _run(given: argparse.Namespace) -> dict[str, Any]:
    from nnheads.heads import MemoryHead
    from nnheads.io import load

    head = load(given.model).head
    if not isinstance(head, MemoryHead) or head.memory.coded or len(head.memory) < 2 * QUERIES:
        raise ConfigError(f"{given.model} does not hold {2 * QUERIES:,} raw centers: save a model of nngk or impostor")
    keys = head.memory.all_keys()
    keys = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))]
    if given.rows is not None:
        check_whole("--rows", given.rows, 256)  # as many as a codebook has words
        keys = keys[: given.rows + QUERIES]
    if given.width is not None:
        keys = widened(keys, given.width)
    if given.bytes < 1 or keys.shape[1] % given.bytes:
        raise ConfigError(f"--bytes must divide the width of {keys.shape[1]}, got {given.bytes}")
    return {
        "rows": len(keys) - QUERIES,
        "width": keys.shape[1],
        "random_layer": given.width is not None,
        "bytes": given.bytes,
        "queries": QUERIES,
        "settings": measure(
            keys[QUERIES:].contiguous(),
            keys[:QUERIES],
            given.bytes,
            given.settings.split(",") if given.settings else (),
        ),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }


if __name__ == "__main__":
    run_script(main)
