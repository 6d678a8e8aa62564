"""Which stored rows are nearest to a query: exact search in torch and in FAISS behind one contract, see `Index`."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from nnheads._exact import HalfKeys, SingleKeys
from nnheads._faiss import SinglePairs, faiss_available, load_faiss
from nnheads._index_base import METRICS, Index, Metric, is_single, unit_rows
from nnheads._lasting import lasting
from nnheads.approximate import ApproximateIndex
from nnheads.errors import ShapeError, unknown_name
from nnheads.search_costs import Plan, cost_model, engines_for, spend

__all__ = [
    "APPROXIMATE",
    "ENGINES",
    "METRICS",
    "ApproximateIndex",
    "AutoIndex",
    "Engine",
    "FaissIndex",
    "Index",
    "Metric",
    "Plan",
    "TorchIndex",
    "build_index",
    "unit_rows",
]

Engine = Literal["auto", "torch", "faiss", "ivf", "hnsw", "pq"]
"""What heads and `build_index` take as ``engine``: the names of `ENGINES`, exact, and of `APPROXIMATE`."""

ENGINES: tuple[Engine, ...] = ("auto", "torch", "faiss")
APPROXIMATE: tuple[Engine, ...] = ("ivf", "hnsw", "pq")

_COPY_SECONDS = 1.5e-9  # of making the bfloat16 copy, a number of the keys
_REFUSED = 0.05  # share of queries without a proof from which the plan is made anew


@final
class TorchIndex(Index):
    """Exact search by chunked matrix products and top-k; any device, float32 and float64.

    Equation: ``argmin_c |c|^2 - 2 q.c`` (L2; ``argmax_c q.c`` of unit vectors for cosine); L1 by ``torch.cdist``. Where
    the user allows reduced precision in float32 products (``torch.set_float32_matmul_precision``), the ranking has that
    precision.
    """

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        return self._by_torch(queries, k)


@final
class FaissIndex(Index):
    """Exact search by FAISS's brute force, reading the keys in place; float32.

    Where some rows are hidden, the active ones are copied together, lazily after each change. On a GPU (keys on CUDA)
    FAISS runs on torch's current stream and k is at most 2,048.

    Raises:
        ConfigError: FAISS cannot be imported.
    """

    def __init__(self, metric: Metric = "l2") -> None:
        super().__init__(metric)
        load_faiss()

    def build(self, keys: Tensor, active: Tensor | None = None) -> None:
        """As :meth:`Index.build`; float32 keys only."""
        if keys.dtype != torch.float32:
            raise ShapeError(f"FAISS searches float32 keys, got {keys.dtype}: use engine='torch'")
        super().build(keys, active)

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        return self._by_faiss(queries, k)


@final
class AutoIndex(Index):
    """Exact search by whichever engine is the fastest for the call; `explain_plan` says which and why.

    The engines are a matrix product with top-k, the same with a top-k in two stages, BLAS's matrix-vector product for
    one query, FAISS, and, where the device multiplies bfloat16 faster, a bfloat16 search with a float32 ranking of a
    few more candidates, where each query's answer is proved or else searched anew: results are those of float32. Their
    cost is predicted by `nnheads.search_costs`; how many threads BLAS takes is for the environment to say. The bfloat16
    copy takes half the bytes of the keys; it is made once searches have lost as much time without it as making it
    costs. L1 distances and float64 keys have one engine each.
    """

    def __init__(self, metric: Metric = "l2") -> None:
        super().__init__(metric)
        self._half: HalfKeys | None = None
        self._missed = 0.0  # seconds that a bfloat16 copy would have saved
        self._plans: dict[tuple[int, int], Plan] = {}
        self._single: dict[str, SingleKeys | SinglePairs] = {}  # by engine, made when first planned

    def search(self, queries: Tensor, k: int) -> Tensor:
        """As :meth:`Index.search`."""
        # One query among few keys takes as long as a dozen calls of torch: the rows found tell what is wrong with it.
        plan = self._plans.get((1, k))
        single = self._single.get(plan.engine) if plan is not None else None
        if plan is None or single is None or not is_single(queries, single.width):
            return super().search(queries, k)
        rows = single.nearest(queries, k)
        if rows is None:
            return super().search(queries, k)
        if spend(plan.seconds[plan.engine], queries.device):
            self._plans.clear()
        return rows

    def explain_plan(self, batch: int, k: int) -> Plan:
        """What would search ``batch`` queries for ``k`` neighbours, what each engine would take, and why.

        Raises:
            EmptyMemoryError: the index is not built.
        """
        keys = self._built_source()
        rows, width = self._extent, keys.shape[1]
        device, hidden = keys.device, self._findable < rows
        if self.metric == "l1":
            return Plan("faiss" if self._takes_faiss() else "torch", {}, "L1 distances have no matrix product")
        if keys.dtype != torch.float32 or device.type not in ("cpu", "cuda") or not self._findable:
            return Plan("torch", {}, f"{keys.dtype} keys on {device.type} are searched by torch alone")
        model = cost_model(device)
        strided = not keys.is_contiguous()  # BLAS and FAISS would copy them, FAISS those that are not hidden too
        wanted = min(k, self._findable)
        found = engines_for(device, 2 if strided and batch == 1 else batch, width, wanted)
        engines = [engine for engine in found if model.knows(engine, batch)]
        if hidden or strided:
            engines = [engine for engine in engines if not engine.startswith("faiss")]
        seconds = {engine: model.seconds(engine, rows, width, batch, wanted) for engine in engines}
        if not seconds:
            return Plan("torch", {}, f"the {model.source} cost model knows no other that can")
        if self._half is not None and seconds.keys() > {"bfloat16"}:
            others = min(each for engine, each in seconds.items() if engine != "bfloat16")
            seconds["bfloat16"] += self._half.refused * others
        return Plan(min(seconds, key=seconds.__getitem__), seconds, f"the least by the {model.source} cost model")

    def prepare(self, batch: int, k: int) -> Plan:
        """Make now what such searches will use, rather than when it has been missed enough; the plan for them."""
        plan = self.explain_plan(batch, k)
        if plan.engine == "bfloat16" and self._half is None:
            self._make_half()
        if batch == 1:
            self._make_single(plan.engine)
        return plan

    def _nearest(self, queries: Tensor, k: int) -> Tensor:
        call = queries.shape[0], k
        plan = self._plans.get(call) or self._plans.setdefault(call, self.explain_plan(*call))
        engine = plan.engine
        if engine == "bfloat16" and self._half is None:
            self._missed += plan.advantage
            if self._missed >= _COPY_SECONDS * self._extent * self._keys.shape[1]:
                self._make_half()
            else:
                engine = plan.without("bfloat16")
        if plan.seconds and spend(plan.seconds[engine], queries.device):
            self._plans.clear()
        if engine == "bfloat16" and self._half is not None:
            rows = self._half.nearest(queries, k, self._extent)
            if self._half.refused > _REFUSED:
                self._plans.clear()
            return rows
        if call[0] == 1:
            self._make_single(engine)
        if engine == "gemv":
            single = self._single.get(engine) or SingleKeys(*self._visible())
            found = single.nearest(queries, k)
            return self._by_torch(queries, k) if found is None else found
        if engine.startswith("faiss"):
            return self._by_faiss(queries, k)
        return self._by_torch(queries, k, two_stages=engine == "torch-groups")

    @lasting
    def _make_half(self) -> None:
        self._half = HalfKeys(self._keys, self._offset, self.metric == "cosine")

    def _make_single(self, engine: str) -> None:
        if self.metric != "l2" or engine in self._single:
            return
        if engine == "gemv":
            self._single[engine] = SingleKeys(*self._visible())
        elif engine == "faiss-pairs" and self._findable == self._extent:  # it cannot leave hidden rows out
            self._single[engine] = SinglePairs(self._visible()[0])

    def _changed(self, rows: Tensor | None) -> None:
        before = self._findable
        super()._changed(rows)
        self._single.clear()
        if rows is None or before != self._findable:
            self._plans.clear()
        if self._half is None:
            return
        if rows is None or 2 * len(rows) > len(self._keys):
            self._half = None  # with a mean of its own again
        else:
            self._half.update(rows)

    def _grown(self) -> None:
        self._plans.clear()
        self._single.clear()
        if self._half is not None:
            self._half.grow(self._keys, self._offset)

    def _takes_faiss(self) -> bool:
        keys = self._keys
        return keys.device.type == "cpu" and keys.dtype == torch.float32 and keys.is_contiguous() and faiss_available()


def build_index(engine: Engine = "auto", metric: Metric = "l2", *, exact: bool = True, recall: float = 0.95) -> Index:
    """An unbuilt index.

    Args:
        engine: exact: ``"torch"``, ``"faiss"``, or ``"auto"`` (default), which decides for each search; approximate, on
            CPUs: ``"ivf"``, ``"hnsw"`` or ``"pq"``, see `nnheads.approximate.ApproximateIndex`;
            fewer than 5,000 rows they search exactly.
        metric: ``"l2"`` (default), ``"l1"`` or ``"cosine"``.
        exact: whether ``"auto"`` must find the nearest rows; where it need not, it is ``"pq"``.
        recall: share of the nearest rows that an approximate engine is to find.

    Raises:
        UnknownNameError: an engine or a metric that is none of these.
        ConfigError: ``engine="faiss"`` where FAISS cannot be imported, or a recall outside (0, 1).
    """
    if engine == "auto" and not exact:
        engine = "pq"
    if engine == "ivf" or engine == "hnsw" or engine == "pq":
        return ApproximateIndex(metric, engine, recall=recall)
    engines: dict[str, type[Index]] = {"auto": AutoIndex, "torch": TorchIndex, "faiss": FaissIndex}
    if engine not in engines:
        raise unknown_name("search engine", engine, [*engines, *APPROXIMATE])
    return engines[engine](metric)
