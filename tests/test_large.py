"""Codes in memory, keys on disk, rows added in chunks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnheads import large
from nnheads.errors import ConfigError, EmptyMemoryError, ShapeError
from nnheads.large import LargeIndex

pytest.importorskip("faiss")


def clusters(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(300, 32, generator=torch.Generator().manual_seed(9))
    return centers[torch.randint(0, 300, (rows,), generator=generator)] + 0.3 * torch.randn(
        rows, 32, generator=generator
    )


@pytest.mark.parametrize("bfloat16", [True, False])
def test_rows_added_in_chunks_are_found_by_keys_on_disk(
    tmp_path: Path, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "multiplies_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(large, "_ROWS_A_LIST", 500)
    every = clusters(12_000, 0)
    keys = torch.from_file(str(tmp_path / "keys"), shared=True, size=every.numel(), dtype=torch.float16).view(-1, 32)
    keys.copy_(every)
    index = LargeIndex(32, 12_000, bytes_per_row=8)
    index.train(every[torch.randperm(12_000, generator=torch.Generator().manual_seed(0))])
    lines: list[str] = []
    index.add_all(every[:10_000].split(3000), lines.append)
    queries = clusters(100, 1)
    exact = torch.cdist(queries, every).topk(5, largest=False).indices
    index.search(queries, 5)
    index.add(every[10_000:])  # also after the first search
    found = index.search(queries, 5, visits=index.lists, candidates=200, keys=keys)
    assert (found.unsqueeze(2) == exact.unsqueeze(1)).any(1).double().mean() > 0.95
    near = torch.cdist(queries, every).gather(1, found)
    assert (near.diff(dim=1) > -0.02).all()
    assert len(index) == 12_000
    assert index.bytes < 12_000 * (8 + 8) + 100_000
    assert index.seconds > 0
    few = index.search(queries, 5, visits=2, keys=keys)
    assert few.shape == (100, 5)
    assert index.search(queries, 20_000, visits=1, keys=keys).min() == -1


def test_a_line_for_each_million(monkeypatch: pytest.MonkeyPatch) -> None:
    index = LargeIndex(8, 1000, bytes_per_row=4)
    monkeypatch.setattr(LargeIndex, "add", lambda self, keys: setattr(self, "_count", self._count + 600_000))
    lines: list[str] = []
    index.add_all([torch.zeros(1, 8)] * 4, lines.append)
    assert [line.split(" rows")[0] for line in lines] == ["1,200,000", "2,400,000"]
    assert all("MB" in line and " s" in line for line in lines)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="half the width"):
        LargeIndex(20, 1000, bytes_per_row=16)
    index = LargeIndex(32, 100_000)
    with pytest.raises(EmptyMemoryError, match="train"):
        index.add(torch.zeros(3, 32))
    with pytest.raises(ShapeError, match=r"\(n, 32\)"):
        index.add(torch.zeros(3, 31))
    with pytest.raises(ShapeError, match="40 lists"):
        index.train(torch.zeros(20, 32))


def test_searches_work_where_faiss_was_made_to_take_tensors() -> None:
    code = (
        "import torch, faiss, faiss.contrib.torch_utils\n"
        "from nnheads import large\n"
        "from nnheads.index import APPROXIMATE, build_index\n"
        "large.multiplies_bfloat16 = lambda device: True\n"
        "large._ROWS_A_LIST = 500\n"
        "x = torch.randn(6000, 32, generator=torch.Generator().manual_seed(0))\n"
        "large.LargeIndex(32, 6000, bytes_per_row=8).train(x)\n"
        "for engine in ('auto', 'faiss', *APPROXIMATE):\n"
        "    index = build_index(engine)\n"
        "    index.build(x)\n"
        "    for count in (1, 1, 40):\n"
        "        assert (index.search(x[:count], 1)[:, 0] == torch.arange(count)).all(), engine\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
