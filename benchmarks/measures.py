"""What an accuracy matrix says about a continual learner.

In a matrix R, ``R[i][j]`` is the accuracy (0..1) on experience j's test samples after training on experience i, both
from 0; None where it was not measured. The definitions are those of GEM (Lopez-Paz and Ranzato 2017) for the transfers
and of Chaudhry et al. 2018 for forgetting.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from nnheads.errors import ConfigError

Matrix = Sequence[Sequence[float | None]]


def entry(matrix: Matrix, after: int, on: int) -> float:
    """``R[after][on]``.

    Raises:
        ConfigError: it was not measured.
    """
    value = matrix[after][on] if after < len(matrix) and on < len(matrix[after]) else None
    if value is None:
        raise ConfigError(f"accuracy matrix: no accuracy on experience {on} after training experience {after}")
    return value


def average_accuracy(matrix: Matrix, after: int | None = None) -> float:
    """Mean over the experiences seen of their accuracies, after training one (the last by default)."""
    after = _last(matrix) if after is None else after
    return sum(entry(matrix, after, j) for j in range(after + 1)) / (after + 1)


def seen_accuracy(matrix: Matrix, counts: Sequence[int], after: int | None = None) -> float:
    """Accuracy over all test samples of the experiences seen.

    Args:
        matrix: see above.
        counts: number of test samples of each experience.
        after: the experience trained last; the last of the matrix by default.
    """
    after = _last(matrix) if after is None else after
    seen = counts[: after + 1]
    if len(seen) <= after or sum(seen) < 1:
        raise ConfigError(f"accuracy matrix: {len(counts)} test counts for {after + 1} experiences, or no test sample")
    return sum(n * entry(matrix, after, j) for j, n in enumerate(seen)) / sum(seen)


def forgetting(matrix: Matrix, after: int | None = None) -> float:
    """Mean over the old experiences of the best accuracy they had before, minus the one they have now.

    Negative where old experiences improved; 0 where there is no old one.
    """
    after = _last(matrix) if after is None else after
    if after == 0:
        return 0.0
    lost = [max(entry(matrix, i, j) for i in range(j, after)) - entry(matrix, after, j) for j in range(after)]
    return sum(lost) / after


def backward_transfer(matrix: Matrix) -> float:
    """Mean over the old experiences of the final accuracy minus that after their training; 0 where there is none."""
    last = _last(matrix)
    if last == 0:
        return 0.0
    return sum(entry(matrix, last, j) - entry(matrix, j, j) for j in range(last)) / last


def forward_transfer(matrix: Matrix, baseline: Sequence[float | None]) -> float:
    """Mean over experiences j > 0 of the accuracy just before their training minus that of an untrained model.

    Args:
        matrix: with the entries ``R[j-1][j]`` measured.
        baseline: accuracy of the untrained model on each experience.

    Returns:
        0 for a single experience.
    """
    last = _last(matrix)
    if len(baseline) <= last:
        raise ConfigError(f"forward transfer: {len(baseline)} baseline accuracies for {last + 1} experiences")
    if last == 0:
        return 0.0
    return sum(entry(matrix, j - 1, j) - entry([baseline], 0, j) for j in range(1, last + 1)) / last


def anytime_accuracy(matrix: Matrix, counts: Sequence[int] | None = None) -> float:
    """Mean over the training experiences of the accuracy on all that was seen by then.

    Args:
        matrix: see above.
        counts: number of test samples of each experience; without it every experience weighs the same.
    """
    steps = range(_last(matrix) + 1)
    if counts is None:
        return sum(average_accuracy(matrix, i) for i in steps) / len(steps)
    return sum(seen_accuracy(matrix, counts, i) for i in steps) / len(steps)


def mean_and_spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """The mean, and as spread the sample standard deviation, which one value has none of.

    Returns:
        ``mean`` and ``spread``; None where a value is missing or not finite, for a mean over the others would not be
        comparable.
    """
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if not numbers or len(numbers) < len(values):
        return None
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "spread": spread}


def accuracy_row(correct: Sequence[int], counts: Sequence[int]) -> list[float | None]:
    """One row of the matrix from the number of right answers; None for an experience without test samples."""
    return [right / n if n else None for right, n in zip(correct, counts, strict=True)]


def _last(matrix: Matrix) -> int:
    if not matrix:
        raise ConfigError("accuracy matrix: it is empty")
    if any(value is not None and not (0 <= value <= 1 and math.isfinite(value)) for row in matrix for value in row):
        raise ConfigError("accuracy matrix: accuracies must be between 0 and 1")
    return len(matrix) - 1
