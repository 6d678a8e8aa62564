"""The measurements of compressed centers: what they report is what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nnheads
import nnheads.benchmarks.datasets
from nnheads.benchmarks import compression, opq_training
from nnheads.benchmarks.compression import Way, fewer_centers, measure
from nnheads.errors import ConfigError
from nnheads.heads import MemoryHead
from nnheads.heads.compressed import compressed_head

faiss = pytest.importorskip("faiss")


def trained(n: int = 1200) -> tuple[MemoryHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 4
    z = torch.randn(4, 32, generator=generator)[y] + 0.7 * torch.randn(n, 32, generator=generator)
    head = nnheads.build_head("impostor", 32, 4)
    assert isinstance(head, MemoryHead)
    head.memorize(z[:1000], y[:1000])
    head.refreshed()
    return head.eval(), z[1000:], y[1000:]


def test_accuracy_and_bytes_of_each_way(tmp_path: Path) -> None:
    head, z, y = trained()
    raw, coded = measure(head, z, y, [Way(0), Way(8)])
    assert raw["accuracy"] == float((head(z).argmax(1) == y).float().mean())
    assert coded["accuracy"] > raw["accuracy"] - 0.05
    assert raw["codes_bytes"] == 1000 * 32 * 4
    assert coded["codes_bytes"] == 8000
    model = nnheads.attach_head(nn.Sequential(nn.Linear(32, 4)), compressed_head(head, 8))
    nnheads.save(model, tmp_path / "model")
    assert coded["saved_bytes"] == (tmp_path / "model" / "head.safetensors").stat().st_size
    assert "| 8 | pca | 8 |" in compression.table([raw, coded])
    assert not head.memory.coder


def test_fewer_centers() -> None:
    head, _, _ = trained()
    assert len(fewer_centers(head, 300).memory) == 300
    assert len(head.memory) == 1000
    with pytest.raises(ConfigError, match="1 to 1000"):
        fewer_centers(head, 1001)


def test_the_commands_on_a_saved_model(tmp_path: Path) -> None:
    data = nnheads.benchmarks.datasets.load_dataset("digits")
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 10, in_channels=1), "impostor")
    nnheads.fit(model, data.train, epochs=0, progress=False)
    nnheads.save(model, tmp_path / "model")
    out = tmp_path / "out.json"
    compression.main([str(tmp_path / "model"), "--dataset", "digits", "--centers", "300", "--json", str(out)])
    found = json.loads(out.read_text())
    assert len(found["rows"]) == len(compression.WAYS)
    assert found["papers_size"]["codes_bytes"] == 5994 * 16 <= 96_000
    assert found["papers_size"]["saved_bytes"] <= 700_000
    assert isinstance(model.head, MemoryHead)
    nnheads.save(nnheads.attach_head(model, compressed_head(model.head, 8)), tmp_path / "coded")
    with pytest.raises(ConfigError, match="compressed already"):
        compression.main([str(tmp_path / "coded"), "--dataset", "digits"])
    with pytest.raises(ConfigError, match="does not hold 2,000 raw centers"):
        opq_training.main([str(tmp_path / "model")])


def test_recall_of_rotations() -> None:
    _, z, _ = trained(3000)
    found = opq_training.measure(z[:1800], z[1800:], 16, ["opq", "none"])
    for row in found:
        assert 0.3 < row["recall_1"] <= row["recall_1_at_10"] <= 1
    ours, plain = found
    assert ours["error"] < plain["error"]
    assert "| `opq` |" in opq_training.table(found)
    assert opq_training.widened(z, 48).shape == (2000, 48)
