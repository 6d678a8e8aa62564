"""Neighbourhood component analysis in blocks of rows: loss and gradient in one pass, without a (B, B) matrix.

The loss is a scalar, so the gradient at the embeddings is known up to one factor as soon as the rows of a block are:
with s_ij the similarities, p_ij their softmax over j and q_ij the softmax over the partners of i alone,
``dL/ds_ij = c_i (p_ij - q_ij) / n``, where c_i is p_i for the expected and 1 for the logarithmic objective.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_NUMBERS = 2**18  # similarities held at once: 1 MB of float32, which stays in a core's cache
_LOWEST = -60.0  # exponents below make no difference to a sum that holds a one
_GPU_BLOCK_NUMBERS = 2**25


@final
class NCALoss(torch.autograd.Function):
    """``(z (B, d), y (B,) labels or (B, C) soft labels, expected, euclidean) -> scalar``; see `functional.nca_loss`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, expected: bool, euclidean: bool) -> Tensor:
        loss, gradient = _pass(z.detach(), y, expected, euclidean, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None


def _pass(z: Tensor, y: Tensor, expected: bool, euclidean: bool, wanted: bool) -> tuple[Tensor, Tensor]:
    """The loss and, where wanted, its gradient (B, d)."""
    order = y.argsort() if y.dim() == 1 else None
    if order is not None:  # partners then lie side by side, and what concerns them alone is a few columns
        z, y = z[order], y[order]
    z = z - z.mean(0)  # distances stay the same, and the expanded square loses fewer digits
    count = len(z)
    norms = z.square().sum(1)
    rows = min(count, max(8, (_GPU_BLOCK_NUMBERS if z.is_cuda else _BLOCK_NUMBERS) // count))
    first, last = _partner_columns(y, rows)
    gradient = torch.zeros_like(z)
    total, anchors = z.new_zeros(()), z.new_zeros(())
    held = z.new_empty(2, rows, count)  # every block uses the same memory
    for number, start in enumerate(range(0, count, rows)):
        end = min(start + rows, count)
        block, own = z[start:end], torch.arange(end - start, device=z.device)
        distance = torch.addmm(norms, block, z.T, alpha=-2, out=held[0, : end - start])
        distance.add_(norms[start:end, None]).clamp_(min=0)
        if euclidean:
            distance.sqrt_()
        distance[own, own + start] = torch.inf  # leave-one-out
        p, nearest = _decays(distance, held[1, : end - start])
        normalizer = p.sum(1, keepdim=True)
        near = slice(first[number], last[number])
        weight = _weights(y, slice(start, end), near)
        q, closest = _decays(distance[:, near].masked_fill(weight <= 0, torch.inf))
        partners = q.mul_(weight).sum(1, keepdim=True)
        paired = torch.isfinite(closest) & (partners > 0)
        partners.masked_fill_(~paired, 1)
        log_share = (partners / normalizer).log_() + (nearest - closest).masked_fill_(~paired, 0)
        share = log_share.exp() * paired
        total += share.sum() if expected else -(log_share * paired).sum()
        anchors += paired.sum()
        if not wanted:
            continue
        scale = share if expected else paired.to(z.dtype)
        p.mul_(scale / normalizer)
        p[:, near].sub_(q.mul_(scale / partners))
        if euclidean:
            same_place = distance <= 0
            p.div_(distance.masked_fill_(same_place, 1)).masked_fill_(same_place, 0)
        else:
            p.mul_(2)
        # s_ij = -|z_i - z_j| (or its square): its gradients are the differences of the two, weighted
        gradient[start:end].addmm_(p, z).addcmul_(p.sum(1, keepdim=True), block, value=-1)
        gradient.addmm_(p.T, block).addcmul_(p.sum(0)[:, None], z, value=-1)
    loss = (anchors - total if expected else total) / anchors.clamp(min=1)
    gradient /= anchors.clamp(min=1)
    return loss, gradient if order is None else torch.empty_like(gradient).index_copy_(0, order, gradient)


def _decays(distance: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(nearest - distance) and the distance of the nearest; infinite distances get next to nothing, not zero.

    Exponentials that underflow, and products of what is left, take many times as long as others on a CPU.
    """
    nearest = distance.amin(1, keepdim=True)
    least = nearest.masked_fill(nearest == torch.inf, 0)
    return torch.sub(least, distance, out=out).clamp_(min=_LOWEST).exp_(), nearest


def _partner_columns(y: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Where the partners of each block of rows begin and end: labels come sorted, soft ones may have any partner."""
    blocks = -(-len(y) // rows)
    if y.dim() == 2:
        return [0] * blocks, [len(y)] * blocks
    starts = y[::rows].contiguous()
    ends = y[torch.arange(blocks, device=y.device).mul_(rows).add_(rows - 1).clamp_(max=len(y) - 1)]
    first: list[int] = torch.searchsorted(y.contiguous(), starts).tolist()
    last: list[int] = torch.searchsorted(y.contiguous(), ends, right=True).tolist()
    return first, last


def _weights(y: Tensor, rows: slice, columns: slice) -> Tensor:
    """b_ij: whether the labels are equal, or the inner product of soft ones."""
    if y.dim() == 2:
        return y[rows] @ y[columns].T
    return (y[rows, None] == y[columns]).float()
