"""Centers embedded anew from the exemplars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from nnheads import distributed
from nnheads.data import BatchLoader, ImageSet, Preprocessing
from nnheads.devices import Precision, autocast_for
from nnheads.errors import DivergedError
from nnheads.headed import HeadedModel, evaluating
from nnheads.heads.kernel import KernelHead
from nnheads.heads.memory_head import MemoryHead
from nnheads.heads.nngk import NNGKHead

EMBED_BATCH: Final = 256


@torch.no_grad()
def embed_batches(
    model: HeadedModel, batches: Iterable[tuple[Tensor, Tensor, Tensor]], device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (n, d), labels (n,) and ids (n,) of batches (x, y, ids), with the model in evaluation mode.

    Raises:
        DivergedError: an embedding is not finite.
    """
    found = []
    with evaluating(model):
        for x, y, ids in batches:
            with autocast_for(device, precision):
                z = distributed.features(model, x.to(device))
            check_finite(z)
            found.append((z if z.dtype == torch.float64 else z.float(), y.to(device), ids.to(device)))
    if not found:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return torch.zeros(0, model.in_features, device=device), nothing, nothing
    z, y, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    return z, y, ids


def check_finite(z: Tensor) -> None:
    """DivergedError unless embeddings (n, d), and the squares of their norms, are finite."""
    if not bool(z.detach().float().square().sum(1).isfinite().all()):
        raise DivergedError("training diverged: embeddings are not finite any more; give a lower lr")


@torch.no_grad()
def refill(
    model: HeadedModel,
    exemplars: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: Precision = "auto",
    channels_last: bool = False,
) -> None:
    """Give a model's head the exemplars as its centers, embedded in evaluation mode. Labels that were redistributed
    stay with their centers. No-op for a head without memory.
    """
    head = model.head
    if not isinstance(head, MemoryHead):
        return
    memory = head.memory
    loader = BatchLoader(exemplars, preprocessing, EMBED_BATCH, device=device, channels_last=channels_last)
    z, y, ids = embed_batches(model, loader, device, precision)
    # What such a head learned for each sample would be lost if the rows were written anew.
    keep = isinstance(head, NNGKHead | KernelHead)
    moved, labels = soft_labels(head)
    if keep:
        held = memory.ids[: len(memory)]
        gone = held[~torch.isin(held, ids)]
        if len(gone):  # an earlier state was loaded while training, as EarlyStopping does
            head.drop(gone)
    else:
        memory.clear()
    training = model.training
    model.eval()
    head.begin_refresh(replace=not keep)
    head.memorize(z, y, ids=ids)
    set_soft_labels(head, moved, labels)
    head.refreshed()
    model.train(training)


def soft_labels(head: MemoryHead) -> tuple[Tensor, Tensor]:
    """Ids (n,) of the centers whose labels were redistributed and those labels (n, C)."""
    memory = head.memory
    rows = (memory.soft_row[: len(memory)] >= 0).nonzero().flatten()
    return memory.ids[rows].clone(), memory.values_at(rows)


def set_soft_labels(head: MemoryHead, ids: Tensor, labels: Tensor) -> None:
    """Give the centers that are still there these labels."""
    held = head.memory.rows_of(ids) >= 0
    if bool(held.any()):
        head.memory.relabel(ids[held], labels[held])
