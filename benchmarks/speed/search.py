"""Exact search: ``engine="auto"`` beside FAISS flat, torch's matmul with topk, and scikit-learn's brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from nnheads._faiss import load_faiss
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn
from nnheads.index import AutoIndex
from nnheads.search_costs import fit_costs

FAISS, TORCH, SKLEARN = "FAISS flat", "torch matmul + topk", "scikit-learn brute"
_SLACK_MS = 0.05


def rows(settings: Settings, report: Report) -> list[Row]:
    """Milliseconds of every contender in every cell, with the plan that auto followed."""
    sizes = (10_000,) if settings.quick else (10_000, 50_000, 500_000)
    model = fit_costs(torch.device("cpu"))
    found = []
    for count in sizes:
        for width in (64, 512):
            cells = [(batch, k) for batch in (1, 128, 1000) for k in (1, 32)]
            named = {f"N {count:,}, d {width}, batch {b:,}, k {k}": (b, k) for b, k in cells}
            wanted = {case: cell for case, cell in named.items() if settings.wants(case)}
            if not wanted:
                continue
            keys = _keys(count, width, 0)
            index = AutoIndex()
            index.build(keys)
            peers = Peers(keys)
            for case, (batch, k) in wanted.items():
                queries = _keys(batch, width, 1)
                plan = index.prepare(batch, k)
                calls = peers.contenders(index, queries, k)
                agree = float((calls[OURS]() == calls[TORCH]()).double().mean())  # type: ignore[attr-defined]
                row = in_turn(calls, settings.rounds, warm_up=2).row(case)
                ms = row["ms"]
                best = ms[row["fastest_peer"]]
                row["plan"], row["plan_ms"] = plan.engine, round(1e3 * plan.seconds[plan.engine], 4)
                row["same_rows_as_torch"] = agree
                row["met"] = (row["ratio"] <= 1.1 or ms[OURS] <= best + _SLACK_MS) and ms[OURS] < ms[SKLEARN]
                found.append(row)
                others = ", ".join(f"{name} {ms[name]:.3g}" for name in (FAISS, TORCH, SKLEARN))
                report(f"{case}: {ms[OURS]:.3g} ms by {plan.engine}; {others}; ratio {row['ratio']:.3f}")
    report(f"cost model: {model.source}, {len(model.weights)} engines")
    return found


def _keys(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@final
class Peers:
    """The peers, fitted to keys (N, d)."""

    def __init__(self, keys: Tensor) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.keys, self.norms = keys, keys.square().sum(1)
        self.flat = load_faiss().IndexFlatL2(keys.shape[1])
        self.flat.add(keys.numpy())
        self.neighbors = NearestNeighbors(algorithm="brute").fit(keys.numpy())

    def contenders(self, index: AutoIndex, queries: Tensor, k: int) -> dict[str, Callable[[], object]]:
        return {
            OURS: lambda: index.search(queries, k),
            FAISS: lambda: self.flat.search(queries.numpy(), k),
            TORCH: lambda: self._by_torch(queries, k),
            SKLEARN: lambda: self.neighbors.kneighbors(queries.numpy(), k, return_distance=False),
        }

    def _by_torch(self, queries: Tensor, k: int) -> Tensor:
        part = max(1, 2**26 // len(self.keys))  # what a user would do so that distances fit
        distances = (torch.addmm(self.norms, some, self.keys.T, alpha=-2) for some in queries.split(part))
        return torch.cat([some.topk(k, dim=1, largest=False).indices for some in distances])
