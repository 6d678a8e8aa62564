"""Approximate search: recall, rows that come and go, what is searched exactly, and copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nnheads import approximate
from nnheads.approximate import ApproximateIndex
from nnheads.errors import ConfigError, ShapeError, UnknownNameError
from nnheads.index import APPROXIMATE, build_index

pytest.importorskip("faiss")
kinds = pytest.mark.parametrize("kind", APPROXIMATE)


def clusters(rows: int, seed: int, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(50, width, generator=torch.Generator().manual_seed(9))
    return centers[torch.randint(0, 50, (rows,), generator=generator)] + torch.randn(rows, width, generator=generator)


def recall(index: ApproximateIndex, queries: Tensor, keys: Tensor, active: Tensor, k: int) -> float:
    distances = torch.cdist(queries, keys).masked_fill(~active, torch.inf)
    exact = distances.topk(k, largest=False).indices
    found = index.search(queries, k)
    assert active[found].all()
    assert all(len(set(row)) == k for row in found.tolist())
    near = distances.gather(1, found)
    assert (near.diff(dim=1) > -1e-3).all()  # ranked by exact distances
    return float((found.unsqueeze(2) == exact.unsqueeze(1)).any(1).double().mean())


@kinds
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_recall_and_rows_that_come_and_go(kind: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "_WAITING", 300)
    keys, queries = clusters(6500, 0), clusters(200, 1)
    if metric == "cosine":
        keys, queries = (torch.nn.functional.normalize(x) for x in (keys, queries))
    active = torch.arange(len(keys)) < 6000
    index = build_index(kind, metric, recall=0.9)  # type: ignore[arg-type]
    assert isinstance(index, ApproximateIndex)
    index.build(keys, active)
    assert recall(index, queries, keys, active, 10) > 0.85
    built = index._ann
    for first in range(6000, 6500, 100):  # the fourth hundred enters the index, the others wait
        active[first : first + 100] = True
        active[(first - 6000) * 2 : (first - 6000) * 2 + 200] = False
        keys[first - 1000 : first - 900] = clusters(100, first) if metric == "l2" else keys[first : first + 100]
        index.update(torch.cat([torch.arange(first, first + 100), torch.arange(first - 1000, first - 900)]))
        index.update(torch.arange((first - 6000) * 2, (first - 6000) * 2 + 200))
        if metric == "l2":
            assert recall(index, queries, keys, active, 10) > 0.85
        new = index.search(keys[first : first + 1], 1)
        assert torch.equal(keys[new.flatten()], keys[first : first + 1])
    assert index._ann is built
    active[:3000] = False
    index.update(torch.arange(3000))
    index.search(queries, 3)  # so few are left that all is searched exactly
    active[:2500] = True
    index.update(torch.arange(2500))
    index.search(queries, 3)
    assert index._ann is not built


@kinds
def test_what_cannot_be_approximated_is_exact(kind: str) -> None:
    keys, queries = clusters(6000, 0), clusters(20, 1)
    for metric, some in (("l1", keys), ("l2", keys[:100]), ("l2", keys.double())):
        index, exact = build_index(kind, metric), build_index("torch", metric)  # type: ignore[arg-type]
        index.build(some)
        exact.build(some)
        assert torch.equal(index.search(queries, 5), exact.search(queries, 5))


def test_more_neighbours_than_the_lists_hold_are_found() -> None:
    keys = clusters(5200, 0)
    index = ApproximateIndex(kind="ivf")
    index.effort = (1, 1.0)
    index.build(keys)
    assert all(len(set(row)) == 2000 for row in index.search(keys[:3], 2000).tolist())


def test_copies_are_unbuilt_and_mistakes_are_named() -> None:
    index = ApproximateIndex("cosine", "ivf", recall=0.8)
    index.build(clusters(5200, 0))
    index.search(clusters(2, 1), 3)
    other = copy.deepcopy(index)
    assert not other.built
    assert (other.metric, other.kind, other.recall) == ("cosine", "ivf", 0.8)
    assert isinstance(build_index("auto", exact=False), ApproximateIndex)
    with pytest.raises(UnknownNameError, match="did you mean 'hnsw'"):
        ApproximateIndex(kind="hnws")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="recall"):
        build_index("pq", recall=1.0)


@kinds
def test_rows_behind_hidden_ones_keep_their_numbers(kind: str) -> None:
    keys = clusters(6000, 0)
    active = torch.arange(len(keys)) % 50 != 7
    index = build_index(kind)  # type: ignore[arg-type]
    index.build(keys, active)
    assert torch.equal(index.search(keys[3000:3006], 1).flatten(), torch.arange(3000, 3006))
    assert active[index.search(keys[:200], 5)].all()


@kinds
def test_one_query_at_a_time_finds_what_all_at_once_do(kind: str) -> None:
    keys, queries = clusters(6000, 0), clusters(40, 1)
    index = build_index(kind)  # type: ignore[arg-type]
    index.build(keys)
    together = index.search(queries, 7)
    alone = torch.cat([index.search(query, 7) for query in queries.split(1)])
    assert (alone == together).double().mean() > 0.99  # ties
    strided = torch.stack([queries[0], queries[0]], 1)[:, :1].T
    assert torch.equal(index.search(strided, 7), alone[:1])
    assert torch.equal(index.search(queries[:1].double().requires_grad_(), 7), alone[:1])
    assert index.search(queries[:1], 6001)[0, -1] == -1
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ShapeError, match="NaN or infinity"):
            index.search(torch.full((1, 16), wrong), 7)
    with pytest.raises(ConfigError, match="at least 1"):
        index.search(queries[:1], 0)
    keys[5] = queries[0]
    index.update(torch.tensor([5]))
    assert index.search(queries[:1], 1).item() == 5
