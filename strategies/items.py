"""What the items of Avalanche's data sets are."""

from __future__ import annotations

from typing import Any, Final

from nnheads.errors import DataError

IDS_WANTED: Final = (
    "items of a benchmark must be (x, y, id), or (x, y, id, t) with a task label, each sample with an id of its own: "
    "wrap the data of the whole stream in nnheads.with_ids before it is split"
)
"""What is said of other items."""


def has_ids(dataset: Any, values: int) -> bool:
    """Whether the third of so many values of a batch or an item is the id.

    Of three values it is a task label where the data set has those, as `nc_benchmark` gives them, and the id where it
    has none, as `class_incremental_benchmark` leaves them out.

    Args:
        dataset: of an experience.
        values: of one of its items, or of a batch.
    """
    return values == (4 if hasattr(dataset, "targets_task_labels") else 3)


def check_classes_are_apart(experience: Any) -> None:
    """DataError where a benchmark numbers the classes of each experience from 0: one head has all classes of a stream,
    and task labels are not looked at."""
    # Not `benchmark`, which raises where an experience belongs to none.
    if getattr(getattr(experience, "_benchmark", None), "class_ids_from_zero_in_each_exp", False):
        raise DataError(
            "the benchmark numbers the classes of each experience from 0, and a head takes equal labels for one class "
            "whatever the task label: make it without class_ids_from_zero_in_each_exp"
        )
