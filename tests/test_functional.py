"""Each equation against a literal float64 reading of the formula, in loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import nnheads.functional as f
from nnheads.heads import MemoryHead, build_head
from nnheads.heads.width import Width

B, N, D, C, K, S = 6, 40, 5, 4, 7, 0.875  # S is exact in float32


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, D), centers (N, D), labels (N,), weights (N,); float64."""
    g = torch.Generator().manual_seed(3)
    z, c = torch.randn(B, D, generator=g).double(), torch.randn(N, D, generator=g).double()
    return z, c, torch.randint(0, C, (N,), generator=g), torch.rand(N, generator=g).double() + 0.2


def kernel(z: Tensor, c: Tensor, s: float = S) -> float:
    """Equation 5."""
    return math.exp(-sum((float(a) - float(b)) ** 2 for a, b in zip(z, c, strict=True)) / (2 * s * s))


def nearest(z: Tensor, c: Tensor, k: int = K) -> list[int]:
    return sorted(range(len(c)), key=lambda i: -kernel(z, c[i]))[:k]


def filled(name: str, data: tuple[Tensor, Tensor, Tensor, Tensor], **options: object) -> MemoryHead:
    head = build_head(name, D, C, k=K, sigma=S, **options).double().eval()
    assert isinstance(head, MemoryHead)
    head.add(data[1], data[2], torch.arange(N))
    return head


@pytest.mark.parametrize("weighted", [True, False], ids=["nngk-eq7", "impostor-eq9"])
def test_kernel_vote(data: tuple[Tensor, Tensor, Tensor, Tensor], weighted: bool) -> None:
    z, c, y, w = data
    head = filled("nngk" if weighted else "impostor", data, floor=1e-30)
    if weighted:
        head.memory.column("log_weight")[:N] = w.log()
    expected = torch.zeros(B, C, dtype=torch.float64)
    for b in range(B):
        under = 0.0
        for i in nearest(z[b], c):
            share = (float(w[i]) if weighted else 1.0) * kernel(z[b], c[i])
            under += share
            expected[b, y[i]] += share
        expected[b] /= under
    torch.testing.assert_close(head(z).exp(), expected, rtol=1e-10, atol=1e-12)


def test_impostor_objective_eq8(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, c, y, _ = data
    head = filled("impostor", data, tie=0.3, floor=1e-30, auxiliary=0.0)
    labels, ids = y[:B], torch.arange(B)
    expected = 0.0
    for b in range(B):
        others = [i for i in range(N) if i != b]
        near = [others[i] for i in nearest(z[b], c[others])]
        total = sum(kernel(z[b], c[i]) for i in near)
        right = sum(kernel(z[b], c[i]) for i in near if y[i] == labels[b])
        expected -= math.log(right / total if right else 1e-30) / B
        expected += 0.3 / B * float((z[b] - c[b]).square().sum())
    assert head.loss(z, labels, ids=ids).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("k", [K, None], ids=["eq6", "eq4"])
def test_kernel_neuron(data: tuple[Tensor, Tensor, Tensor, Tensor], k: int | None) -> None:
    z, c, y, _ = data
    head = build_head("kernel", D, C, k=k, sigma=S).double().eval()
    assert isinstance(head, MemoryHead)
    head.add(c, y)
    alpha, bias = torch.randn(N, C).double(), torch.randn(C).double()
    head.memory.column("alpha")[:N] = alpha
    head.bias.data = bias
    logits = torch.stack(
        [sum((alpha[i] * kernel(q, c[i]) for i in nearest(q, c, k or N)), torch.zeros(C).double()) + bias for q in z]
    )
    torch.testing.assert_close(head(z), logits.log_softmax(1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", ["expected", "log"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
def test_nca(data: tuple[Tensor, Tensor, Tensor, Tensor], objective: str, distance: str) -> None:
    z = data[1][:9]
    y = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 0])  # class 3 has no partner and is left out
    values = []
    for i in range(9):
        d = [float((z[i] - z[j]).square().sum()) ** (0.5 if distance == "euclidean" else 1) for j in range(9)]
        e = [0.0 if i == j else math.exp(-d[j]) for j in range(9)]
        p = sum(e[j] for j in range(9) if y[j] == y[i]) / sum(e)
        if p > 0:
            values.append(math.log(p) if objective == "log" else p)
    expected = -np.mean(values) if objective == "log" else 1 - np.mean(values)
    assert f.nca_loss(z, y, objective, distance).item() == pytest.approx(expected, rel=1e-10)  # type: ignore[arg-type]
    soft = torch.nn.functional.one_hot(y).double()
    assert f.nca_loss(z, soft, objective, distance).item() == pytest.approx(expected, rel=1e-10)  # type: ignore[arg-type]


def test_nca_far_apart_has_a_gradient() -> None:
    z = torch.tensor([[0.0], [500.0], [1.0], [501.0]], requires_grad=True)  # each beside one of the other class
    loss = f.nca_loss(z, torch.tensor([0, 0, 1, 1]), "log")
    loss.backward()
    assert 400 < loss.item() < 600
    assert z.grad is not None
    assert z.grad.abs().max() > 0.1


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("vote", ["uniform", "distance"])
@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_scikit_learns(metric: str, vote: str, k: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, q = torch.randn(60, D, generator=g).double(), torch.randn(40, D, generator=g).double()
    y = torch.randint(0, C, (60,), generator=g)
    if metric != "cosine":
        q[:5] = x[:5]  # at distance zero
    theirs = KNeighborsClassifier(k, weights=vote, metric=metric, algorithm="brute").fit(x.numpy(), y.numpy())
    head = build_head("knn", D, C, k=k, metric=metric, vote=vote, smoothing=1e-9).double().eval()
    head.memorize(x, y)
    expected = torch.from_numpy(theirs.predict_proba(q.numpy()))
    torch.testing.assert_close(head(q).exp(), expected, rtol=1e-7, atol=1e-8)
    assert torch.equal(head(q).argmax(1), torch.from_numpy(theirs.predict(q.numpy())))


def test_smoothing() -> None:
    head = build_head("knn", 1, 4, k=3, smoothing=2.0).eval()
    head.memorize(torch.tensor([[0.0], [0.1], [0.2]]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(head(torch.zeros(1, 1)).exp()[0], torch.tensor([2.5, 1.5, 0.5, 0.5]) / 5)


def vote(y: Tensor, k: Tensor) -> Tensor:
    return (k.unsqueeze(-1) * y).sum(0) / k.sum()


def test_influence_is_the_derivative_of_eq11() -> None:
    k, y = torch.rand(K).double(), torch.softmax(torch.randn(K, C), 1).double()
    k0, y0 = torch.tensor(0.3).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()

    def prediction(eps: Tensor) -> Tensor:
        return ((k.unsqueeze(-1) * y).sum(0) + eps * y0 * k0) / (k.sum() + eps * k0)

    zero = torch.zeros((), dtype=torch.float64)
    derivative = torch.autograd.functional.jacobian(prediction, zero)
    eq12 = (y0 * k0 * k.sum() - k0 * (k.unsqueeze(-1) * y).sum(0)) / k.sum() ** 2
    ours = f.influence(k0[None], k.sum()[None], y0, vote(y, k)[None])[0]
    torch.testing.assert_close(ours, derivative, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours, eq12, rtol=1e-12, atol=1e-14)
    added = f.influence_of_adding(k0[None], k.sum()[None], y0, vote(y, k)[None])[0]
    torch.testing.assert_close(added, prediction(zero + 1) - prediction(zero), rtol=1e-12, atol=1e-12)
    dropped = f.influence_of_dropping(k[:1], k.sum()[None], y[0], vote(y, k)[None])[0]
    torch.testing.assert_close(dropped, vote(y[1:], k[1:]) - vote(y, k), rtol=1e-12, atol=1e-12)
    alone = f.influence_of_dropping(k[:1], k[:1], y[0], y[:1])
    assert torch.equal(alone, torch.zeros_like(alone))


def test_kernel_shares_where_the_ratio_underflows() -> None:
    log_w = f.kernel_log_weights(torch.tensor([[4000.0, 4002.0, 9e9]]), 1.0)
    torch.testing.assert_close(log_w.exp()[0, :2], torch.tensor([1.0, math.exp(-1)]) / (1 + math.exp(-1)))


def test_floor_bounds_the_loss_and_leaves_the_gradient() -> None:
    sq = torch.tensor([[0.0, 200.0]], requires_grad=True)
    log_p = f.class_log_probs(f.kernel_log_weights(sq, 1.0), torch.eye(3)[:2].unsqueeze(0), 1e-3)
    torch.testing.assert_close(log_p.exp()[0, 1:], torch.full((2,), 1e-3 / 1.002))
    (-log_p[0, 1]).backward()
    assert sq.grad is not None
    assert sq.grad[0, 1].item() == pytest.approx(0.5, rel=0.01)


def test_auto_sigma_makes_the_farthest_weigh_the_ratio() -> None:
    sq = torch.rand(101, K).sort(1).values * 9
    sigma = f.auto_sigma(sq, 0.05)
    weights = ((sq[:, 0] - sq[:, -1]) / (2 * sigma**2)).exp()
    assert weights.median().item() == pytest.approx(0.05, rel=1e-4)
    assert f.auto_sigma(torch.full((4, 3), 2.25)).item() > 0
    assert f.auto_sigma(torch.zeros(4, 3)).item() == 1


@pytest.mark.parametrize("rule", [f.auto_sigma, f.nearest_sigma])
def test_an_automatic_width_leaves_rows_of_nan_out(rule: Callable[[Tensor], Tensor]) -> None:
    sq = torch.rand(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    holes = torch.full((5, 4), math.nan, dtype=torch.float64)
    assert rule(torch.cat([holes[:2], sq, holes[2:]])).item() == rule(sq).item()
    assert rule(torch.cat([holes, torch.zeros(3, 4, dtype=torch.float64)])).item() == 1
    assert rule(holes).isnan()


def test_a_width_follows_full_rows_alone() -> None:
    sq = torch.tensor([[1.0, 4.0], [0.0, 100.0], [1.0, 4.0]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    width = Width("impostor", "auto")
    width.follow(sq[1:2], valid[1:2])
    assert width.value.isnan()
    width.follow(sq, valid)
    assert width.value.item() == f.auto_sigma(sq[:1]).item()
    width.follow(4 * sq, valid, momentum=0.5)
    assert width.value.item() == pytest.approx(1.5 * f.auto_sigma(sq[:1]).item())
    before = width.value.clone()
    width.follow(sq[1:2], valid[1:2])
    assert torch.equal(width.value, before)


def test_projection_to_the_simplex() -> None:
    rows = torch.randn(12, C).double() * 2
    for row, ours in zip(rows, f.project_to_simplex(rows), strict=True):
        best = minimize(
            lambda p, row=row: float(((p - row.numpy()) ** 2).sum()),
            np.full(C, 1 / C),
            bounds=[(0, 1)] * C,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(ours.numpy(), best.x, atol=1e-5)
        assert ours.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_neighbor_distances(metric: str, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, c = data[0], data[1][:12].view(B, 2, D)
    for b in range(B):
        for i in range(2):
            q, p = z[b], c[b, i]
            expected = {
                "l1": (q - p).abs().sum(),
                "l2": (q - p).norm(),
                "cosine": 1 - q @ p / (q.norm() * p.norm()),
            }[metric]
            ours = f.neighbor_distances(z, c, metric)[b, i]  # type: ignore[arg-type]
            torch.testing.assert_close(ours, expected)
    same = z.clone().requires_grad_()
    f.neighbor_distances(same, z.unsqueeze(1), metric).sum().backward()  # type: ignore[arg-type]
    assert bool(torch.isfinite(same.grad).all())  # type: ignore[arg-type]


def test_squared_distances_may_overwrite_a_copy(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, c = data[0].clone().requires_grad_(), data[1][: 2 * B].view(B, 2, D)
    expected = (z.unsqueeze(1) - c).square().sum(-1)
    (wanted,) = torch.autograd.grad(expected.square().sum(), z)
    copy = c.clone()
    ours = f.squared_distances(z, copy, overwrite=True)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), z)[0], wanted)
    assert not torch.equal(copy, c)
    for narrow, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        mixed = f.squared_distances(z.detach().to(narrow), c.to(wide, copy=True), overwrite=True)
        exact = (z.detach().to(narrow).to(wide).unsqueeze(1) - c.to(wide)).square().sum(-1)
        torch.testing.assert_close(mixed, exact)
        assert f.squared_distances(z.detach().to(wide), c.to(narrow), overwrite=True).dtype == wide
    learned = c.clone().requires_grad_()  # it has a gradient to come back to: left as it is
    f.squared_distances(z, learned, overwrite=True).sum().backward()
    assert torch.equal(learned, c)
    torch.testing.assert_close(learned.grad, 2 * (c - z.detach().unsqueeze(1)))


def test_gradients(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    z, c, y, _ = data
    z = z[:3].clone().requires_grad_()
    centers = c[: 3 * K].view(3, K, D).clone().requires_grad_()
    sigma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    values = torch.nn.functional.one_hot(y[: 3 * K], C).double().view(3, K, C)

    def out(z: Tensor, centers: Tensor, sigma: Tensor) -> Tensor:
        return f.class_log_probs(f.kernel_log_weights(f.squared_distances(z, centers), sigma), values, 1e-30)

    assert torch.autograd.gradcheck(out, (z, centers, sigma))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for distance in ("euclidean", "sqeuclidean"):
        for objective in ("expected", "log"):
            batch = c[:6].clone().requires_grad_()
            assert torch.autograd.gradcheck(lambda b, o=objective, d=distance: f.nca_loss(b, labels, o, d), (batch,))


def test_half_precision_is_answered_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    squared, valid = torch.rand(B, K, generator=g).half(), torch.rand(B, K, generator=g) > 0.2
    values = torch.eye(C)[torch.randint(0, C, (B, K), generator=g)]
    weights = f.kernel_log_weights(squared, S, valid)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, f.kernel_log_weights(squared.float(), S, valid))
    for vote in ("uniform", "distance", "gaussian"):
        made = f.vote_log_weights(squared, valid, vote)
        assert torch.equal(made, f.vote_log_weights(squared.float(), valid, vote))
    answer = f.class_log_probs(weights.clamp_min(-100).half(), values.half())
    torch.testing.assert_close(answer, f.class_log_probs(weights, values), atol=0.02, rtol=0.01)
