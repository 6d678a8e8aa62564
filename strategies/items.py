"""What the items of Avalanche's data sets are."""

from __future__ import annotations

from typing import Any, Final

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
