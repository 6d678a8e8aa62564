"""A dense layer that only training uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._lasting import lasting
from .base import nll
from .dense import wider


class DenseObjective(nn.Module):
    """Cross-entropy of a dense layer on the embeddings, to train a backbone whose head decides by something else.

    Classes that no batch has shown yet are left out of its softmax. Pushing them down before they arrive would have to
    be unlearned in a class-incremental stream.

    Args:
        in_features: width d of the embeddings.
        num_classes: number of classes C.
    """

    seen: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, num_classes)
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of embeddings (B, d) with labels (B,) or soft labels (B, C); a scalar."""
        if self.training and len(y):
            self.seen[y.long() if y.dim() == 1 else (y > 0).any(0).nonzero().squeeze(1)] = True
        logits: Tensor = self.layer(z.to(self.layer.weight.dtype))
        return nll(logits.masked_fill(~self.seen, -1e4).log_softmax(-1), y)

    @lasting
    def widen(self, num_classes: int) -> None:
        """Make room for more classes."""
        more = num_classes - len(self.seen)
        if more > 0:
            self.layer = wider(self.layer, num_classes)
            self.seen = torch.cat([self.seen, self.seen.new_zeros(more)])
