"""Memory against a plain dict, over any course of additions, drops, new labels and reloads."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from nnheads.errors import ShapeError
from nnheads.memory import Memory

D = 3
ids_lists = st.lists(st.integers(0, 12), min_size=0, max_size=6)


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(D, 2, {"weight": 0, "alpha": "classes"})
        self.model: dict[int, tuple[list[float], int, list[float] | None]] = {}
        self.gone: set[float] = set()
        self.number = 1.0

    def fresh(self, n: int) -> Tensor:
        """Numbers that never came before, exact in float32."""
        values = torch.arange(n * D).view(n, D) + self.number
        self.number += n * D
        return values

    def forget(self, i: int) -> None:
        if i in self.model:
            self.gone.update(self.model.pop(i)[0])

    @rule(ids=ids_lists, label=st.integers(0, 4), given=st.booleans())
    def add(self, ids: list[int], label: int, given: bool) -> None:
        keys, labels = self.fresh(len(ids)), (torch.arange(len(ids)) + label) % 5
        out = self.memory.add(keys, labels, torch.tensor(ids, dtype=torch.long) if given else None)
        if not given:
            assert not set(out.tolist()) & set(self.model)
        for i, key, y in zip(out.tolist(), keys.tolist(), labels.tolist(), strict=True):
            self.forget(i)
            self.model[i] = (key, y, None)

    @rule(ids=ids_lists)
    def drop(self, ids: list[int]) -> None:
        unknown = [i for i in ids if i not in self.model]
        if unknown:
            with pytest.raises(ShapeError, match=f"no sample with id .*{min(unknown)}"):
                self.memory.drop(torch.tensor(ids))
            return
        self.memory.drop(torch.tensor(ids, dtype=torch.long))
        for i in set(ids):
            self.forget(i)

    @rule(data=st.data())
    def relabel(self, data: st.DataObject) -> None:
        if not self.model:
            return
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))
        soft = torch.rand(len(ids), self.memory.num_classes).softmax(-1)
        self.memory.relabel(torch.tensor(ids, dtype=torch.long), soft)
        for i, row in zip(ids, soft.tolist(), strict=True):
            self.model[i] = (self.model[i][0], self.model[i][1], row)

    @rule(classes=st.integers(1, 6))
    def widen(self, classes: int) -> None:
        before = self.memory.num_classes
        self.memory.widen(classes)
        assert self.memory.num_classes == max(before, classes)

    @rule(busy=st.booleans())
    def reload(self, busy: bool) -> None:
        other = Memory(D, 1, {"weight": 0, "alpha": "classes"})
        if busy:
            other.add(torch.randn(9, D), torch.arange(9) % 7)
        other.load_state_dict(self.memory.state_dict())
        self.memory = other

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        for i in list(self.model):
            self.forget(i)

    @invariant()
    def agrees(self) -> None:
        memory, held = self.memory, sorted(self.model)
        assert len(memory) == len(held) == int(memory.active.sum())
        ids = torch.tensor(held, dtype=torch.long)
        rows = memory.rows_of(ids)
        assert sorted(rows.tolist()) == list(range(len(held)))
        assert memory.keys[rows].tolist() == [self.model[i][0] for i in held]
        assert memory.labels[rows].tolist() == [self.model[i][1] for i in held]
        assert memory.rows_of(torch.tensor([99, -1])).tolist() == [-1, -1]
        for i, value in zip(held, memory.values_at(rows), strict=True):
            soft = self.model[i][2]
            expected = torch.zeros(memory.num_classes)
            if soft is None:
                expected[self.model[i][1]] = 1
            else:
                expected[: len(soft)] = torch.tensor(soft)
            torch.testing.assert_close(value, expected)
        assert memory.bytes == sum(t.numel() * t.element_size() for t in memory.state_dict().values())

    @invariant()
    def holds_nothing_dropped(self) -> None:
        assert not self.memory.keys[len(self.memory) :].any()
        left = {v for name, b in self.memory.named_buffers() if name == "keys" for v in b.flatten().tolist()}
        assert not left & self.gone


MemoryMachine.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)
TestMemory = MemoryMachine.TestCase


def filled() -> Memory:
    memory = Memory(D, 2)
    memory.add(torch.randn(5, D), torch.arange(5) % 2, torch.arange(5))
    return memory


@pytest.mark.parametrize(
    ("keys", "labels", "ids"),
    [
        (torch.full((2, D), float("nan")), torch.tensor([0, 5]), None),
        (torch.ones(2, D + 1), torch.tensor([0, 5]), None),
        (torch.ones(2, D), torch.tensor([5, -1]), None),
        (torch.ones(2, D), torch.tensor([0.5, 5.0]), None),
        (torch.ones(2, D), torch.tensor([5]), None),
        (torch.ones(2, D), torch.tensor([0, 5]), torch.tensor([1])),
        (torch.ones(2, D), torch.tensor([0, 5]), torch.tensor([1, -2])),
        (torch.ones(2, D), torch.tensor([0, 5]), torch.tensor([1.0, 2.0])),
        (torch.ones(2, D), torch.ones(2, 5), None),  # soft labels that sum to five
        (torch.ones(2, D), torch.eye(5)[:2], torch.tensor([1, -2])),
    ],
)
def test_a_failed_add_changes_nothing(keys: Tensor, labels: Tensor, ids: Tensor | None) -> None:
    memory = filled()
    before = {key: value.clone() for key, value in memory.state_dict().items()}
    with pytest.raises(ShapeError):
        memory.add(keys, labels, ids)
    assert memory.num_classes == 2
    assert all(torch.equal(before[key], value) for key, value in memory.state_dict().items())


def test_the_last_of_equal_ids_counts() -> None:
    memory = Memory(D, 2)
    memory.add(torch.arange(4.0).unsqueeze(1).expand(4, D), torch.tensor([0, 1, 0, 1]), torch.tensor([7, 8, 7, 8]))
    assert len(memory) == 2
    assert memory.keys[memory.rows_of(torch.tensor([7, 8])), 0].tolist() == [2.0, 3.0]


def test_ids_are_not_given_twice() -> None:
    memory = filled()
    memory.drop(torch.tensor([4]))
    assert memory.add(torch.ones(1, D), torch.tensor([0])).tolist() == [5]


def test_ids_of_a_trial_are_given_again_and_held_ones_never() -> None:
    memory = filled()
    trial = memory.add(torch.ones(2, D), torch.tensor([0, 1]))
    memory.drop(trial, reuse_ids=True)
    assert memory.add(torch.ones(1, D), torch.tensor([0])).tolist() == [5]
    memory.drop(torch.tensor([2]), reuse_ids=True)  # not the last given
    assert memory.add(torch.ones(2, D), torch.tensor([0, 1])).tolist() == [6, 7]
    assert len(memory) == 7


def test_a_state_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match="saved keys are 3 wide, this memory takes 4"):
        Memory(4, 2).load_state_dict(filled().state_dict())


def test_changes_since_the_last_look() -> None:
    memory = filled()
    assert memory.take_changes() is None
    memory.write(torch.tensor([1, 3]), torch.zeros(2, D))
    changes = memory.take_changes()
    assert changes is not None
    assert changes.tolist() == [1, 3]
    assert memory.take_changes().tolist() == []  # type: ignore[union-attr]


def test_a_state_whose_tensors_do_not_fit_together_changes_nothing() -> None:
    memory = filled()
    state = memory.state_dict()
    for name in ("keys", "labels", "ids", "soft_row"):
        other = filled()
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(RuntimeError, match="do not fit together"):
            other.load_state_dict({**state, name: state[name][:-1]})
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
