"""Neighbour search: every engine against float64 brute force, and what an owner of an index relies on."""

from __future__ import annotations

import copy
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import nnheads.index as index_module
from nnheads import _exact
from nnheads._exact import HalfKeys
from nnheads._faiss import faiss_available
from nnheads.errors import ConfigError, EmptyMemoryError, ShapeError, UnknownNameError
from nnheads.index import (
    APPROXIMATE,
    ENGINES,
    METRICS,
    AutoIndex,
    Engine,
    Index,
    Metric,
    Plan,
    build_index,
    unit_rows,
)

engines = pytest.mark.parametrize("engine", ENGINES)
metrics = pytest.mark.parametrize("metric", METRICS)


def brute(queries: Tensor, keys: Tensor, metric: Metric) -> Tensor:
    """(B, N) float64 distances, by the definition."""
    q, c = queries.double(), keys.double()
    if metric == "cosine":
        q, c = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(c, dim=1)
        return 1 - q @ c.T
    difference = q[:, None] - c[None]
    return difference.abs().sum(2) if metric == "l1" else difference.square().sum(2)


def check(index: Index, queries: Tensor, keys: Tensor, active: Tensor | None, k: int) -> None:
    """Distances of the rows found are the k smallest, in order; rows are distinct and active; the rest is -1."""
    rows = index.search(queries, k)
    assert rows.shape == (len(queries), k)
    assert rows.dtype == torch.int64
    mask = torch.ones(len(keys), dtype=torch.bool) if active is None else active
    found = min(k, int(mask.sum()))
    assert (rows[:, found:] == -1).all()
    if not found or not len(queries):
        return
    rows = rows[:, :found]
    assert mask[rows].all()
    assert all(len(set(row)) == found for row in rows.tolist())
    distances = brute(queries, keys, index.metric)
    expected = distances.masked_fill(~mask, torch.inf).sort(1).values[:, :found]
    # float32 rounding of |q|^2 + |c|^2, the documented precision
    squares = [part.double().square().sum(1).max().item() for part in (queries, keys[mask])]
    size = 1.0 if index.metric == "cosine" else sum(squares)
    torch.testing.assert_close(distances.gather(1, rows), expected, rtol=1e-5, atol=1e-6 * size + 1e-6)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, int]:
    n, d, b = draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(0, 25))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    # few distinct values: duplicates and ties are common
    keys = torch.randint(-3, 4, (n, d), generator=generator).float() * draw(st.sampled_from([0.01, 1.0, 300.0]))
    queries = torch.randn(b, d, generator=generator)
    share = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    active = None if share is None else torch.rand(n, generator=generator) < share
    return keys, queries, active, draw(st.integers(1, 50))


@engines
@metrics
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_search_is_exact(engine: str, metric: Metric, problem: tuple[Tensor, Tensor, Tensor | None, int]) -> None:
    keys, queries, active, k = problem
    index = build_index(engine, metric)  # type: ignore[arg-type]
    index.build(keys, active)
    check(index, queries, keys, active, k)


@engines
@metrics
@settings(max_examples=20, deadline=None)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_rows_changed_in_place_are_found_after_update(
    engine: str, metric: Metric, problem: tuple[Tensor, Tensor, Tensor | None, int], seed: int
) -> None:
    keys, queries, active, k = problem
    active = torch.ones(len(keys), dtype=torch.bool) if active is None else active
    index = build_index(engine, metric)  # type: ignore[arg-type]
    index.build(keys, active)
    index.search(queries, k)  # whatever is prepared lazily is prepared now
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(keys), (5,), generator=generator)
    keys[rows] = torch.randn(5, keys.shape[1], generator=generator)
    active[rows] = torch.rand(5, generator=generator) < 0.5
    index.update(rows)
    check(index, queries, keys, active, k)


@engines
@metrics
def test_realistic_sizes_with_hidden_rows(engine: str, metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(700, 33, generator=generator).relu()
    queries = torch.randn(65, 33, generator=generator).relu()
    active = torch.rand(700, generator=generator) < 0.8
    for mask in (None, active):
        index = build_index(engine, metric)  # type: ignore[arg-type]
        index.build(keys, mask)
        for batch in (queries[:1], queries):
            check(index, batch, keys, mask, 32)


@engines
@metrics
def test_equal_to_scikit_learn(engine: str, metric: Metric) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(500, 24, generator=generator), torch.randn(40, 24, generator=generator)
    index = build_index(engine, metric)  # type: ignore[arg-type]
    index.build(keys)
    peer = NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(keys.double().numpy())
    expected = peer.kneighbors(queries.double().numpy(), return_distance=False)
    np.testing.assert_array_equal(index.search(queries, 7).numpy(), expected)


def test_chunks_agree_with_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = torch.randn(300, 8), torch.randn(50, 8)
    for metric in METRICS:
        index = build_index("torch", metric)
        index.build(keys)
        whole = index.search(queries, 5)
        with monkeypatch.context() as patch:
            patch.setattr(_exact, "CHUNK_BYTES", 7 * 300 * 4)
            assert torch.equal(index.search(queries, 5), whole)


def test_float64_keys_are_searched_in_float64() -> None:
    keys = 1e4 + torch.arange(8, dtype=torch.float64)[:, None] * 1e-3  # float32 cannot tell these rows apart
    for engine in ("auto", "torch"):
        index = build_index(engine)
        index.build(keys)
        assert index.search(keys, 1).flatten().tolist() == list(range(8))
    with pytest.raises(ShapeError, match="float32"):
        build_index("faiss").build(keys)


@engines
def test_non_contiguous_tensors_and_autocast(engine: str) -> None:
    generator = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(2, 16, 90, generator=generator)[1].T, torch.randn(16, 60, generator=generator).T[::2]
    index = build_index(engine)  # type: ignore[arg-type]
    index.build(keys)
    check(index, queries, keys, None, 6)
    with torch.autocast("cpu", torch.bfloat16):
        check(index, queries, keys, None, 6)
    check(index, queries.bfloat16(), keys, None, 6)


@pytest.mark.parametrize("engine", [*ENGINES, *APPROXIMATE])
@metrics
def test_an_index_grows_with_its_keys(engine: str, metric: Metric) -> None:
    generator = torch.Generator().manual_seed(5)
    keys, queries = torch.randn(6000, 8, generator=generator), torch.randn(40, 8, generator=generator)
    index = build_index(engine, metric)  # type: ignore[arg-type]
    index.build(keys[:5500].clone(), torch.arange(5500) < 5400)
    if isinstance(index, AutoIndex):
        index.prepare(40, 3)
        index._half = HalfKeys(index._keys, index._offset, metric == "cosine") if metric != "l1" else None
    index.search(queries, 3)
    active = torch.arange(6000) < 5900
    index.grow(keys, active)
    index.update(torch.arange(5400, 5900))
    if engine in ENGINES:
        check(index, queries, keys, active, 3)
        if isinstance(index, AutoIndex) and index._half is not None:
            torch.testing.assert_close(index._half.nearest(unit_rows(queries), 3), index.search(unit_rows(queries), 3))
    found = index.search(keys[5400:5900] * 1.0001, 1)
    assert (found.flatten() == torch.arange(5400, 5900)).double().mean() > 0.97
    with pytest.raises(ShapeError, match="continue"):
        index.grow(keys[:100])


@engines
def test_keys_are_read_by_reference(engine: str) -> None:
    keys = torch.nn.Parameter(torch.randn(20, 4))
    index = build_index(engine)  # type: ignore[arg-type]
    index.build(keys)
    with torch.no_grad():
        keys[3] = 100.0
    index.update(torch.tensor([3, 3]))
    assert index.search(torch.full((1, 4), 99.0), 1).item() == 3
    assert not index.search(keys, 2).requires_grad


@engines
def test_hidden_rows_may_hold_anything(engine: str) -> None:
    keys = torch.randn(30, 4)
    active = torch.ones(30, dtype=torch.bool)
    active[4], keys[4] = False, torch.nan
    index = build_index(engine)  # type: ignore[arg-type]
    index.build(keys, active)
    check(index, torch.randn(25, 4), keys.nan_to_num(), active, 30)


@engines
def test_no_rows_and_an_empty_batch(engine: str) -> None:
    index = build_index(engine)  # type: ignore[arg-type]
    index.build(torch.empty(0, 3))
    assert index.search(torch.zeros(2, 3), 4).tolist() == [[-1] * 4] * 2
    index.build(torch.randn(5, 3))
    assert index.search(torch.empty(0, 3), 4).shape == (0, 4)


@engines
@metrics
def test_a_copy_or_pickle_is_unbuilt(engine: str, metric: Metric) -> None:
    index = build_index(engine, metric)  # type: ignore[arg-type]
    keys = torch.randn(2000, 64)
    index.build(keys)
    index.search(keys[:40], 3)
    assert index.built
    assert len(pickle.dumps(index)) < 500
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert type(other) is type(index)
        assert not other.built
        with pytest.raises(EmptyMemoryError, match="build"):
            other.search(keys, 1)
        other.build(keys)
        assert other.metric == metric
        assert other.search(keys[:9], 1).flatten().tolist() == list(range(9))


@engines
def test_mistakes_are_named(engine: str) -> None:
    index = build_index(engine)  # type: ignore[arg-type]
    for act in (lambda: index.search(torch.zeros(1, 4), 1), lambda: index.update(torch.tensor([0]))):
        with pytest.raises(EmptyMemoryError, match="build"):
            act()
    keys = torch.randn(10, 4)
    index.build(keys)
    with pytest.raises(ShapeError, match="4 wide"):
        index.search(torch.zeros(2, 5), 1)
    with pytest.raises(ShapeError, match="NaN"):
        index.search(torch.full((2, 4), torch.nan), 1)
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        index.search(keys, 0)
    with pytest.raises(ShapeError, match=r"0\.\.9"):
        index.update(torch.tensor([10]))
    with pytest.raises(ShapeError, match="active"):
        index.build(keys, torch.ones(9, dtype=torch.bool))
    for wrong in (torch.zeros(4), keys.half(), keys.long()):
        with pytest.raises(ShapeError):
            index.build(wrong)
    with pytest.raises(ShapeError, match="row 2 "):
        index.build(torch.where(torch.arange(10)[:, None] == 2, torch.nan, keys))
    assert index.search(keys, 1).flatten().tolist() == list(range(10))  # a refused build changes nothing
    keys[7] = torch.inf
    with pytest.raises(ShapeError, match="row 7 "):
        index.update(torch.tensor([1, 7]))


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'torch'"):
        build_index("trch")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="cosine"):
        build_index("auto", "euclid")  # type: ignore[arg-type]


def test_without_faiss(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    faiss_available.cache_clear()
    with pytest.raises(ConfigError, match="faiss-cpu"):
        build_index("faiss")
    index = build_index("auto")
    assert isinstance(index, AutoIndex)
    keys = torch.randn(2000, 8)
    index.build(keys)
    with caplog.at_level(logging.WARNING):
        check(index, keys[:300], keys, None, 3)
        check(index, keys[:300], keys, None, 3)
        assert "faiss" not in str(index.explain_plan(300, 3))
    assert len(caplog.records) == 1
    monkeypatch.undo()
    faiss_available.cache_clear()


@pytest.mark.parametrize("planned", ["gemv", "torch", "torch-groups", "bfloat16", "faiss-pairs", "faiss-products"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_auto_does_what_its_plan_says(planned: str, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"torch": 1.0, "torch-groups": 1.0, planned: 0.5}
    monkeypatch.setattr(AutoIndex, "explain_plan", lambda *_: Plan(planned, seconds, "told so"))
    monkeypatch.setattr(index_module, "spend", lambda *_: False)
    generator = torch.Generator().manual_seed(3)
    count = 1 if planned == "gemv" else 30
    keys, queries = torch.randn(700, 12, generator=generator), torch.randn(count, 12, generator=generator)
    active = torch.ones(700, dtype=torch.bool)
    active[::3] = False
    index = build_index("auto", metric)
    index.build(keys, active)
    check(index, queries, keys, active, 9)
    changed = torch.arange(0, 90)
    keys[changed], active[changed] = torch.randn(90, 12, generator=generator) + 1, True
    active[600:] = False
    index.update(torch.cat([changed, torch.arange(600, 700)]))
    check(index, queries, keys, active, 9)
    keys += 0.1
    index.update(torch.arange(700))
    check(index, queries, keys, active, 9)


@pytest.mark.parametrize("k", [1, 5])
def test_single_queries_find_the_same_again_and_after_changes(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("gemv", {"gemv": 0.5, "torch": 1.0}, "told so")
    monkeypatch.setattr(AutoIndex, "explain_plan", lambda *_: plan)
    monkeypatch.setattr(index_module, "spend", lambda *_: False)
    generator = torch.Generator().manual_seed(3)
    keys, query = torch.randn(900, 8, generator=generator), torch.randn(1, 8, generator=generator)
    active = torch.ones(900, dtype=torch.bool)
    active[7] = False
    keys[7] = torch.nan
    index = build_index("auto")
    index.build(keys, active)
    for _ in range(3):
        check(index, query, keys.nan_to_num(), active, k)
        check(index, query.double().requires_grad_(), keys.nan_to_num(), active, k)
    keys[:50] = query + 0.01 * torch.arange(50)[:, None]
    index.update(torch.arange(7))
    index.update(torch.arange(8, 50))
    keys[7] = torch.inf
    check(index, query, keys.nan_to_num(), active, k)
    longer, more = torch.cat([keys, query + 1e-3]), torch.cat([active, torch.tensor([True])])
    index.grow(longer, more)
    index.update(torch.tensor([900]))
    for _ in range(2):
        check(index, query, longer.nan_to_num(), more, k)
        assert index.search(query, 1000)[0, 900:].eq(-1).all()
    check(index, 1e25 * query, longer.nan_to_num(), more, 1)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ShapeError, match="NaN or infinity"):
            index.search(torch.full((1, 8), wrong), k)
    with pytest.raises(ShapeError, match="8 wide"):
        index.search(query[:, :5], k)
    with pytest.raises(ConfigError, match="at least 1"):
        index.search(query, 0)


@pytest.mark.parametrize("batch", [1, 4, 64])
@engines
def test_queries_so_far_that_squares_overflow_find_rows(engine: Engine, batch: int) -> None:
    keys = torch.randn(9000, 16, generator=torch.Generator().manual_seed(0))
    queries = 1e25 * torch.randn(batch, 16, generator=torch.Generator().manual_seed(1))
    active = torch.ones(9000, dtype=torch.bool)
    expected = -(queries.double() @ keys.double().T)
    for hidden in (None, 7):
        if hidden is not None:
            active[hidden], expected[:, hidden] = False, torch.inf
        index = build_index(engine)
        index.build(keys, active)
        for _ in range(2):
            found = index.search(queries, 3)
            assert torch.equal(found, expected.topk(3, largest=False).indices)
