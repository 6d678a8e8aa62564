"""Training what has one row for each stored sample: centers, weights, alphas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Memory


def trained_rows(memory: Memory, table: Tensor, rows: Tensor, step: float | Tensor, batch: int | None = None) -> Tensor:
    """Rows of a table, which take an SGD step of size ``step`` when the gradient of a mean loss reaches them.

    A dense optimizer would touch every row each step, sparse gradients are refused by Adam and by weight decay, and the
    optimizer's state would have to follow each row that is added or dropped. So the rows that a batch touched step
    while its backward pass runs. The gradient is taken as that of a mean over the batch and scaled back to the sum, so
    that a row's step does not shrink as the batch grows; a loss that is scaled otherwise (a sum, accumulated or scaled
    gradients) scales the step likewise. Rows that moved between forward and backward are left alone.

    Args:
        memory: the rows belong to it.
        table: (capacity, ...) its keys or a column.
        rows: (B, k) or (n,) int64; -1 for none.
        step: size of the step, or one that broadcasts against the rows.
        batch: samples in the mean; ``len(rows)`` by default.

    Returns:
        (B, k, ...) or (n, ...) values; those at -1 are arbitrary and take no step.
    """
    part = table[rows.clamp_min(0)].detach().requires_grad_()
    layout, scale = memory.layout, -step * (batch or len(rows))

    def update(grad: Tensor) -> None:
        if memory.layout != layout:
            return
        held = rows >= 0
        with torch.no_grad():
            table.index_add_(0, rows[held], (grad * scale)[held])
        if table is memory.keys:
            memory.touch(rows[held])

    part.register_hook(update)
    return part
