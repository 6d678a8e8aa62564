"""The equations of nearest-neighbour heads, as plain differentiable functions.

Every function is batch-first, takes and returns torch tensors, keeps the dtype it is given and holds no state; but
what returns logarithms of weights or shares takes float16 to float32, as float16 has no number that is small enough.
The sources are: NCA, Goldberger et al. 2004 in the batch form of Conv-KNN; nearest-neighbour Gaussian kernels (NNGK),
Meyer et al. 2017; impostor networks, Lebedev et al. 2018; the influence of a center, equations 10 to 13 of
Chervontsev's review of the two.

Kernel ratios are computed as a softmax over neighbours: in float32 the literal ratio is 0/0 from a squared distance
of about 200 sigma squared on.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnheads._nca import NCALoss

Metric = Literal["l2", "l1", "cosine"]
Vote = Literal["uniform", "distance", "gaussian"]

# Stands for minus infinity. A finite number, because the gradient of logsumexp over nothing but -inf is NaN.
_NEVER = -1e30


def _wide(x: Tensor) -> Tensor:
    """float32 in place of float16, which has no number like `_NEVER`; others as they are."""
    return x.float() if x.dtype == torch.float16 else x


def neighbor_distances(z: Tensor, neighbors: Tensor, metric: Metric = "l2") -> Tensor:
    """Distance of each embedding to its own neighbours.

    Args:
        z: (B, d) embeddings.
        neighbors: (B, k, d) the neighbours of each.
        metric: ``"l2"`` Euclidean, ``"l1"`` city block, ``"cosine"`` one minus the cosine of the angle.

    Returns:
        (B, k) distances. The Euclidean distance has a zero gradient, not NaN, where two points coincide.
    """
    if metric == "cosine":
        return 1 - F.cosine_similarity(z.unsqueeze(1), neighbors, dim=-1)
    if metric == "l1":
        return (z.unsqueeze(1) - neighbors).abs().sum(-1)
    return safe_sqrt(squared_distances(z, neighbors))


def squared_distances(z: Tensor, neighbors: Tensor, *, overwrite: bool = False) -> Tensor:
    """Squared Euclidean distance of each embedding (B, d) to its own neighbours (B, k, d), as (B, k).

    From differences, not from the expanded square: near a center the expansion loses every digit in float32. The
    differences are made once and serve the gradient as well, whose own gradient is not defined: autograd would pass
    over (B, k, d) numbers eight times, and that was most of what a vote cost.

    Args:
        z: (B, d) embeddings.
        neighbors: (B, k, d) the neighbours of each; the wider dtype of the two is computed in.
        overwrite: whether ``neighbors``, a copy of the caller's that needs no gradient, may be overwritten.
    """
    wide = torch.promote_types(z.dtype, neighbors.dtype)
    distances: Tensor = _SquaredDistances.apply(z.to(wide), neighbors.to(wide), overwrite)
    return distances


class _SquaredDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, neighbors: Tensor, overwrite: bool) -> Tensor:
        here = z.unsqueeze(1)
        away = neighbors.sub_(here) if overwrite and not ctx.needs_input_grad[1] else neighbors - here
        ctx.save_for_backward(away)
        norms: Tensor = torch.linalg.vector_norm(away, dim=-1)
        return norms.square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (away,) = ctx.saved_tensors
        of_z, of_neighbors = ctx.needs_input_grad[:2]
        return (
            torch.bmm(grad.unsqueeze(1), away).squeeze(1).mul_(-2) if of_z else None,
            (2 * grad).unsqueeze(-1) * away if of_neighbors else None,
            None,
        )


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero instead of infinite. Elementwise, any shape, x >= 0."""
    positive = x > 0
    return torch.where(positive, x, torch.ones_like(x)).sqrt() * positive


def kernel_log_weights(
    sq_distances: Tensor, sigma: Tensor | float, valid: Tensor | None = None, log_w: Tensor | None = None
) -> Tensor:
    """Log share of each neighbour in a Gaussian kernel vote.

    ``log( w_i k(z, c_i) / sum_j w_j k(z, c_j) )`` with ``k = exp(-d^2 / (2 sigma^2))``: the weights of equations 7 and
    9 of the review (NNGK with w, impostor without).

    Args:
        sq_distances: (B, k) squared distances.
        sigma: width of the kernel, in units of distance.
        valid: (B, k) True where a slot holds a neighbour; all by default.
        log_w: (B, k) logarithm of the per-sample weights; zero by default.

    Returns:
        (B, k) log weights; their exponentials sum to one over the valid slots, invalid slots are about -1e30.
    """
    scores = _wide(sq_distances) / (-2 * sigma * sigma)
    if log_w is not None:
        scores = scores + log_w
    if valid is None:
        return scores.log_softmax(-1)
    return scores.masked_fill(~valid, _NEVER).log_softmax(-1).masked_fill(~valid, _NEVER)


def class_log_probs(log_weights: Tensor, values: Tensor, floor: float = 1e-6) -> Tensor:
    """Log-probabilities of the classes from weighted neighbours: ``log sum_i weight_i values_i``.

    A class that no neighbour has, or whose share is below ``floor``, gets ``floor`` before the result is normalised.
    The gradient passes as if there were no floor wherever a neighbour has the class: a share of exp(-50) still pulls.

    Args:
        log_weights: (B, k) from `kernel_log_weights` or the logarithm of any weights that sum to one.
        values: (B, k, C) label of each neighbour as a distribution over the classes.
        floor: smallest probability of a class before normalising, in (0, 1).

    Returns:
        (B, C) log-probabilities whose exponentials sum to one; uniform where no slot is valid.
    """
    return floored_log_probs(log_shares(log_weights, values), floor)


def log_shares(log_weights: Tensor, values: Tensor) -> Tensor:
    """``log sum_i weight_i values_i`` (B, C), however small; below -1e29 where no neighbour has the class. Arguments as
    in `class_log_probs`."""
    log_weights, values = _wide(log_weights), _wide(values)
    log_values = values.clamp_min(torch.finfo(values.dtype).tiny).log().masked_fill(values <= 0, _NEVER)
    return torch.logsumexp(log_weights.unsqueeze(-1) + log_values, dim=1)


def floored_log_probs(log_p: Tensor, floor: float = 1e-6) -> Tensor:
    """Logarithms of shares (B, C) with the floor of `class_log_probs`, normalised."""
    log_p, log_floor = _wide(log_p), math.log(floor)
    log_p = torch.where(log_p > _NEVER / 2, log_p, torch.full_like(log_p, log_floor))
    log_p = log_p + (log_p.clamp_min(log_floor) - log_p).detach()
    return log_p.log_softmax(-1)


def vote_log_weights(distances: Tensor, valid: Tensor, vote: Vote = "uniform", sigma: Tensor | float = 1.0) -> Tensor:
    """Log weights of a k-nearest-neighbour vote.

    Args:
        distances: (B, k) distances in the metric of the search.
        valid: (B, k) True where a slot holds a neighbour.
        vote: ``"uniform"`` all equal; ``"distance"`` by inverse distance, where a neighbour at distance zero takes
            the whole vote as in scikit-learn; ``"gaussian"`` by ``exp(-d^2 / (2 sigma^2))``.
        sigma: width of the Gaussian vote, in units of distance.

    Returns:
        (B, k) log weights whose exponentials sum to one over the valid slots.
    """
    distances = _wide(distances)
    if vote == "gaussian":
        return kernel_log_weights(distances.square(), sigma, valid)
    if vote == "distance":
        # A distance of zero stands for an infinite weight: far beyond any ratio of float distances, yet finite.
        scores = -distances.clamp_min(torch.finfo(distances.dtype).tiny).log()
        scores = torch.where(distances > 0, scores, torch.full_like(scores, -_NEVER * 1e-20))
    else:
        scores = torch.zeros_like(distances)
    return scores.masked_fill(~valid, _NEVER).log_softmax(-1).masked_fill(~valid, _NEVER)


def vote_log_probs(log_weights: Tensor, values: Tensor, count: Tensor, smoothing: float = 1.0) -> Tensor:
    """Class log-probabilities of a vote, smoothed so that a class without votes has a finite log-loss.

    ``p_c = (n v_c + smoothing / C) / (n + smoothing)`` with v_c the class's share of the votes and n the number of
    neighbours: ``smoothing`` extra votes spread evenly over the C classes (a symmetric Dirichlet prior).

    Args:
        log_weights: (B, k) from `vote_log_weights`.
        values: (B, k, C) label of each neighbour as a distribution over the classes.
        count: (B,) number of neighbours found.
        smoothing: number of extra votes, > 0.

    Returns:
        (B, C) log-probabilities; uniform where ``count`` is zero.
    """
    return smoothed_share(torch.einsum("bk,bkc->bc", log_weights.exp(), values), count, smoothing)


def smoothed_share(share: Tensor, count: Tensor, smoothing: float = 1.0) -> Tensor:
    """`vote_log_probs` of what each class has of the votes, (B, C)."""
    n = count.to(share.dtype).unsqueeze(-1)
    return ((n * share + smoothing / share.shape[-1]) / (n + smoothing)).log()


def kernel_neuron(kernels: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    """Output of the kernel neuron before its activation: ``sum_i alpha_i k(z, c_i) + beta`` (review, equations 4, 6).

    Args:
        kernels: (B, k) values of the kernel at the centers that count.
        alpha: (B, k, C) their weights for each class, or (k, C) where all rows share the centers.
        bias: (C,).

    Returns:
        (B, C) logits.
    """
    if alpha.dim() == 2:
        return kernels @ alpha + bias
    return torch.einsum("bk,bkc->bc", kernels, alpha) + bias


def auto_sigma(sq_distances: Tensor, ratio: float = 0.05) -> Tensor:
    """Width at which the farthest neighbour weighs ``ratio`` of the nearest, in the median over the queries.

    Solves ``exp(-(d_k^2 - d_1^2) / (2 sigma^2)) = ratio``. A width set from the distance to the k-th neighbour itself
    would make all k weigh the same, because distances concentrate in many dimensions.

    Args:
        sq_distances: (n, k) squared distances, nearest first; rows of NaN are left out.
        ratio: in (0, 1).

    Returns:
        A scalar, in units of distance; where all k are equally far, the width at which they weigh ``ratio`` of a
        neighbour at no distance, and 1 where all distances are zero. NaN where there are no others.
    """
    spread = (sq_distances[:, -1] - sq_distances[:, 0]).nanmedian()
    spread = torch.where(spread <= 0, sq_distances.nanmedian(), spread)
    return torch.where(spread <= 0, 1.0, spread / (2 * math.log(1 / ratio))).sqrt()


def nearest_sigma(sq_distances: Tensor) -> Tensor:
    """Width at which the kernel of the nearest neighbour is ``exp(-1/2)``, in the median over the queries.

    For sums of kernels that nothing normalizes, such as the kernel neuron's: with the sharper width of `auto_sigma` all
    kernels can vanish at once, and the gradient with them.

    Args:
        sq_distances: (n, k) squared distances, nearest first; rows of NaN are left out.

    Returns:
        A scalar, in units of distance; 1 where all distances are zero. NaN where there are no others.
    """
    nearest = sq_distances[:, 0].nanmedian()
    nearest = torch.where(nearest <= 0, sq_distances.nanmean(), nearest)
    return torch.where(nearest <= 0, 1.0, nearest).sqrt()


def nca_loss(
    z: Tensor,
    y: Tensor,
    objective: Literal["expected", "log"] = "expected",
    distance: Literal["euclidean", "sqeuclidean"] = "euclidean",
) -> Tensor:
    """Neighbourhood component analysis on a batch, leave-one-out.

    ``p_ij`` is the softmax over j != i of minus the distance of z_i and z_j, ``p_i = sum_j p_ij b_ij`` with b_ij = 1
    where the labels are equal. Anchors without a partner of their class in the batch are left out of the mean; with
    none at all the loss is a zero that still has a gradient (of zero). Computed in blocks of rows, loss and gradient in
    one pass: O(B d) memory, no second derivatives, no gradient at soft labels. Half precision is computed in float32.

    Args:
        z: (B, d) embeddings.
        y: (B,) int64 labels, or (B, C) soft labels, for which b_ij is the inner product of the two.
        objective: ``"expected"`` is the Conv-KNN paper's ``1 - mean p_i``, whose gradient vanishes where p_i is near
            zero; ``"log"`` is ``-mean log p_i``.
        distance: ``"euclidean"`` (the paper) or ``"sqeuclidean"`` (Goldberger et al.).

    Returns:
        A scalar.
    """
    if not len(z):
        return z.sum() * 0
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    labels = y if y.dim() == 1 else y.detach().to(z.dtype)
    loss: Tensor = NCALoss.apply(z, labels, objective == "expected", distance == "euclidean")
    return loss


def influence(k0: Tensor, total: Tensor, y0: Tensor, prediction: Tensor) -> Tensor:
    """First-order change of a prediction when a center gains a little weight (review, equation 13).

    ``I_0(z) = k(z, z_0) / S (y_0 - y^(z))``. The y_j of the printed equation is the prediction at z_j, which is what
    the derivative in equation 12 contains; it is not the label stored there.

    Args:
        k0: (n,) kernel between each point and the center.
        total: (n,) S, sum of the kernels at each point over its neighbours, before the change.
        y0: (C,) label of the center.
        prediction: (n, C) predictions before the change.

    Returns:
        (n, C) change of the predictions.
    """
    return (k0 / total).unsqueeze(-1) * (y0 - prediction)


def influence_of_adding(k0: Tensor, total: Tensor, y0: Tensor, prediction: Tensor) -> Tensor:
    """Exact change of the predictions when a center enters and no other neighbour leaves: ``k0/(S+k0) (y0 - y^)``.

    Arguments and result as in `influence`.
    """
    return (k0 / (total + k0)).unsqueeze(-1) * (y0 - prediction)


def influence_of_dropping(k0: Tensor, total: Tensor, y0: Tensor, prediction: Tensor) -> Tensor:
    """Exact change of the predictions when a center leaves and no other neighbour enters: ``-k0/(S-k0) (y0 - y^)``.

    Arguments and result as in `influence`; ``total`` includes the center. Where the center is all there is, its
    prediction has nothing to fall back on and the change is returned as zero.
    """
    rest = total - k0
    alone = rest <= torch.finfo(total.dtype).eps * total
    share = torch.where(alone, torch.zeros_like(k0), k0 / torch.where(alone, torch.ones_like(rest), rest))
    return -share.unsqueeze(-1) * (y0 - prediction)


def project_to_simplex(v: Tensor) -> Tensor:
    """Nearest point (Euclidean) of the probability simplex to each row of ``v`` (n, C), by sorting."""
    u, _ = v.sort(dim=-1, descending=True)
    excess = u.cumsum(-1) - 1
    positions = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    support = (u * positions > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support.to(v.dtype)
    return (v - threshold).clamp_min(0)
