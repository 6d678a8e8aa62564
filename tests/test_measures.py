"""Measures of an accuracy matrix against numbers worked by hand."""

import pytest

from nnheads.benchmarks.measures import (
    accuracy_row,
    anytime_accuracy,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    seen_accuracy,
)
from nnheads.errors import ConfigError

# experience 0 falls, recovers; experience 1 falls
MATRIX = [[0.9, 0.2, None], [0.6, 0.8, 0.1], [0.7, 0.5, 1.0]]
COUNTS = [100, 200, 100]


def test_average_accuracy() -> None:
    assert average_accuracy(MATRIX) == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert average_accuracy(MATRIX, 1) == pytest.approx(0.7)


def test_seen_accuracy_weighs_by_test_samples() -> None:
    assert seen_accuracy(MATRIX, COUNTS) == pytest.approx((70 + 100 + 100) / 400)
    assert seen_accuracy(MATRIX, COUNTS, 0) == pytest.approx(0.9)


def test_forgetting_is_best_earlier_minus_final() -> None:
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert forgetting(MATRIX, 1) == pytest.approx(0.3)


def test_forgetting_counts_the_best_not_the_first() -> None:
    # after 0: 0.5, after 1: 0.9, finally 0.6
    matrix = [[0.5], [0.9, 1.0], [0.6, 1.0, 1.0]]
    assert forgetting(matrix) == pytest.approx((0.3 + 0.0) / 2)


def test_forgetting_is_negative_where_old_experiences_improve() -> None:
    assert forgetting([[0.5], [0.75, 1.0]]) == pytest.approx(-0.25)


def test_backward_transfer() -> None:
    assert backward_transfer(MATRIX) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)


def test_forward_transfer() -> None:
    assert forward_transfer(MATRIX, [0.1, 0.1, 0.3]) == pytest.approx(((0.2 - 0.1) + (0.1 - 0.3)) / 2)


def test_forward_transfer_needs_the_entries_above_the_diagonal() -> None:
    with pytest.raises(ConfigError, match="no accuracy on experience 1 after training experience 0"):
        forward_transfer([[0.9], [0.6, 0.8]], [0.1, 0.1])


def test_anytime_accuracy() -> None:
    assert anytime_accuracy(MATRIX) == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)
    # (60 + 160) / 300 after the second
    assert anytime_accuracy(MATRIX, COUNTS) == pytest.approx((0.9 + 220 / 300 + 0.675) / 3)


def test_one_experience_neither_forgets_nor_transfers() -> None:
    matrix = [[0.8]]
    assert (forgetting(matrix), backward_transfer(matrix), forward_transfer(matrix, [0.1])) == (0, 0, 0)
    assert average_accuracy(matrix) == anytime_accuracy(matrix, [5]) == 0.8


def test_accuracy_row() -> None:
    assert accuracy_row([3, 0, 0], [4, 2, 0]) == [0.75, 0.0, None]


@pytest.mark.parametrize("matrix", [[], [[1.5]], [[float("nan")]]])
def test_a_matrix_that_is_none_is_refused(matrix: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="accuracy matrix"):
        average_accuracy(matrix)
