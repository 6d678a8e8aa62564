"""bfloat16 on processors without it: the results of hardware that has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnheads.devices import autocast_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnheads.devices.cpu_bfloat16", lambda: "no bfloat16")


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "conv1d": (F.conv1d, ((2, 3, 9), (5, 3, 3), (5,))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, bias=b, padding=1), ((2, 3, 9, 8), (5, 3, 3, 3), (5,))),
    "conv3d": (F.conv3d, ((2, 3, 5, 5, 5), (5, 3, 3, 3, 3), (5,))),
    "linear": (F.linear, ((4, 30), (7, 30), (7,))),
    "matmul": (torch.matmul, ((4, 30), (30, 7))),
    "@": (lambda a, b: a @ b, ((3, 4, 30), (3, 30, 7))),
    "mm": (torch.mm, ((4, 30), (30, 7))),
    "bmm": (torch.bmm, ((3, 4, 30), (3, 30, 7))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_rounded_numbers_rounded_once(name: str) -> None:
    function, shapes = PRODUCTS[name]
    torch.manual_seed(0)
    operands = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [rounded(x.detach()).requires_grad_() for x in operands]
    with autocast_for(CPU, "bfloat16"):
        out = function(*operands)
    expected = function(*exact)
    assert out.dtype == torch.bfloat16
    # The sums are in float32, so that a value between two roundings may go to the other.
    torch.testing.assert_close(out.double(), rounded(expected.detach()), rtol=2**-7, atol=1e-5)
    assert (out.double() == rounded(expected.detach())).double().mean() > 0.95
    change = torch.randn_like(expected).to(torch.bfloat16)
    out.backward(change)
    expected.backward(change.double())
    for ours, oracle in zip(operands, exact, strict=True):
        assert ours.grad is not None
        assert oracle.grad is not None
        assert ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, rounded(ours.grad).float())
        torch.testing.assert_close(ours.grad.double(), rounded(oracle.grad), rtol=2**-7, atol=1e-5)


def test_a_network_answers_and_learns_as_under_torch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(16, 3, 8, 8)
    gradients = []
    for context in (autocast_for(CPU, "bfloat16"), torch.autocast("cpu", dtype=torch.bfloat16)):
        net.zero_grad()
        with context:
            out = net(x)
        assert out.dtype == torch.bfloat16
        F.cross_entropy(out.float(), torch.arange(16) % 5).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[1].norm()


def test_what_autocast_leaves_alone_is_left_alone() -> None:
    a = torch.randn(4, 4)
    with autocast_for(CPU, "bfloat16"):
        assert (a.double() @ a.double()).dtype == torch.float64
        assert (a.long() @ a.long()).dtype == torch.int64
        with torch.autocast("cpu", enabled=False):
            assert (a @ a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_network_learns_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(16, 3, 8, 8)
    with autocast_for(CPU, "bfloat16"):
        out = torch.compile(net, backend="aot_eager")(x)
        expected = net(x)
    torch.testing.assert_close(out, expected, rtol=2**-5, atol=1e-2)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
