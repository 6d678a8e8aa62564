"""The NCA loss in blocks: equal to the matrix form, gradients included, whatever the labels and the block size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nnheads import _nca
from nnheads.functional import nca_loss

objectives = pytest.mark.parametrize("objective", ["expected", "log"])
distances = pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])


def dense(z: Tensor, y: Tensor, objective: str, distance: str) -> Tensor:
    """The definition, by whole matrices and autograd."""
    d = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    scores = -(d if distance == "euclidean" else d.square())
    itself = torch.eye(len(z), dtype=torch.bool)
    log_p = scores.masked_fill(itself, -1e30).log_softmax(1)
    one_hot = (F.one_hot(y) if y.dim() == 1 else y).to(z.dtype)
    same = (one_hot @ one_hot.T).masked_fill(itself, 0)
    paired = same.sum(1) > 0
    log_share = torch.logsumexp(log_p + same.clamp_min(1e-300).log().masked_fill(same <= 0, -1e30), 1)[paired]
    return -log_share.mean() if objective == "log" else 1 - log_share.exp().mean()


def both(function, z: Tensor, *args: object) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    z = z.clone().requires_grad_()
    loss = function(z, *args)
    (3 * loss).backward()
    assert z.grad is not None
    return loss.detach(), z.grad


@objectives
@distances
@pytest.mark.parametrize("block", [8, 64, 2**18])
@pytest.mark.parametrize("soft", [False, True])
def test_equal_to_the_dense_form(
    objective: str, distance: str, block: int, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nca, "_BLOCK_NUMBERS", block * 60)
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 7, (60,), generator=generator)
    z = torch.randn(60, 5, generator=generator, dtype=torch.float64) + 0.5 * F.one_hot(y, 7)[:, :5]
    labels = torch.softmax(3 * torch.randn(60, 7, generator=generator, dtype=torch.float64), 1) if soft else y
    expected = both(dense, z, labels, objective, distance)
    for found, wanted in zip(both(nca_loss, z, labels, objective, distance), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)
    in_single = both(nca_loss, z.float(), labels, objective, distance)
    for found, wanted in zip(in_single, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


@objectives
@distances
def test_far_duplicate_and_lonely_samples(objective: str, distance: str) -> None:
    z = torch.tensor([[0.0, 0], [0, 0], [300, 0], [300, 1], [600, 0], [900, 0]])
    y = torch.tensor([0, 1, 0, 1, 2, 1])  # partners hundreds away, two samples at one place, one without a partner
    loss, gradient = both(nca_loss, z, y, objective, distance)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    wanted = dense(z.double(), y, objective, distance)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-4, rtol=1e-4)
    if objective == "log":
        assert gradient.abs().sum() > 1e-3  # its gradient does not vanish however far the partners are


@objectives
def test_without_partners_the_loss_is_zero(objective: str) -> None:
    for count in (0, 1, 3):
        loss, gradient = both(nca_loss, torch.randn(count, 4), torch.arange(count), objective, "euclidean")
        assert loss == 0
        assert torch.equal(gradient, torch.zeros(count, 4))
    with torch.no_grad():
        assert torch.isfinite(nca_loss(torch.randn(9, 4), torch.arange(9) // 3, objective))  # type: ignore[arg-type]


def test_no_matrix_of_the_batch_is_made() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    z = torch.randn(4096, 8)
    with Largest() as largest:
        both(nca_loss, z, torch.arange(4096) % 10)
    assert largest.numbers <= 2 * _nca._BLOCK_NUMBERS < 4096**2 // 8
