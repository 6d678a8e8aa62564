"""A vote whose centers are the batch itself and the memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.errors import ConfigError
from nnheads.functional import class_log_probs, kernel_log_weights, squared_distances
from nnheads.heads.base import Head, nll
from nnheads.heads.kernel import KernelHead
from nnheads.heads.kernel_vote import KernelVoteHead


def votes_by_kernel(head: Head) -> KernelVoteHead:
    """The head, where its vote can count a batch's embeddings as centers.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(head, KernelVoteHead) or isinstance(head, KernelHead):
        raise ConfigError(
            f"batch_centers needs a head that votes with Gaussian kernels (impostor, nngk), not {head.name!r}"
        )
    return head


def vote_loss_with_batch(head: Head, z: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of a kernel vote over the k nearest of the batch's other embeddings and the stored centers.

    As in NCA the gradient reaches the centers of the batch too. A sample is no center of itself, and the stored center
    of any sample of the batch is left out, for the batch has a fresher one; stored centers of the batch then follow
    their samples.

    Args:
        head: see `votes_by_kernel`.
        z: (B, d) embeddings with a gradient.
        y: (B,) labels.
        ids: (B,) ids.

    Returns:
        A scalar.
    """
    voting = votes_by_kernel(head)
    z = F.normalize(z, dim=-1) if voting.normalize else z
    stored = voting.neighbors(z.detach(), ids=ids)
    memory = voting.memory
    rows = stored.rows
    sq = torch.cat(
        [
            squared_distances(z, z.unsqueeze(0).expand(len(z), -1, -1)),
            squared_distances(z, memory.keys[rows.clamp_min(0)]),
        ],
        dim=1,
    )
    others = ids.unsqueeze(0) != ids.unsqueeze(1)
    valid = torch.cat([others, (rows >= 0) & ~torch.isin(stored.ids, ids)], dim=1)
    labels = torch.cat([y.unsqueeze(0).expand(len(z), -1), stored.labels.clamp_min(0)], dim=1)
    k = min(voting.k, sq.shape[1])
    nearest = sq.detach().masked_fill(~valid, torch.inf).topk(k, largest=False).indices
    values = F.one_hot(labels.gather(1, nearest), voting.num_classes).to(z.dtype)
    weights = kernel_log_weights(sq.gather(1, nearest), voting.width(), valid.gather(1, nearest))
    loss = nll(class_log_probs(weights, values, voting.floor), y)
    own = memory.rows_of(ids)
    memory.write(own[own >= 0], z.detach()[own >= 0])
    return loss
