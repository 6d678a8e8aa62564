"""Exact search by two stages and by bfloat16 with a proof, the cost model, and what the plan says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnheads import _exact, search_costs
from nnheads._exact import HalfKeys, group_size, products_nearest
from nnheads.index import ENGINES, AutoIndex, build_index
from nnheads.search_costs import CostModel, Plan, cost_model, engines_for

CPU = torch.device("cpu")


def clusters(rows: int, width: int, seed: int = 0) -> Tensor:
    """Positive, far from the origin, in clusters: as embeddings behind a ReLU are."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(20, width, generator=torch.Generator().manual_seed(9))
    noise = 0.3 * torch.randn(rows, width, generator=generator)
    return (centers[torch.randint(0, 20, (rows,), generator=generator)] + noise).relu() + 3


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize(("rows", "k"), [(5000, 1), (5000, 32), (4999, 7), (300, 300), (40, 3), (1, 1)])
def test_two_stages_find_what_one_finds(rows: int, k: int) -> None:
    keys, queries = clusters(rows, 16), clusters(20, 16, 1)
    offset = keys.square().sum(1)
    one = products_nearest(queries, keys, offset, k)
    two = products_nearest(queries, keys, offset, k, two_stages=True)
    near = distances(queries, keys)
    torch.testing.assert_close(near.gather(1, two), near.gather(1, one), rtol=1e-6, atol=1e-6)
    assert all(len(set(row)) == k for row in two.tolist())
    assert group_size(5000, 32) >= 8


@pytest.mark.parametrize(("rows", "k"), [(5000, 1), (5000, 32), (700, 700), (257, 5), (1, 1)])
@pytest.mark.parametrize("width", [3, 64])
def test_bfloat16_answers_are_those_of_float32(rows: int, k: int, width: int) -> None:
    keys, queries = clusters(rows, width), torch.cat([clusters(90, width, 1), 100 * torch.randn(10, width)])
    queries[:3] = keys[:1]  # at a key
    half = HalfKeys(keys, keys.square().sum(1), inner=False)
    near = distances(queries, keys)
    found = half.nearest(queries, k)
    assert all(len(set(row)) == k for row in found.tolist())
    torch.testing.assert_close(near.gather(1, found), near.sort(1).values[:, :k], rtol=1e-5, atol=2e-3)


def test_most_queries_among_embeddings_are_proved_and_the_rest_is_searched_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, queries = clusters(20_000, 64), clusters(500, 64, 1)
    half = HalfKeys(keys, keys.square().sum(1), inner=False)
    for _ in range(4):  # the margin of candidates grows where rows lie densely
        half.nearest(queries, 32)
    assert half.refused < 0.02
    assert half.bytes < 0.7 * keys.numel() * 4
    monkeypatch.setattr(_exact, "_WIDEST", 1)
    # two clusters so dense that bfloat16 sees two points: nothing can be proved, and it is still right
    generator = torch.Generator().manual_seed(2)
    same = torch.ones(3000, 64) * (10 * torch.arange(3000)[:, None] % 20) + 0.01 * torch.randn(
        3000, 64, generator=generator
    )
    half = HalfKeys(same, same.square().sum(1), inner=False)
    found = half.nearest(same[:40], 5)
    assert half.refused > 0
    near = distances(same[:40], same)
    torch.testing.assert_close(near.gather(1, found), near.sort(1).values[:, :5], rtol=1e-2, atol=0.02)


def test_outliers_do_not_spoil_the_bounds_of_the_others() -> None:
    keys, queries = clusters(5000, 32), clusters(100, 32, 1)
    keys[17] = 1e6
    half = HalfKeys(keys, keys.square().sum(1), inner=False)
    near = distances(queries, keys)
    torch.testing.assert_close(
        near.gather(1, half.nearest(queries, 8)), near.sort(1).values[:, :8], rtol=1e-4, atol=1e-3
    )


def test_the_copy_is_made_when_it_has_been_missed_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnheads.search_costs.multiplies_bfloat16", lambda device: True)
    index = build_index("auto")
    assert isinstance(index, AutoIndex)
    keys = clusters(20_000, 64)
    index.build(keys)
    assert index.explain_plan(500, 8).engine == "bfloat16"
    index.search(keys[:1], 1)
    assert index._half is None
    for _ in range(5):
        index.search(keys[:500], 8)
    assert index._half is not None
    index.update(torch.arange(10))
    assert index._half is not None
    index.build(keys)
    assert index._half is None
    assert index.prepare(500, 8).engine == "bfloat16"
    assert index._half is not None


def test_the_plan_says_what_and_why() -> None:
    index = build_index("auto")
    assert isinstance(index, AutoIndex)
    index.build(torch.randn(2000, 16))
    plan = index.explain_plan(1, 5)
    assert plan.engine == min(plan.seconds, key=plan.seconds.__getitem__)
    assert set(plan.seconds) == set(engines_for(CPU, 1, 16, 5))
    assert "default cost model" in str(plan)
    assert " ms" in str(plan)
    index.build(torch.randn(20, 4).double())
    assert "float64" in str(index.explain_plan(1, 1))


def test_costs_are_measured_once_kept_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "costs" / "search.json"
    monkeypatch.setenv("NNHEADS_SEARCH_COSTS", str(file))
    monkeypatch.setattr(search_costs, "_models", {})
    fits: list[str] = []

    def fit(device: torch.device) -> dict[str, list[float]]:
        fits.append(device.type)
        return {"torch": [1.0] * 7, "faiss-pairs": [2.0] * 7}

    monkeypatch.setattr(search_costs, "_fit", fit)
    monkeypatch.setattr(search_costs, "_spent", 0.0)
    assert cost_model(CPU).source == "default"
    assert not search_costs.spend(1.0, CPU)
    assert search_costs.spend(8.0, CPU)
    assert not search_costs.spend(50.0, CPU)
    assert fits == ["cpu"]
    assert cost_model(CPU).source == "measured"
    monkeypatch.setattr(search_costs, "_models", {})  # another process
    assert cost_model(CPU).seconds("torch", 1, 1, 1, 1) == 6
    assert [path.name for path in file.parent.iterdir()] == ["search.json"]
    file.write_text("{ not json")
    monkeypatch.setattr(search_costs, "_models", {})
    assert cost_model(CPU).source == "default"
    monkeypatch.setenv("NNHEADS_SEARCH_COSTS", "default")
    assert not search_costs.spend(50.0, CPU)
    assert json.loads(json.dumps(fits)) == ["cpu"]


def test_costs_that_cannot_be_kept_stop_no_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NNHEADS_SEARCH_COSTS", str(tmp_path / "file" / "search.json"))
    monkeypatch.setattr(search_costs, "_models", {})
    monkeypatch.setattr(search_costs, "_fit", lambda device: {"torch": [1.0] * 7})
    assert search_costs.fit_costs(CPU).source == "measured"
    assert "measured but not kept" in caplog.text


def test_a_fit_recovers_what_probes_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [1e-5, 1e-6, 1e-10, 2e-11, 1e-9, 1e-8, 3e-11]
    sizes = [(n, d, b, k) for n in (1000, 50_000) for d in (32, 512) for b in (1, 128) for k in (1, 32)]

    def probes(device: torch.device):  # type: ignore[no-untyped-def]
        for n, d, b, k in sizes:
            yield (
                n,
                d,
                b,
                k,
                "torch",
                lambda n=n, d=d, b=b, k=k: CostModel({"torch": truth}, "").seconds("torch", n, d, b, k),
            )

    monkeypatch.setattr(search_costs, "_probes", probes)
    monkeypatch.setattr(search_costs, "_best_of", lambda search, device: search())
    model = CostModel(search_costs._fit(CPU), "measured")
    for size in sizes:
        assert model.seconds("torch", *size) == pytest.approx(CostModel({"torch": truth}, "").seconds("torch", *size))


@pytest.mark.parametrize("width", [40, 70_000])
def test_the_smallest_of_sixteen_bits_are_found_in_any_width(width: int) -> None:
    values = torch.randint(-(2**15), 2**15, (3, width), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    for count in (1, 7, width):
        places, last = _exact._smallest(values, count)
        assert torch.equal(values.gather(1, places).sort(1).values, values.sort(1).values[:, :count])
        assert torch.equal(last, values.sort(1).values[:, count - 1])


def test_the_bits_of_bfloat16_are_brought_into_the_order_of_the_numbers() -> None:
    numbers = torch.tensor([-1e30, -2.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 2.0, 1e30], dtype=torch.bfloat16)
    bits = _exact._ordered(numbers.view(torch.int16))
    assert bits.tolist() == sorted(bits.tolist())
    assert torch.equal(_exact._ordered(bits).view(torch.bfloat16), numbers)


@pytest.mark.parametrize("batch", [1, 300])
def test_many_rows_at_a_query_are_told_apart(batch: int) -> None:
    keys = clusters(9000, 32)
    # more of them than candidates, and too near each other for bfloat16
    keys[::40] = keys[0] + 0.1 * torch.randn(225, 32, generator=torch.Generator().manual_seed(3))
    queries = torch.cat([keys[:1], clusters(batch - 1, 32, 1)])
    found = HalfKeys(keys, keys.square().sum(1), inner=False).nearest(queries, 8)
    near = distances(queries, keys)
    torch.testing.assert_close(near.gather(1, found), near.sort(1).values[:, :8], rtol=0, atol=1e-3)


@pytest.mark.parametrize("k", [1, 32])
def test_few_queries_near_many_rows_are_searched_twice(k: int) -> None:
    keys, queries = clusters(30_000, 16), clusters(600, 16, 1)
    half = HalfKeys(keys, keys.square().sum(1), inner=False)
    for _ in range(4):  # the first may find that it takes more candidates, and then nothing is counted yet
        half.nearest(queries, k)
    assert half.refused < 0.02


@pytest.mark.parametrize("hidden", [0, 40, 950])
@pytest.mark.parametrize("k", [1, 2, 12, 40])
def test_one_query_finds_what_a_sort_finds(k: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(k)
    keys, query = torch.randint(-2, 3, (1000, 3), generator=generator).float(), torch.randn(1, 3, generator=generator)
    offset = keys.square().sum(1)
    away = torch.randperm(1000, generator=generator)[:hidden]
    keys[away], offset[away] = torch.nan, torch.inf
    rows = _exact.SingleKeys(keys, offset).nearest(query, k)
    assert rows is not None
    assert rows.shape == (1, k)
    assert len(set(rows[0].tolist())) == k
    distances = (keys - query).square().sum(1).nan_to_num(torch.inf)
    torch.testing.assert_close(distances[rows[0]], distances.sort().values[:k])
    assert _exact.SingleKeys(keys, offset).nearest(torch.full((1, 3), torch.nan), k) is None


@pytest.mark.parametrize("batch", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_hidden_rows_may_hold_anything(metric: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(9000, 64, generator=generator), torch.randn(batch, 64, generator=generator)
    hidden = torch.randperm(9000, generator=generator)[:900]
    active = torch.ones(9000, dtype=torch.bool)
    active[hidden] = False
    plain = build_index("torch", metric)  # type: ignore[arg-type]
    plain.build(keys.clone(), active)
    expected = plain.search(queries, 3)
    keys[hidden[:300]], keys[hidden[300:600]] = torch.nan, torch.inf
    for name in ENGINES:
        index = build_index(name, metric)  # type: ignore[arg-type]
        index.build(keys, active)
        for _ in range(2):
            assert torch.equal(index.search(queries, 3), expected), name
    for planned in ("torch", "torch-groups", "bfloat16") if batch > 1 else ("gemv", "bfloat16"):
        auto = AutoIndex(metric)  # type: ignore[arg-type]
        auto.build(keys, active)
        auto._plans[batch, 3] = Plan(planned, {planned: 1.0}, "told so")
        auto._half = HalfKeys(auto._keys, auto._offset, metric == "cosine") if planned == "bfloat16" else None
        assert torch.equal(auto.search(queries, 3), expected), planned


def test_a_row_hidden_while_another_comes_is_not_found_by_single_queries() -> None:
    keys = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    active = torch.arange(300) < 299
    index = AutoIndex()
    index.build(keys, active)
    index._plans[1, 1] = Plan("faiss-pairs", {"faiss-pairs": 1.0}, "told so")
    for _ in range(2):
        assert index.search(keys[5:6], 1).item() == 5
    active[5], active[299] = False, True
    index.update(torch.tensor([5, 299]))
    index._plans[1, 1] = Plan("faiss-pairs", {"faiss-pairs": 1.0}, "told so")
    for _ in range(3):
        assert index.search(keys[5:6], 1).item() != 5
        assert index.search(keys[299:], 1).item() == 299


def test_a_cost_model_that_does_not_know_an_engine_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    index = AutoIndex()
    index.build(torch.randn(200, 8))
    monkeypatch.setattr(
        search_costs, "_models", {search_costs._key(CPU): CostModel({"bfloat16": [1.0] * 7}, "measured")}
    )
    assert index.explain_plan(1, 3).engine == "torch"
    assert index.search(torch.randn(1, 8), 3).shape == (1, 3)
    model = CostModel({"gemv": [1e-6] * 7}, "measured")
    monkeypatch.setattr(search_costs, "_models", {search_costs._key(CPU): model})
    assert index.explain_plan(1, 3).advantage == float("inf")


def test_more_neighbours_than_faiss_finds_on_a_gpu_are_not_its_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu(device: torch.device, *call: int) -> list[str]:
        return engines_for(torch.device("cuda"), *call)

    for name, answer in (("faiss_gpu_available", True), ("multiplies_bfloat16", False)):
        monkeypatch.setattr(search_costs, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr("nnheads.index.engines_for", on_a_gpu)
    model = CostModel({"torch": [1.0] * 7, "faiss-products": [1e-6] * 7}, "measured")
    monkeypatch.setattr("nnheads.index.cost_model", lambda device: model)
    index = AutoIndex()
    index.build(torch.randn(3000, 8))
    assert index.explain_plan(16, 2048).engine == "faiss-products"
    assert index.explain_plan(16, 2049).engine == "torch"
    index.build(torch.randn(100, 8))
    assert index.explain_plan(16, 2049).engine == "faiss-products"  # there are 100
