"""What a batch may look like: images, labels and, where there are any, ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from nnheads.errors import DataError


def label_tensor(y: Any) -> Tensor:
    """Labels as a tensor, whole numbers as int64, a column of them as (n,); DataError where they are no numbers."""
    try:
        labels = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        kind = type(y[0] if isinstance(y, list | tuple) and y else y).__name__
        raise DataError(f"labels must be numbers, not {kind}: give each class a number from 0") from None
    if labels.is_floating_point():
        return labels
    # Some data sets keep each label as an array of one number.
    return labels.long().squeeze(1) if labels.dim() == 2 and labels.shape[1] == 1 else labels.long()


def unpack(batch: Any, loader: Iterable[Any], position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and ids of a batch."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or not isinstance(batch[0], Tensor):
        raise DataError("memorize: a batch must be (x, y) or (x, y, ids) with a tensor x; see nnheads.with_ids")
    x, y = batch[0], label_tensor(batch[1])
    if not y.dim():
        raise DataError(
            f"memorize: {type(loader).__name__} yields single samples, not batches: give "
            "DataLoader(dataset, batch_size=...), or call nnheads.fit(model, dataset, epochs=0)"
        )
    if len(batch) == 2:
        if _shuffles(loader):
            raise DataError(
                "memorize: the loader shuffles, so positions cannot be ids: wrap the data set in nnheads.with_ids"
            )
        return x, y, torch.arange(position, position + len(y))
    ids = torch.as_tensor(batch[2])
    if ids.is_floating_point() or ids.shape != (len(y),):
        raise DataError(f"memorize: ids must be integers of shape ({len(y)},), not {ids.dtype} {tuple(ids.shape)}")
    if len(ids) > 1 and bool((ids == ids[0]).all()):
        raise DataError(
            f"memorize: all ids of a batch are {int(ids[0])}: the third item must be the samples' ids, not their task"
        )
    return x, y, ids.long()


def _shuffles(loader: Iterable[Any]) -> bool:
    """Whether a loader of torch may give its samples in another order than the data set's; unknown loaders
    may not.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    in_order = isinstance(loader.sampler, SequentialSampler)
    return not in_order or (loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler)


def as_labels(
    y: Tensor | Sequence[str] | Sequence[int], names: Sequence[str] | None, num_classes: int
) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels from names of classes, and the names of all classes then; tensors are given back as they are.

    Args:
        y: labels, or names.
        names: of the classes that have one, the first ones.
        num_classes: classes there are.

    Raises:
        DataError: they are something else, or one name, whose letters would be taken for names.
    """
    if isinstance(y, Tensor):
        return y, None if names is None else tuple(names)
    if isinstance(y, str):
        raise DataError(f"classes must be given one a sample: [{y!r}, ...], not {y!r}")
    if all(isinstance(label, int) and not isinstance(label, bool) for label in y):
        return torch.tensor(y, dtype=torch.int64), None if names is None else tuple(names)
    known = list(names or ())
    known += [str(label) for label in range(len(known), num_classes)]
    found = []
    for name in y:
        if not isinstance(name, str):
            raise DataError(f"classes must be given all by name or all by number, not as {type(name).__name__}")
        if name not in known:
            known.append(name)
        found.append(known.index(name))
    return torch.tensor(found, dtype=torch.int64), tuple(known)
