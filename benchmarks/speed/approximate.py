"""The recall-speed curve of approximate search on real embeddings, beside the fastest exact search."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

from nnheads.approximate import ApproximateIndex
from nnheads.benchmarks.speed.embeddings import read_embeddings
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn
from nnheads.benchmarks.speed.search import SKLEARN, exact_contenders
from nnheads.index import APPROXIMATE, AutoIndex

_QUERIES, _K = 1000, 32


def rows(settings: Settings, report: Report) -> list[Row]:
    """Recall@32, the share of queries with the exact vote's class, and milliseconds of every engine at every effort."""
    kept, facts = read_embeddings(settings.embeddings, "train", "train_labels", "test")
    keys, labels = kept["train"], kept["train_labels"]
    queries = kept["test"][:_QUERIES].contiguous()
    if settings.quick:
        keys, labels = keys[:6000].contiguous(), labels[:6000]
    index = AutoIndex()
    index.build(keys)
    index.prepare(len(queries), _K)
    exact_rows = index.search(queries, _K)
    exact_classes = labels[exact_rows].mode(1).values
    contenders = {n: call for n, call in exact_contenders(index, keys, queries, _K).items() if n != SKLEARN}
    exact = in_turn(contenders, settings.rounds)
    base = exact.row("exact")
    name = exact.fastest(list(contenders))
    fastest = 1e3 * exact.median(name)
    base |= {"fastest": name, "centers": len(keys), "d": keys.shape[1], "embeddings": facts}
    found = [base]
    report(f"exact, {len(keys):,} x {keys.shape[1]}: " + ", ".join(f"{n} {ms:.3g} ms" for n, ms in base["ms"].items()))
    for kind in APPROXIMATE:
        if not settings.wants(kind):
            continue
        approximate = ApproximateIndex(kind=kind)  # type: ignore[arg-type]
        started = time.perf_counter()
        approximate.build(keys)
        approximate.search(queries, _K)
        built = time.perf_counter() - started
        report(f"{kind}: built and tuned in {built:.1f} s")
        for effort in [None, *approximate.efforts]:
            approximate.effort = effort
            near = approximate.search(queries, _K)
            ms = 1e3 * in_turn({OURS: partial(approximate.search, queries, _K)}, settings.rounds).median(OURS)
            row: Row = {
                "case": f"{kind}, {'chosen for recall 0.95' if effort is None else f'effort {effort}'}",
                "recall@32": recall(near, exact_rows),
                "same_class": float((labels[near].mode(1).values == exact_classes).double().mean()),
                "ms": {OURS: round(ms, 4)},
                "times_faster": fastest / ms,
                "times_faster_than_fastest_peer": base["ms"][base["fastest_peer"]] / ms,
                "build_seconds": built,
            }
            if effort is None:
                row["met"] = row["recall@32"] >= 0.95 and row["same_class"] >= 0.99 and row["times_faster"] >= 10
            found.append(row)
            report(
                f"{row['case']}: recall {row['recall@32']:.4f}, same class {row['same_class']:.4f}, {ms:.2f} ms, "
                f"{row['times_faster']:.1f} x the fastest exact ({name}), "
                f"{row['times_faster_than_fastest_peer']:.1f} x {base['fastest_peer']}"
            )
    return found


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact neighbours (B, k) among those found (B, k)."""
    hits = [torch.isin(a, b).double().mean() for a, b in zip(exact, found, strict=True)]
    return float(torch.stack(hits).mean())
