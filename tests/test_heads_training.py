"""How heads train: own centers, what moves, what stays, and that ordinary loops learn real digits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nnheads.heads import MemoryHead, build_head

D, C, N = 4, 3, 12


def make(name: str, **options: Any) -> tuple[MemoryHead, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = build_head(name, D, C, **options)
    assert isinstance(head, MemoryHead)
    z, y, ids = torch.randn(N, D), torch.arange(N) % C, torch.arange(N) + 100
    head.begin_refresh(replace=True)
    head.memorize(z, y, ids=ids)
    head.refreshed()
    return head.train(), z, y, ids


@pytest.mark.parametrize("name", ["knn", "nca", "nngk", "impostor", "kernel"])
def test_own_centers_are_left_out(name: str) -> None:
    head, z, _, ids = make(name, k=3)
    assert (head.neighbors(z, ids=ids).ids != ids.unsqueeze(1)).all()
    pairs = torch.stack([ids, ids.roll(1)], 1)
    found = head.neighbors(z, ids=pairs).ids
    assert not (found.unsqueeze(-1) == pairs.unsqueeze(1)).any()
    assert (found >= 0).all()  # three others fill the slots
    assert (head.eval().neighbors(z).ids[:, 0] == ids).all()


@pytest.mark.parametrize(("name", "options"), [("nngk", {}), ("impostor", {"centers": "tied"})])
def test_leaving_out_is_as_if_it_were_not_stored(name: str, options: dict[str, Any]) -> None:
    head, z, y, ids = make(name, k=3, sigma=1.0, **options)
    with_ids = head(z, ids=ids)
    for i in range(N):
        other, *_ = make(name, k=3, sigma=1.0, **options)
        other.drop(ids[i : i + 1])
        torch.testing.assert_close(with_ids[i], other.eval()(z[i : i + 1])[0])
    assert len(y) == N


@pytest.mark.parametrize(
    ("name", "options", "follows"),
    [
        ("nngk", {}, True),
        ("nngk", {"track": False}, False),
        ("impostor", {"centers": "tied"}, True),
        ("impostor", {"centers": "fixed"}, False),
        ("impostor", {"centers": "loose"}, False),
    ],
)
def test_tracking(name: str, options: dict[str, Any], follows: bool) -> None:
    head, z, _, ids = make(name, k=3, **options)
    moved = z + 0.1
    head(moved[:5], ids=ids[:5])
    rows = head.memory.rows_of(ids)
    expected = torch.cat([moved[:5], z[5:]]) if follows else z
    torch.testing.assert_close(head.memory.keys[rows], expected)
    head.eval()(moved, ids=ids)
    torch.testing.assert_close(head.memory.keys[rows], expected)


def test_of_a_sample_that_comes_twice_the_first_is_tracked() -> None:
    head, z, y, ids = make("nngk", k=5)
    head.train()
    moved = z + 1
    order = torch.tensor([3, 5, 3, 3, 5])
    head.loss(torch.cat([moved[order[:2]], moved[order[2:]] + 7]), y[order], ids=ids[order])
    expected = z.clone()
    expected[[3, 5]] = moved[[3, 5]]
    torch.testing.assert_close(head.memory.keys[head.memory.rows_of(ids)], expected)


@pytest.mark.parametrize("soft", [False, True])
def test_a_class_whose_share_is_below_single_precision_still_pulls(soft: bool) -> None:
    """Kernels as narrow as embeddings that a long training drew together have: shares of exp(-100) and exp(-1000)."""
    far = torch.tensor([[0.0, 0.0], [0.1, 0.0], [14.1, 0.0], [0.0, 44.7]])  # 0, 0.005, 99.4 and 999 in sigmas
    labels = F.one_hot(torch.tensor([0, 0, 1, 2]), 4).float()
    if soft:
        labels[0] = torch.tensor([0.9, 0.1, 0.0, 0.0])
    head = build_head("impostor", 2, 4, k=8, sigma=1.0, centers="fixed", auxiliary=0.0).train()
    assert isinstance(head, MemoryHead)
    head.add(far, labels if soft else labels.argmax(1), torch.arange(4))
    z = torch.tensor([[0.0, 0.0], [0.05, 0.01], [14.0, 0.0]], requires_grad=True)
    exact = z.detach().double().requires_grad_()
    weights = ((exact.unsqueeze(1) - far.double()).square().sum(-1) / -2).log_softmax(-1)
    log_p = torch.logsumexp(weights.unsqueeze(-1) + labels[:, :3].double().log(), 1)  # nobody has the fourth class
    floored = F.pad(log_p, (0, 1), value=-math.inf).clamp_min(math.log(1e-6)).log_softmax(-1)
    found = head(z, ids=torch.arange(3) + 10)
    torch.testing.assert_close(found.double(), floored, rtol=1e-5, atol=1e-5)
    for target in range(3):
        (ours,) = torch.autograd.grad(found[:, target].sum(), z, retain_graph=True)
        value = log_p[:, target] - (log_p * floored[:, :3].detach().exp()).sum(1)  # passes as if there were no floor
        (wanted,) = torch.autograd.grad(value.sum(), exact, retain_graph=True)
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)


def test_loose_centers_take_the_gradient_step_of_the_formula() -> None:
    head, z, y, ids = make("impostor", k=N - 1, sigma=0.8, tie=0.25, center_lr=0.1, floor=1e-12, auxiliary=0.0)
    centers = z.clone().requires_grad_()
    query = z + 0.3
    sq = (query.unsqueeze(1) - centers).square().sum(-1)
    shares = (-sq / (2 * 0.8**2)).masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf).softmax(1)
    vote = F.nll_loss((shares @ F.one_hot(y, C).float()).log(), y)
    tie = 0.25 * (query - centers).square().sum(-1).mean()
    by_vote = torch.autograd.grad(vote, centers, retain_graph=True)[0]
    by_tie = torch.autograd.grad(tie, centers)[0]
    leaf = query.clone().requires_grad_()
    loss = head.loss(leaf, y, ids=ids)
    torch.testing.assert_close(loss, vote + tie)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(head.memory.keys[:N], z)  # asking for a gradient is no step
    loss.backward()
    torch.testing.assert_close(head.memory.keys[:N], z - N * 0.1 * (0.8**2 * by_vote + by_tie / (2 * 0.25)))


def test_weights_take_the_gradient_step_of_the_formula() -> None:
    head, z, y, ids = make("nngk", k=N - 1, sigma=0.8, weight_lr=0.2, track=False, floor=1e-12, auxiliary=0.0)
    log_w = torch.zeros(N, requires_grad=True)
    scores = -torch.cdist(z, z).square() / (2 * 0.8**2) + log_w
    shares = scores.masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf).softmax(1)
    loss = F.nll_loss((shares @ F.one_hot(y, C).float()).log(), y)
    (gradient,) = torch.autograd.grad(loss, log_w)
    head.loss(z, y, ids=ids).backward()
    torch.testing.assert_close(head.memory.column("log_weight")[:N], -N * 0.2 * gradient, rtol=1e-4, atol=1e-6)


def test_the_tie_pulls_a_center_onto_its_sample() -> None:
    head, z, y, ids = make("impostor", k=3, tie=1.0, center_lr=1.0, auxiliary=0.0)
    head.memorize(z, y * 0, ids=ids)  # one class: the vote pulls nowhere
    leaf = (z + 1).requires_grad_()
    head.loss(leaf, y * 0, ids=ids).backward()
    torch.testing.assert_close(head.memory.keys[head.memory.rows_of(ids)], z + 1)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.full_like(z, 2 / N))  # and the sample toward its center


def test_a_sample_repeated_in_a_batch_does_not_overshoot() -> None:
    head, z, y, ids = make("impostor", k=3, tie=1.0, center_lr=1.0, auxiliary=0.0)
    head.memorize(z, y * 0, ids=ids)
    batch = torch.tensor([0, 0, 0, 0, 1])
    head.loss((z[batch] + 1).requires_grad_(), y[batch] * 0, ids=ids[batch]).backward()
    torch.testing.assert_close(head.memory.keys[head.memory.rows_of(ids[:3])], z[:3] + torch.tensor([[1.0], [1], [0]]))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_loose_centers_stay_in_reach_at_any_scale(scale: float, normalize: bool) -> None:
    head, z, y, ids = make("impostor", k=5, normalize=normalize)
    z = z * scale
    head.begin_refresh(replace=True)
    head.memorize(z, y, ids=ids)
    head.refreshed()
    for _ in range(50):
        F.cross_entropy(head(z, ids=ids), y).backward()
    reach = 1.0 if normalize else float(z.norm(dim=1).max())
    assert float(head.memory.keys[:N].norm(dim=1).max()) < 20 * reach


@pytest.mark.parametrize("name", ["nngk", "impostor", "kernel"])
def test_refresh_keeps_soft_labels_and_weights(name: str) -> None:
    head, z, y, ids = make(name, k=3)
    soft = torch.tensor([[0.2, 0.3, 0.5]])
    head.memory.relabel(ids[2:3], soft)
    columns = {column: torch.rand_like(head.memory.column(column)[:N]) for column in head.memory.columns}
    for column, values in columns.items():
        head.memory.column(column)[:N] = values
    head.begin_refresh()
    head.memorize(z + 0.1, y, ids=ids)
    head.refreshed()
    row = head.memory.rows_of(ids[2:3])
    torch.testing.assert_close(head.memory.values_at(row), soft)
    assert all(torch.equal(head.memory.column(column)[:N], values) for column, values in columns.items())
    moved = z if name == "impostor" else z + 0.1  # loose centers are learned, and stay
    torch.testing.assert_close(head.memory.keys[:N], moved)
    head.memorize(z, (y + 1) % C, ids=ids)  # outside a refresh an id is replaced
    assert torch.equal(head.memory.labels[:N], (y + 1) % C)


def test_the_balanced_subset() -> None:
    head, z, y, ids = make("nca", per_class=2)
    assert torch.bincount(head.memory.labels[: len(head.memory)]).tolist() == [2, 2, 2]
    again, *_ = make("nca", per_class=2)
    assert torch.equal(head.memory.ids[:6].sort().values, again.memory.ids[:6].sort().values)
    assert len(z) == len(y) == len(ids)


def test_pca_keeps_the_main_axes() -> None:
    torch.manual_seed(0)
    head = build_head("knn", 6, 2, pca=2, k=1)
    assert isinstance(head, MemoryHead)
    flat = torch.randn(30, 2) @ torch.randn(2, 6) + 3
    head.memorize(flat, torch.arange(30) % 2)
    kept, whole = torch.pdist(head.memory.keys[:30]), torch.pdist(flat)
    torch.testing.assert_close(kept, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("far", [0.0, 100.0])
def test_a_sum_over_all_centers_is_exact_far_from_the_origin(far: float) -> None:
    draw = torch.Generator().manual_seed(0)
    z, y = far + 0.1 * torch.randn(200, 64, generator=draw), torch.arange(200) % 3
    queries = far + 0.1 * torch.randn(50, 64, generator=draw)
    head = build_head("kernel", 64, 3, k=None)
    assert isinstance(head, MemoryHead)
    head.memorize(z, y, ids=torch.arange(200))
    head.refreshed()
    sq = (queries.double().unsqueeze(1) - z.double()).square().sum(2)
    sigma = head.state_dict()["width.value"].double()
    exact = ((sq / (-2 * sigma**2)).exp() @ F.one_hot(y, 3).double()).log_softmax(1)
    assert (head.eval()(queries) - exact).abs().max() < 1e-5


def test_the_width_is_chosen_for_as_many_neighbours_as_vote() -> None:
    draw = torch.Generator().manual_seed(0)
    z, y = torch.randn(400, 8, generator=draw), torch.arange(400) % 2
    widths = []
    for k in (None, 20):  # the root of 400
        head = build_head("nca", 8, 2, vote="gaussian", k=k)
        head.memorize(z, y, ids=torch.arange(400))
        head.refreshed()
        widths.append(float(head.state_dict()["width.value"]))
    assert widths[0] == widths[1]


def test_training_without_ids_warns_once() -> None:
    head, z, y, _ = make("nngk", k=3)
    with pytest.warns(UserWarning, match="trains without ids"):
        head.loss(z, y)
    head.loss(z, y)  # a second warning would be an error


@pytest.mark.parametrize(
    ("name", "options", "by_output", "bar"),
    [
        ("dense", {}, True, 0.88),
        ("nngk", {"k": 16}, True, 0.88),
        ("impostor", {"k": 16}, True, 0.88),
        ("impostor", {"k": 16}, False, 0.88),
        ("kernel", {"k": 16}, True, 0.85),
        ("knn", {"k": 5}, False, 0.88),
        ("nca", {"objective": "log"}, False, 0.88),
    ],
)
def test_an_ordinary_loop_learns_digits(name: str, options: dict[str, Any], by_output: bool, bar: float) -> None:
    torch.manual_seed(0)
    pixels, target = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(target)
    train = torch.arange(1000)
    backbone = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    if name != "kernel":  # its centers do not follow the jump of the embeddings when batch statistics set in
        backbone.append(nn.BatchNorm1d(16))
    head = build_head(name, 16, 10, **options)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam([{"params": backbone.parameters()}, *head.param_groups(0.01)], lr=0.003)
    for epoch in range(8):
        backbone.eval()
        head.begin_refresh(replace=epoch == 0)
        with torch.no_grad():
            head.memorize(backbone(x[train]), y[train], ids=train)
        head.refreshed()
        backbone.train(), head.train()
        for batch in torch.randperm(len(train)).split(64):
            z = backbone(x[batch])
            loss = criterion(head(z, ids=batch), y[batch]) if by_output else head.loss(z, y[batch], ids=batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    backbone.eval(), head.eval()
    with torch.no_grad():
        head.begin_refresh()
        head.memorize(backbone(x[train]), y[train], ids=train)
        head.refreshed()
        accuracy = (head(backbone(x[1000:])).argmax(1) == y[1000:]).float().mean().item()
    assert accuracy >= bar


@pytest.mark.parametrize("name", ["nngk", "impostor"])
def test_the_auxiliary_dense_layer_has_its_share_and_leaves_unseen_classes_alone(name: str) -> None:
    head, z, y, ids = make(name, auxiliary=0.6, **({"tie": 0.0} if name == "impostor" else {}))
    vote = F.nll_loss(head(z, ids=ids), y)
    dense = head.get_submodule("dense.layer")
    seen = y.unique()
    logits = dense(z)[:, seen]
    expected = 0.4 * vote + 0.6 * F.cross_entropy(logits, torch.searchsorted(seen, y))
    torch.testing.assert_close(head.loss(z, y, ids=ids), expected)
    unseen = torch.ones(C, dtype=torch.bool)
    unseen[y[:1]] = False
    fresh, z, y, ids = make(name, auxiliary=0.6)
    fresh.loss(z[:1], y[:1], ids=ids[:1]).backward()
    gradient = fresh.get_parameter("dense.layer.weight").grad
    assert gradient is not None
    assert not bool(gradient[unseen].any())
