"""The recall-speed curve of approximate search on real embeddings, beside the fastest exact search."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nnheads.approximate import ApproximateIndex, Effort
from nnheads.benchmarks.speed.embeddings import read_embeddings
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn
from nnheads.benchmarks.speed.search import SKLEARN, Peers
from nnheads.index import APPROXIMATE, AutoIndex

_QUERIES, _K = 1000, 32
_SINGLE = 100  # of the queries, given one at a time
AT_ONCE, ONE_BY_ONE = "all at once", "one at a time"
EXACT = "the fastest exact search"
_BAR = 10.0
_MORE = 0.99  # recall, asked for to keep the class


def rows(settings: Settings, report: Report) -> list[Row]:
    """Recall@32, the share of queries with the exact vote's class, and time of every engine at every effort.

    Queries are given all at once, and one at a time; milliseconds are of all of them, and of one. Approximate searches
    take turns with the fastest exact one.
    """
    kept, facts = read_embeddings(settings.embeddings, "train", "train_labels", "test")
    keys, labels = kept["train"], kept["train_labels"]
    queries = kept["test"][:_QUERIES].contiguous()
    if settings.quick:
        keys, labels = keys[:6000].contiguous(), labels[:6000]
    index = AutoIndex()
    index.build(keys)
    found, fastest = _exact(index, keys, queries, settings, report)
    found[0] |= {"centers": len(keys), "d": keys.shape[1], "embeddings": facts}
    exact_rows = index.search(queries, _K)
    exact_classes = labels[exact_rows].mode(1).values
    for kind in APPROXIMATE:
        if not settings.wants(kind):
            continue
        built = {asked: _built(kind, asked, keys, queries, report) for asked in (0.95, _MORE)}
        usual, seconds = built[0.95]
        cases: list[tuple[ApproximateIndex, Effort | None, str]]
        cases = [(each, None, f"chosen for recall {asked}") for asked, (each, _) in built.items()]
        cases += [(usual, effort, f"effort {effort}") for effort in usual.efforts]
        for approximate, effort, title in cases:
            approximate.effort = effort
            near = approximate.search(queries, _K)
            row: Row = {
                "case": f"{kind}, {title}",
                "recall@32": recall(near, exact_rows),
                "same_class": float((labels[near].mode(1).values == exact_classes).double().mean()),
                "build_seconds": seconds,
                "ms": {},
                "times_faster": {},
            }
            for mode, call in _modes(partial(approximate.search, k=_K), queries).items():
                timings = in_turn({OURS: call, EXACT: fastest[mode]}, settings.rounds, patient=True)
                row["ms"][mode] = round(1e3 * timings.median(OURS) / _parts(mode), 4)
                row["times_faster"][mode] = timings.ratio(EXACT, OURS)
            if effort is None:
                kept_class = row["recall@32"] >= 0.95 and row["same_class"] >= 0.99
                row["met"] = kept_class and row["times_faster"][AT_ONCE] >= _BAR
                row["met_one_at_a_time"] = kept_class and row["times_faster"][ONE_BY_ONE] >= _BAR
            found.append(row)
            speed = ", ".join(f"{mode} {row['ms'][mode]:.3g} ms, {row['times_faster'][mode]:.1f} x" for mode in fastest)
            report(f"{row['case']}: recall {row['recall@32']:.4f}, same class {row['same_class']:.4f}; {speed}")
    for mode in fastest:
        found.append(_best(found, mode))
        report(f"{found[-1]['case']}: {found[-1]['by']}, {found[-1]['times_faster']:.1f} x")
    return found


def _built(kind: str, recall: float, keys: Tensor, queries: Tensor, report: Report) -> tuple[ApproximateIndex, float]:
    started = time.perf_counter()
    index = ApproximateIndex(kind=kind, recall=recall)  # type: ignore[arg-type]
    index.build(keys)
    index.search(queries, _K)
    seconds = time.perf_counter() - started
    report(f"{kind}: built and tuned for a recall of {recall} in {seconds:.1f} s")
    return index, seconds


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact neighbours (B, k) among those found (B, k)."""
    hits = [torch.isin(a, b).double().mean() for a, b in zip(exact, found, strict=True)]
    return float(torch.stack(hits).mean())


def _exact(
    index: AutoIndex, keys: Tensor, queries: Tensor, settings: Settings, report: Report
) -> tuple[list[Row], dict[str, Callable[[], object]]]:
    """A row and the fastest exact search for each way of giving the queries."""
    peers, found = Peers(keys), []
    fastest: dict[str, Callable[[], object]] = {}
    for mode, batch in ((AT_ONCE, len(queries)), (ONE_BY_ONE, 1)):
        index.prepare(batch, _K)
        names = [name for name in peers.contenders(index, queries, _K) if name != SKLEARN]
        calls = {name: _modes(partial(_exact_call, peers, index, name), queries)[mode] for name in names}
        timings = in_turn(calls, settings.rounds)
        row = timings.row(f"exact, {mode}")
        row["ms"] = {name: round(ms / _parts(mode), 4) for name, ms in row["ms"].items()}
        row["fastest"] = timings.fastest(names)
        fastest[mode] = calls[row["fastest"]]
        found.append(row)
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in row["ms"].items())
        report(f"{row['case']}, {len(keys):,} x {keys.shape[1]}: {times}")
    return found, fastest


def _exact_call(peers: Peers, index: AutoIndex, name: str, queries: Tensor) -> object:
    return peers.contenders(index, queries, _K)[name]()


def _modes(search: Callable[[Tensor], object], queries: Tensor) -> dict[str, Callable[[], object]]:
    """The queries all at once, and some of them one at a time."""
    single = list(queries[:_SINGLE].split(1))

    def one_by_one() -> None:
        for query in single:
            search(query)

    return {AT_ONCE: partial(search, queries), ONE_BY_ONE: one_by_one}


def _parts(mode: str) -> int:
    return 1 if mode == AT_ONCE else _SINGLE


def _best(found: list[Row], mode: str) -> Row:
    """The fastest that finds 95 % of the neighbours and the same class for 99 % of the queries: known afterwards only,
    so that it is told, and the library's own choices are judged."""
    able = [row for row in found if row.get("recall@32", 0) >= 0.95 and row["same_class"] >= 0.99]
    best = max(able, key=lambda row: float(row["times_faster"][mode]), default=None)
    times = 0.0 if best is None else float(best["times_faster"][mode])
    case = f"fastest of those that keep the class, {mode}"
    return {"case": case, "by": best and best["case"], "times_faster": times}
