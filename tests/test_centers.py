"""Adding and dropping centers against a slow, literal reading of Algorithm 1 and equations 10 to 13 in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nnheads.center_choice import best_predicted, log_probs_of, worst_predicted
from nnheads.centers import add_centers, drop_centers
from nnheads.errors import ConfigError, ShapeError
from nnheads.heads import Head, MemoryHead, build_head
from nnheads.heads.kernel_vote import KernelVoteHead

K, C, SIGMA = 5, 3, 1.3


def make_head(n: int = 40, seed: int = 0, name: str = "impostor", k: int = K) -> MemoryHead:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=generator)
    z = torch.randn(n, 4, generator=generator, dtype=torch.float64) + 0.4 * y.unsqueeze(1)
    head = build_head(name, 4, C, k=k, sigma=SIGMA).double().eval()
    assert isinstance(head, MemoryHead)
    head.memorize(z, y, ids=torch.arange(n) * 10)
    return head


def centers_of(head: MemoryHead) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    held = torch.arange(len(head.memory))
    values = head.memory.values_at(held)
    return {
        int(i): (head.memory.keys[r].numpy().copy(), values[r].numpy().copy())
        for r, i in enumerate(head.memory.ids[: len(head.memory)])
    }


# ---- the literal reading -------------------------------------------------------------------------------------------


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return math.exp(-float(((a - b) ** 2).sum()) / (2 * SIGMA**2))


def nearest(z: np.ndarray, centers: dict[int, tuple[np.ndarray, np.ndarray]]) -> list[int]:
    return sorted(centers, key=lambda i: float(((z - centers[i][0]) ** 2).sum()))[:K]


def predict(z: np.ndarray, centers: dict[int, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, float]:
    """Prediction at z (equation 9) and S, the sum of the kernels there."""
    near = nearest(z, centers)
    kernels = [kernel(z, centers[i][0]) for i in near]
    total = sum(kernels)
    return sum(k * centers[i][1] for k, i in zip(kernels, near, strict=True)) / total, total


def simplex(v: np.ndarray) -> np.ndarray:
    """Nearest distribution by bisection on the threshold, which is another way than the library's sort."""
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - (low + high) / 2, 0)


def literal_drop(centers: dict[int, tuple[np.ndarray, np.ndarray]], i0: int, form: str) -> None:
    z0, y0 = centers[i0]
    affected = [j for j in centers if j != i0 and i0 in nearest(centers[j][0], centers)]
    before = {j: predict(centers[j][0], centers) for j in affected}
    del centers[i0]
    change = {}
    for j in affected:
        prediction, total = before[j]
        if form == "influence":
            change[j] = -kernel(centers[j][0], z0) / total * (y0 - prediction)
        else:
            change[j] = predict(centers[j][0], centers)[0] - prediction
    for j in affected:
        centers[j] = (centers[j][0], simplex(centers[j][1] - change[j]))


def literal_add(
    centers: dict[int, tuple[np.ndarray, np.ndarray]], i0: int, z0: np.ndarray, y0: np.ndarray, form: str
) -> None:
    with_it = {**centers, i0: (z0, y0)}
    affected = [j for j in centers if i0 in nearest(centers[j][0], with_it)]
    change = {}
    for j in affected:
        prediction, total = predict(centers[j][0], centers)
        if form == "influence":
            change[j] = kernel(centers[j][0], z0) / total * (y0 - prediction)
        else:
            change[j] = predict(centers[j][0], with_it)[0] - prediction
    centers[i0] = (z0, y0)
    for j in affected:
        centers[j] = (centers[j][0], simplex(centers[j][1] - change[j]))


def assert_same(head: MemoryHead, expected: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
    actual = centers_of(head)
    assert actual.keys() == expected.keys()
    for i, (key, label) in expected.items():
        np.testing.assert_allclose(actual[i][0], key, atol=1e-12)
        np.testing.assert_allclose(actual[i][1], label, atol=1e-8)


def most_affecting(centers: dict[int, tuple[np.ndarray, np.ndarray]]) -> int:
    """The center that most others count among their neighbours."""
    return max(centers, key=lambda i: sum(i in nearest(centers[j][0], centers) for j in centers))


# ---- redistribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["influence", "exact"])
def test_dropping_follows_the_literal_reading(form: str) -> None:
    head = make_head()
    expected = centers_of(head)
    ids = torch.tensor([30, 310, 100, 110, 0])
    for i in ids.tolist():
        literal_drop(expected, i, form)
    drop_centers(head, ids, form)  # type: ignore[arg-type]
    assert_same(head, expected)
    assert any(0 < v < 1 for _, label in expected.values() for v in label), "no label was moved: the test is void"


@pytest.mark.parametrize("form", ["influence", "exact"])
def test_adding_follows_the_literal_reading(form: str) -> None:
    head = make_head()
    expected = centers_of(head)
    z, y = (
        torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) + 1,
        torch.tensor([0, 2, 1, 0]),
    )
    ids = torch.tensor([5, 6, 7, 8])
    for i, z0, y0 in zip(ids.tolist(), z.numpy(), np.eye(C)[y.numpy()], strict=True):
        literal_add(expected, i, z0, y0, form)
    add_centers(head, z, y, ids, form)  # type: ignore[arg-type]
    assert_same(head, expected)


def test_adding_by_influence_where_fewer_than_k_are_held() -> None:
    head = make_head(n=3)
    expected = centers_of(head)
    z, y = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([1, 2])
    z[1] += 0.5
    for i, z0, y0 in zip([1, 2], z.numpy(), np.eye(C)[y.numpy()], strict=True):
        literal_add(expected, i, z0, y0, "exact")
    add_centers(head, z, y, torch.tensor([1, 2]), "exact")
    assert_same(head, expected)


def test_least_squares_solves_the_ridge_problem() -> None:
    head = make_head()
    before = centers_of(head)
    dropped, ridge = most_affecting(before), 0.3
    expected = {i: (key, label.copy()) for i, (key, label) in before.items()}
    affected = [j for j in expected if j != dropped and dropped in nearest(expected[j][0], expected)]
    old = np.stack([predict(expected[j][0], expected)[0] for j in affected])
    del expected[dropped]
    delta = np.stack([predict(expected[j][0], expected)[0] for j in affected]) - old
    near = sorted({i for j in affected for i in nearest(expected[j][0], expected)})
    w = np.zeros((len(affected), len(near)))
    for r, j in enumerate(affected):
        _, total = predict(expected[j][0], expected)
        for i in nearest(expected[j][0], expected):
            w[r, near.index(i)] = kernel(expected[j][0], expected[i][0]) / total
    shift = -np.linalg.solve(w.T @ w + ridge * np.eye(len(near)), w.T @ delta)  # the primal form
    for i, d in zip(near, shift, strict=True):
        expected[i] = (expected[i][0], simplex(expected[i][1] + d))
    drop_centers(head, torch.tensor([dropped]), "least-squares", ridge=ridge)
    assert_same(head, expected)


def test_least_squares_without_ridge_keeps_predictions_where_labels_may_move_freely() -> None:
    """What the form is for: with soft labels inside the simplex the predictions at the affected points do not move."""
    head = make_head(n=60)
    held = len(head.memory)
    soft = torch.full((held, C), 1 / C, dtype=torch.float64) + 0.05 * (
        head.memory.values_at(torch.arange(held)) - 1 / C
    )
    head.memory.relabel(head.memory.ids[:held], soft)
    centers = centers_of(head)
    dropped = most_affecting(centers)
    affected = [j for j in centers if j != dropped and dropped in nearest(centers[j][0], centers)]
    points = torch.stack([torch.from_numpy(centers[j][0]) for j in affected])
    before = head(points).exp()
    drop_centers(head, torch.tensor([dropped]), "least-squares", ridge=1e-9)
    torch.testing.assert_close(head(points).exp(), before, atol=1e-5, rtol=0)


def test_none_moves_no_label() -> None:
    head = make_head()
    drop_centers(head, torch.tensor([100, 10]), "none")
    add_centers(head, torch.zeros(1, 4), torch.tensor([1]), redistribute="none")
    assert len(head.memory) == 39
    assert len(head.memory.soft) == 0


def test_the_new_center_keeps_its_label_and_labels_stay_distributions() -> None:
    head = make_head()
    ids = add_centers(head, torch.zeros(3, 4), torch.tensor([0, 1, 2]), redistribute="influence")
    values = head.memory.values_at(torch.arange(len(head.memory)))
    assert bool((values >= 0).all())
    torch.testing.assert_close(values.sum(1), torch.ones(len(values), dtype=torch.float64))
    last = head.memory.values_at(head.memory.rows_of(ids[-1:]))
    torch.testing.assert_close(last, torch.eye(C, dtype=torch.float64)[2:])


def test_weights_of_nngk_count() -> None:
    """With a weight of almost nothing a center has no influence, so dropping it moves no label."""
    head = make_head(name="nngk")
    row = head.memory.rows_of(torch.tensor([100]))
    head.memory.column("log_weight")[row] = -60.0
    drop_centers(head, torch.tensor([100]), "influence")
    values = head.memory.values_at(torch.arange(len(head.memory)))
    assert bool(((values - values.round()).abs() < 1e-9).all())


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_best_predicted_scores_each_center_without_itself() -> None:
    head = make_head()
    centers = centers_of(head)
    scores = {}
    for i, (key, label) in centers.items():
        others = {j: c for j, c in centers.items() if j != i}
        scores[i] = predict(key, others)[0][int(label.argmax())]
    expected = sorted(scores, key=lambda i: -scores[i])[:6]
    assert best_predicted(head, 6).tolist() == expected


def test_best_predicted_balanced_takes_from_the_largest_classes() -> None:
    head = make_head(n=60)
    y = torch.cat([torch.zeros(20), torch.ones(4), torch.full((10,), 2.0)]).long()
    head.memory.clear()
    head.memorize(torch.randn(34, 4, dtype=torch.float64), y, ids=torch.arange(34))
    head.memory.drop(best_predicted(head, 14, balanced=True))
    assert torch.bincount(head.memory.labels[: len(head.memory)]).tolist() == [8, 4, 8]


def test_worst_predicted_takes_the_lowest_and_leaves_the_head_alone() -> None:
    head = make_head()
    z = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 1
    y = torch.arange(30) % C
    scores = log_probs_of(head, z, y)
    assert worst_predicted(head, z, y, 5).tolist() == scores.argsort(stable=True)[:5].tolist()
    state = {k: v.clone() for k, v in head.state_dict().items()}
    worst_predicted(head, z, y, 6, rounds=3, balanced=True)
    for name, value in head.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_rounds_leave_width_and_codebooks_alone() -> None:
    """Enough are chosen to choose a width anew and to train codebooks anew, were they centers."""
    head = build_head("impostor", 16, 2, bytes_per_center=4).eval()
    draw = torch.Generator().manual_seed(0)
    head.memorize(torch.randn(300, 16, generator=draw), torch.arange(300) % 2, ids=torch.arange(300))
    head.refreshed()
    state = {k: v.clone() for k, v in head.state_dict().items()}
    z = 3 * torch.randn(1000, 16, generator=draw)
    assert len(worst_predicted(head, z, torch.full((1000,), 2), 400, rounds=3).unique()) == 400
    after = head.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, state[name]) for name, value in after.items())


def test_least_squares_without_ridge_where_centers_coincide() -> None:
    z = torch.randn(25, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1).double()
    head = build_head("impostor", 4, 2, k=8).double()
    head.memorize(z, torch.arange(50) % 2, ids=torch.arange(50))
    head.refreshed()
    drop_centers(head, torch.arange(20), "least-squares", 0.0)
    add_centers(head, z[:5], torch.zeros(5, dtype=torch.long), None, "least-squares", 0.0)
    assert isinstance(head, KernelVoteHead)
    labels = head.memory.values_at(torch.arange(35))
    assert torch.allclose(labels.sum(1), torch.ones(35).double())


def test_rounds_spread_the_choice_over_a_new_class() -> None:
    """Two far clusters of a new class: in one round ties are cut by position, in rounds both get their share."""
    head = make_head()
    z = torch.cat([torch.full((10, 4), 30.0), torch.full((10, 4), -30.0)]).double()
    z += 0.01 * torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    y = torch.full((20,), C)  # unknown to the head
    assert set((worst_predicted(head, z, y, 4) // 10).tolist()) == {0}
    assert set((worst_predicted(head, z, y, 4, rounds=4) // 10).tolist()) == {0, 1}


def test_balanced_choice_has_equal_shares() -> None:
    head = make_head()
    z = torch.randn(60, 4, dtype=torch.float64)
    y = torch.cat([torch.zeros(50), torch.ones(5), torch.full((5,), 2.0)]).long()
    chosen = worst_predicted(head, z, y, 12, rounds=3, balanced=True)
    assert torch.bincount(y[chosen]).tolist() == [4, 4, 4]
    assert len(chosen.unique()) == 12


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_mistakes_change_nothing() -> None:
    head = make_head()
    before = {k: v.clone() for k, v in head.state_dict().items()}
    with pytest.raises(ShapeError, match="no center with id 7"):
        drop_centers(head, torch.tensor([100, 7]), "influence")
    with pytest.raises(ShapeError, match="already"):
        add_centers(head, torch.zeros(1, 4), torch.tensor([0]), torch.tensor([100]))
    with pytest.raises(ConfigError, match="redistribute must be one of"):
        drop_centers(head, torch.tensor([100]), "influences")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 to 40"):
        best_predicted(head, 41)
    with pytest.raises(ShapeError):
        add_centers(head, torch.full((1, 4), math.nan), torch.tensor([0]), redistribute="exact")
    for wrong in ({"redistribute": "exakt"}, {"redistribute": "least-squares", "ridge": math.inf}):
        with pytest.raises(ConfigError, match="must be"):
            add_centers(head, torch.zeros(1, 4), torch.tensor([0]), **wrong)  # type: ignore[arg-type]
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name
    dense: Head = build_head("dense", 4, C)
    with pytest.raises(ConfigError, match="does not vote"):
        drop_centers(dense, torch.tensor([0]))
