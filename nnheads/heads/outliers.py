"""How unlike stored samples something is."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..functional import Metric, auto_sigma, neighbor_distances
from ..index import build_index

OutlierScore = Literal["cosine", "distance", "density"]

_CHUNK = 1024


def outlier_scores(z: Tensor, keys: Tensor, kind: OutlierScore, k: int, metric: Metric) -> Tensor:
    """(B,) scores of rows (B, d) against keys (N, d); see `MemoryHead.outlier_scores`.

    Raises:
        ConfigError: an unknown kind, or ``k`` below 1.
    """
    if kind not in get_args(OutlierScore):
        raise unknown_name("outlier score", kind, get_args(OutlierScore))
    if k < 1:
        raise ConfigError(f"outlier scores: k must be 1 or more, got {k}")
    if not len(keys):
        return torch.full((len(z),), torch.inf, dtype=z.dtype, device=z.device)
    metric = "cosine" if kind == "cosine" else metric
    index = build_index("auto", metric)
    index.build(keys)
    k = min(k, len(keys))
    sigma = _width(keys, k, metric) if kind == "density" else None
    scores = []
    for part in z.split(_CHUNK):
        rows = index.search(part, k)
        if sigma is None:
            scores.append(neighbor_distances(part, keys[rows[:, -1:]], metric)[:, 0])
        else:
            sq = neighbor_distances(part, keys[rows], metric).square()
            scores.append(-torch.logsumexp(sq / (-2 * sigma * sigma), 1))
    return torch.cat(scores) if scores else z.new_zeros(0)


def _width(keys: Tensor, k: int, metric: Metric) -> Tensor:
    """The width at which the farthest of k neighbours of a stored sample weighs 5 % of the nearest."""
    rows = torch.linspace(0, len(keys) - 1, min(len(keys), _CHUNK), device=keys.device).long()
    index = build_index("auto", metric)
    index.build(keys)
    found = index.search(keys[rows], min(k + 1, len(keys)))
    distances = neighbor_distances(keys[rows], keys[found], metric)
    return auto_sigma(distances[:, min(1, distances.shape[1] - 1) :].square())
