"""Neighbour search on a CUDA device: both engines against the CPU's float64 brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnheads.errors import ConfigError, ShapeError
from nnheads.index import METRICS, Metric, build_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
metrics = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(params=["auto", "torch", "faiss"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "faiss":
        faiss = pytest.importorskip("faiss")
        if faiss.get_num_gpus() == 0:
            pytest.skip("this FAISS build sees no GPU")
    return str(request.param)


def nearest(queries: Tensor, keys: Tensor, active: Tensor, metric: Metric, k: int) -> Tensor:
    q, c = queries.double().cpu(), keys.double().cpu()
    if metric == "cosine":
        q, c = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(c, dim=1)
    distances = torch.cdist(q, c, p=1.0 if metric == "l1" else 2.0, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.masked_fill(~active.cpu(), torch.inf).topk(k, largest=False).indices


@metrics
def test_search_is_exact_with_hidden_and_changed_rows(engine: str, metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3000, 40, generator=generator).cuda()
    queries = torch.randn(70, 40, generator=generator).cuda()
    active = torch.ones(3000, dtype=torch.bool, device="cuda")
    index = build_index(engine, metric)  # type: ignore[arg-type]
    index.build(keys, active)
    for step in range(3):
        rows = index.search(queries, 10)
        assert rows.device == queries.device
        same = rows.cpu() == nearest(queries, keys, active, metric, 10)
        assert same.float().mean() > 0.995  # a near-tie may fall either way in float32
        changed = torch.arange(step * 50, step * 50 + 100, device="cuda")
        keys[changed] = torch.randn(100, 40, device="cuda")
        active[changed[::2]] = False
        index.update(changed)


def test_runs_on_the_current_stream(engine: str) -> None:
    index = build_index(engine)  # type: ignore[arg-type]
    keys = torch.randn(20_000, 128, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        index.build(keys)
        big = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            big = big @ big / 4096  # the queries below are written after this work
        queries = keys[:500] + 0 * big[0, 0].nan_to_num()
        rows = index.search(queries, 1)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(rows.flatten(), torch.arange(500, device="cuda"))


def test_queries_from_the_host_and_more_neighbours_than_rows(engine: str) -> None:
    keys = torch.randn(5, 3)
    index = build_index(engine)  # type: ignore[arg-type]
    index.build(keys.cuda())
    rows = index.search(keys, 7)
    assert rows.device.type == "cpu"
    assert rows[:, 0].tolist() == list(range(5))
    assert (rows[:, 5:] == -1).all()
    with pytest.raises(ShapeError, match="3 wide"):
        index.search(keys[:, :2].cuda(), 1)


def test_faiss_names_its_limit_of_neighbours(engine: str) -> None:
    index = build_index(engine)  # type: ignore[arg-type]
    index.build(torch.randn(3000, 4, device="cuda"))
    if engine != "faiss":
        assert index.search(torch.randn(2, 4, device="cuda"), 2500).shape == (2, 2500)
        return
    with pytest.raises(ConfigError, match="2048"):
        index.search(torch.randn(2, 4, device="cuda"), 2500)
