"""Neighbour lists of centers that come and go, against a search from scratch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnheads._neighborhoods import Neighborhoods

N, D = 40, 3


def nearest(keys: Tensor, present: Tensor, point: int, k: int) -> Tensor:
    """Squared distances of the k nearest present centers, infinite where there are fewer."""
    sq = (keys - keys[point]).square().sum(1).masked_fill(~present, torch.inf)
    found = sq.sort().values[:k]
    return torch.nn.functional.pad(found, (0, k - len(found)), value=torch.inf)


def check(near: Neighborhoods, keys: Tensor, present: Tensor, k: int) -> None:
    assert torch.equal(near.present, present)
    points = present.nonzero().flatten()
    rows, sq = near.of(points)
    for point, found, distances in zip(points.tolist(), rows, sq, strict=True):
        expected = nearest(keys, present, point, k)[: len(distances)]
        torch.testing.assert_close(distances, expected)
        held = found[found >= 0]
        assert len(held) == min(k, int(present.sum()))
        assert len(held.unique()) == len(held)
        assert bool(present[held].all())
        torch.testing.assert_close((keys[held] - keys[point]).square().sum(1), distances[: len(held)])


@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 12),
    there=st.integers(1, N),
    steps=st.lists(st.integers(0, N - 1), min_size=1, max_size=60),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_lists_are_those_of_a_search_from_scratch(
    k: int, there: int, steps: list[int], scale: float, seed: int
) -> None:
    keys = torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * scale + scale
    present = torch.arange(N) < there
    near = Neighborhoods(keys, k, present.clone())
    check(near, keys, present, k)
    for row in steps:
        if present[row]:
            if present.sum() == 1:
                continue
            holding = [
                p for p in present.nonzero().flatten().tolist() if p != row and row in near.of(torch.tensor([p]))[0]
            ]
            assert near.holding(row).tolist() == holding
            near.remove(row)
            present[row] = False
        else:
            points, sq = near.reach(row)
            others = present.nonzero().flatten().tolist()
            apart = (keys - keys[row]).square().sum(1)
            assert points.tolist() == [p for p in others if apart[p] < nearest(keys, present, p, k)[-1]]
            torch.testing.assert_close(sq, apart[points])
            near.insert(row)
            present[row] = True
        check(near, keys, present, k)


def test_a_center_that_is_gone_cannot_go_again() -> None:
    keys = torch.randn(6, D)
    near = Neighborhoods(keys, 3, torch.ones(6, dtype=torch.bool))
    near.remove(2)
    near.remove(2)
    check(near, keys, torch.tensor([True, True, False, True, True, True]), 3)
