"""What the checks are made of: how one is registered, heads and samples to check, and what is expected."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Head, MemoryHead, build_head

#: Width of the embeddings and number of classes that the checks build heads with.
IN_FEATURES, NUM_CLASSES = 16, 3


class Check(Protocol):
    """One named check: takes the name of a registered head and its options, raises `AssertionError`."""

    __name__: str

    def __call__(self, name: str, **options: Any) -> None: ...


CHECKS: dict[str, Check] = {}
"""By name, in the order in which `check_head` runs them."""


def contract_check(body: Callable[[str, dict[str, Any]], None]) -> Check:
    """Register a check: it runs from a fixed seed and its failures carry its name."""
    label = body.__name__.removeprefix("_").removesuffix("_")

    def check(name: str, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                body(name, options)
            except AssertionError as error:
                raise AssertionError(f"head {name!r} {options}: {label}: {error}") from error

    check.__name__ = label
    check.__doc__ = body.__doc__
    CHECKS[label] = check
    return check


# ---- material ----------------------------------------------------------------------------------------------------


def samples(per_class: int = 8, classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (n, d) in one cloud a class, labels (n,) and ids (n,)."""
    y = torch.arange(per_class * classes) % classes
    return 0.3 * torch.randn(len(y), IN_FEATURES) + 2 * torch.eye(IN_FEATURES)[y], y, torch.arange(len(y)) * 3 + 1


def new_head(name: str, options: dict[str, Any], classes: int = NUM_CLASSES) -> Head:
    return build_head(name, IN_FEATURES, classes, **options)


def fill(head: Head, z: Tensor, y: Tensor, ids: Tensor, *, replace: bool = True) -> None:
    head.begin_refresh(replace=replace)
    for part in torch.arange(len(z)).split(10):
        head.memorize(z[part], y[part], ids=ids[part])
    head.refreshed()


def filled_head(name: str, options: dict[str, Any]) -> tuple[Head, Tensor, Tensor, Tensor]:
    head = new_head(name, options)
    z, y, ids = samples()
    fill(head, z, y, ids)
    return head, z, y, ids


def ids_held(head: Head) -> Tensor:
    """Ids of the samples that a head holds: of those it was given, a refresh may keep a few a class."""
    return head.memory.ids[: len(head.memory)].clone() if isinstance(head, MemoryHead) else torch.empty(0).long()


def trained_head(name: str, options: dict[str, Any]) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head some steps after its last refresh, so that everything it trains has moved."""
    head, z, y, ids = filled_head(name, options)
    train(head, z, y, ids, steps=3)
    return head.eval(), z, y, ids


def emptied_head(name: str, options: dict[str, Any]) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head that has forgotten what it held."""
    head, z, y, ids = filled_head(name, options)
    if isinstance(head, MemoryHead):
        head.drop(ids_held(head))
    return head, z, y, ids


def train(head: Head, z: Tensor, y: Tensor, ids: Tensor, steps: int, *, output: bool = False) -> tuple[float, float]:
    """Loss before and after training a linear layer and the head, by `loss` or by a criterion on the output."""
    layer = nn.Linear(IN_FEATURES, IN_FEATURES)
    nn.init.eye_(layer.weight)
    optimizer = torch.optim.SGD([{"params": layer.parameters()}, *head.param_groups(0.05)], lr=0.05)
    first = last = math.nan
    for step in range(steps):
        features = layer(z)
        loss = (
            F.cross_entropy(head.train()(features, ids=ids), y) if output else head.train().loss(features, y, ids=ids)
        )
        first, last = (loss.item() if step == 0 else first), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first, last


def expect(condition: bool, message: str) -> None:
    if not condition:  # an assert statement would vanish under python -O
        raise AssertionError(message)


def expect_log_probs(out: Tensor, batch: int, classes: int = NUM_CLASSES, dtype: torch.dtype = torch.float32) -> None:
    expect(out.shape == (batch, classes), f"output is {tuple(out.shape)}, must be {(batch, classes)}")
    expect(out.dtype == dtype, f"output is {out.dtype}, must be {dtype}")
    expect(bool(torch.isfinite(out).all()), "log-probabilities are not finite")
    expect(bool((out.logsumexp(-1).abs() < 1e-4).all()), "probabilities do not sum to one")


def expect_same(a: Tensor, b: Tensor, what: str, tolerance: float = 0.0) -> None:
    near = a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance))
    expect(near, f"{what}: outputs differ")


def expect_one_line(call: Callable[[], object], error: type[Exception], what: str) -> None:
    try:
        call()
    except error as raised:
        expect(bool(str(raised)) and "\n" not in str(raised), f"{what}: the message must be one line")
    except Exception as other:
        raise AssertionError(f"{what}: raises {type(other).__name__}, must raise {error.__name__}") from other
    else:
        raise AssertionError(f"{what}: must raise {error.__name__}")


def gradient_of(loss: Tensor, z: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(z)
    (gradient,) = torch.autograd.grad(loss, z, allow_unused=True, materialize_grads=True)
    return gradient


def state_of(head: Head) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in head.state_dict().items()}


def unchanged(head: Head, before: dict[str, Tensor]) -> bool:
    after = head.state_dict()
    return before.keys() == after.keys() and all(
        before[key].shape == after[key].shape and bool(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()))
        for key in before
    )
