"""Mahalanobis distances in the heads that vote with Gaussian kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nnheads.center_choice import best_predicted
from nnheads.centers import drop_centers
from nnheads.errors import ConfigError
from nnheads.heads import build_head
from nnheads.heads.kernel_vote import KernelVoteHead
from nnheads.heads.whitening import Whitening

D, C, N = 12, 5, 400


def samples(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes that lie apart in directions in which their samples differ little."""
    draw = torch.Generator().manual_seed(seed)
    stretch = torch.logspace(1, -1, D)
    turn = torch.linalg.qr(torch.randn(D, D, generator=draw))[0]
    y = torch.arange(N) % C
    centers = torch.randn(C, D, generator=draw)
    return (centers[y] * 0.5 + torch.randn(N, D, generator=draw) * stretch) @ turn, y


def stored(z: Tensor, y: Tensor, **options: Any) -> KernelVoteHead:
    head = build_head("impostor", D, C, **{"k": 8, "centers": "tied", "whiten": 0.3, **options}).eval()
    assert isinstance(head, KernelVoteHead)
    head.begin_refresh()
    head.memorize(z, y, ids=torch.arange(len(y)))
    head.refreshed()
    return head


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 3.0])
def test_distances_are_those_of_the_formula(shrinkage: float) -> None:
    z, y = samples()
    head = stored(z, y, whiten=shrinkage)
    x = z.double()
    covariance = torch.zeros(D, D, dtype=torch.float64)
    for c in range(C):
        of_class = x[y == c] - x[y == c].mean(0)
        covariance += of_class.T @ of_class / N
    v = covariance.trace() / D
    metric = torch.linalg.inv(covariance + shrinkage * v * torch.eye(D)) * (1 + shrinkage) * v
    found = head.neighbors(z[:20], ids=torch.arange(20))
    apart = x[:20].unsqueeze(1) - x[found.rows]
    expected = torch.einsum("bkd,de,bke->bk", apart, metric, apart).sqrt()
    torch.testing.assert_close(found.distances.double(), expected, rtol=2e-3, atol=1e-3)


def test_the_answer_is_the_vote_among_keys() -> None:
    z, y = samples()
    head = stored(z, y)
    assert head.whitening is not None
    keys = (z @ head.whitening.matrix.float()).double()
    sq = torch.cdist(keys[:30], keys).square()
    sq[torch.arange(30), torch.arange(30)] = torch.inf
    near, rows = sq.topk(8, largest=False)
    weights = (-near / (2 * float(head.width()) ** 2)).softmax(1)
    expected = torch.zeros(30, C, dtype=torch.float64).scatter_add_(1, y[rows], weights).clamp_min(1e-6)
    expected /= expected.sum(1, keepdim=True)
    answered = head(z[:30], ids=torch.arange(30)).exp().double()
    torch.testing.assert_close(answered, expected, rtol=1e-3, atol=1e-4)


def test_it_tells_classes_apart_that_euclidean_distances_do_not() -> None:
    z, y = samples()
    ids = torch.arange(N)

    def right(**options: Any) -> float:
        return float((stored(z, y, **options)(z, ids=ids).argmax(1) == y).float().mean())

    assert right(whiten=0.01) > right(whiten=0.0) + 0.1


@pytest.mark.parametrize("bytes_per_center", [None, 12])
def test_embedding_the_same_samples_anew_changes_nothing(bytes_per_center: int | None) -> None:
    z, y = samples()
    head = stored(z, y, bytes_per_center=bytes_per_center)
    before, width = head(z, ids=torch.arange(N)), float(head.width())
    head.begin_refresh()
    head.memorize(z, y, ids=torch.arange(N))
    head.refreshed()
    assert float(head.width()) == pytest.approx(width, rel=1e-2)
    assert float((head(z, ids=torch.arange(N)).argmax(1) == before.argmax(1)).float().mean()) > 0.98


def test_it_follows_embeddings_that_moved() -> None:
    z, y = samples()
    head = stored(z, y)
    other, _ = samples(1)
    head.begin_refresh()
    head.memorize(other, y, ids=torch.arange(N))
    head.refreshed()
    fresh = stored(other, y)
    assert head.whitening is not None
    assert fresh.whitening is not None
    torch.testing.assert_close(head.whitening.matrix, fresh.whitening.matrix)
    torch.testing.assert_close(head(z), fresh(z), rtol=1e-3, atol=1e-3)


def test_samples_added_later_lie_in_the_same_space() -> None:
    z, y = samples()
    head = stored(z[:300], y[:300])
    head.add(z[300:], y[300:], torch.arange(300, N))
    found = head.neighbors(z[300:], k=1)
    assert found.ids.flatten().tolist() == list(range(300, N))
    assert float(found.distances.max()) < 1e-2


def test_a_saved_head_answers_as_it_did() -> None:
    z, y = samples()
    head = stored(z, y)
    twin = build_head("impostor", D, C, **head.config()).eval()
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(z), head(z))


def test_bytes_count_the_matrix() -> None:
    z, y = samples()
    head = stored(z, y)
    assert head.bytes - head.memory.bytes == 2 * D * D
    assert stored(z, y, whiten=0.0).bytes == stored(z, y, whiten=0.0).memory.bytes


def test_choosing_centers_asks_about_their_embeddings() -> None:
    z, y = samples()
    head = stored(z, y)
    answered = head(z, ids=torch.arange(N)).gather(1, y.unsqueeze(1)).squeeze(1)
    best = best_predicted(head, 10)
    assert float(answered[best].min()) >= float(answered.sort(descending=True).values[9]) - 1e-3


def test_dropping_centers_moves_labels_in_that_space() -> None:
    z, y = samples()
    head = stored(z, y)
    drop_centers(head, torch.arange(20), "influence")
    values = head.memory.values_at(torch.arange(len(head.memory)))
    assert bool((head.memory.soft_row[: len(head.memory)] >= 0).any())
    torch.testing.assert_close(values.sum(1), torch.ones(len(values)))


def test_one_sample_a_class_leaves_distances_euclidean() -> None:
    z, y = samples()
    head = stored(z[:C], y[:C])
    assert head.whitening is not None
    assert torch.equal(head.whitening.matrix.float(), torch.eye(D))


def test_the_map_has_an_inverse() -> None:
    z, y = samples()
    whitening = Whitening(D, 0.1)
    whitening.fit(z, y)
    torch.testing.assert_close(whitening.inverse(whitening(z)), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [-1, "much", float("nan")])
def test_a_shrinkage_that_cannot_be(value: Any) -> None:
    with pytest.raises(ConfigError, match="whiten must be a number 0 or more"):
        build_head("nngk", D, C, whiten=value)


def test_the_least_shrinkage_still_answers() -> None:
    z, y = samples()
    flat = torch.cat([z[:, : D - 1], torch.zeros(N, 1)], 1)
    assert bool(stored(flat, y, whiten=1e-6)(flat).isfinite().all())
    with pytest.raises(ConfigError, match="whiten must be 0 or at least 1e-06"):
        stored(flat, y, whiten=1e-9)


def test_the_map_stays_as_it_is_whatever_its_model_is_cast_to() -> None:
    z, y = samples()
    head = stored(z, y, whiten=0.3)
    before = head.whitening.matrix.clone()
    assert not torch.equal(before, before.bfloat16().half())
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16):
        assert torch.equal(head.to(dtype).whitening.matrix, before)
    assert torch.equal(copy.deepcopy(head).bfloat16().share_memory().whitening.matrix, before)
    bare = copy.deepcopy(head).to("meta")
    assert bare.bfloat16().whitening.matrix.is_meta
    assert bare.to_empty(device="cpu").whitening.matrix.dtype == torch.float16
