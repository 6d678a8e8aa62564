"""How long each engine takes to search exactly: a small cost model, fitted on this machine once and kept.

A search of B queries among N keys of d dimensions for k neighbours is taken to cost a sum of a few products of these
numbers. What each weighs is measured once, which takes some seconds, and written to ``search-costs.json`` in the user's
cache. That happens when a process has spent as long on searching; until then, figures of a server processor stand in.
``NNHEADS_SEARCH_COSTS`` names another file, or ``default`` to measure, read and write nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

from nnheads._exact import HalfKeys, SingleKeys, products_nearest
from nnheads._faiss import (
    GPU_MAX_K,
    SinglePairs,
    faiss_available,
    faiss_gpu_available,
    faiss_nearest,
    load_faiss,
)
from nnheads.devices import cpu_bfloat16, multiplies_bfloat16
from nnheads.errors import CheckpointError
from nnheads.storage import cache_root, replace_text

FAISS_PRODUCTS: Final = 128_000  # numbers in a batch from which FAISS 1.15 multiplies matrices
_WORTH_SECONDS: Final = 7.0  # about what measuring takes
_NEAR_BYTES: Final = 2**25  # of keys; where there are more, all of them come from memory in each search

# Of an Intel Xeon with AMX, one thread: seconds for each of `_terms`.
_DEFAULT: Final[dict[str, list[float]]] = {
    "gemv": [0.0, 0.0, 1.69e-10, 0.0, 0.0, 1.4e-9, 1.22e-10],
    "torch": [2.33e-5, 0.0, 2.81e-10, 1.23e-11, 3.28e-9, 4.33e-8, 3.16e-10],
    "torch-groups": [1.13e-4, 0.0, 2.74e-10, 1.3e-11, 1.88e-9, 1.62e-7, 3.27e-10],
    "bfloat16": [9.63e-4, 1.45e-6, 3.13e-10, 2.54e-12, 1.11e-9, 4.66e-10, 0.0],
    "bfloat16-one": [9.48e-4, 0.0, 1.84e-10, 0.0, 7.47e-9, 5.17e-9, 0.0],
    "faiss-pairs": [0.0, 0.0, 7.12e-10, 1.09e-10, 0.0, 5.45e-8, 3.14e-10],
    "faiss-pairs-one": [0.0, 0.0, 2.11e-10, 0.0, 0.0, 0.0, 1.4e-10],
    "faiss-products": [0.0, 0.0, 0.0, 2.03e-11, 0.0, 0.0, 0.0],
}

_log = logging.getLogger(__name__)
_models: dict[str, CostModel] = {}
_spent = 0.0


@final
@dataclass(frozen=True)
class CostModel:
    """Seconds a search takes.

    Attributes:
        weights: for each engine, seconds for each of its terms; ``-one`` behind it are those of a single query.
        source: ``"default"`` or ``"measured"``.
    """

    weights: dict[str, list[float]]
    source: str

    def knows(self, engine: str, batch: int) -> bool:
        """Whether it can tell."""
        return _row(engine, batch) in self.weights

    def seconds(self, engine: str, rows: int, width: int, batch: int, k: int) -> float:
        """Predicted for one search."""
        weights = self.weights[_row(engine, batch)]
        return sum(a * b for a, b in zip(weights, _terms(engine, rows, width, batch, k), strict=True))


@final
@dataclass(frozen=True)
class Plan:
    """What a search is done with.

    Attributes:
        engine: ``torch``, ``torch-groups`` (a top-k in two stages), ``gemv`` (one query, BLAS), ``bfloat16`` (proved in
            float32), ``faiss-pairs`` (few numbers in the batch) or ``faiss-products``.
        seconds: predicted for every engine that can do it; empty where nothing was to choose.
        reason: why, in a few words.
    """

    engine: str
    seconds: dict[str, float]
    reason: str

    @property
    def advantage(self) -> float:
        """Seconds by which the engine is faster than the next; infinite where there is none."""
        others = [seconds for engine, seconds in self.seconds.items() if engine != self.engine]
        return min(others, default=math.inf) - self.seconds[self.engine]

    def without(self, engine: str) -> str:
        """The fastest of the others."""
        return min((name for name in self.seconds if name != engine), key=self.seconds.__getitem__)

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in sorted(self.seconds.items(), key=lambda x: x[1]))
        return f"{self.engine}: {self.reason}" + (f" ({listed})" if listed else "")


def engines_for(device: torch.device, batch: int, width: int, k: int) -> list[str]:
    """Engines that can search float32 keys on a device with a batch of so many queries of so many numbers, for k rows
    each."""
    found = ["gemv"] if batch == 1 and device.type == "cpu" else ["torch", "torch-groups"]
    if multiplies_bfloat16(device):
        found.append("bfloat16")
    if device.type == "cpu" and faiss_available():
        found.append("faiss-products" if batch * width >= FAISS_PRODUCTS else "faiss-pairs")
    elif device.type == "cuda" and k <= GPU_MAX_K and faiss_gpu_available():
        found.append("faiss-products")
    return found


def cost_model(device: torch.device) -> CostModel:
    """The model for a device: measured before, or the default."""
    key = _key(device)
    if key not in _models:
        kept = _read().get(key)
        default = CostModel(_DEFAULT if device.type == "cpu" else {"torch": _DEFAULT["torch"]}, "default")
        _models[key] = default if kept is None else CostModel(kept, "measured")
    return _models[key]


def spend(seconds: float, device: torch.device) -> bool:
    """Count the predicted cost of a search; measure when as much was spent as measuring takes. Whether it did."""
    global _spent
    _spent += seconds
    if _spent < _WORTH_SECONDS:
        return False
    _spent = 0.0  # looked at again after as long
    if cost_model(device).source == "measured" or _file() is None:
        return False
    fit_costs(device)
    return True


def fit_costs(device: torch.device) -> CostModel:
    """Measure on this machine now, use it from here on and keep it for later processes."""
    started = time.perf_counter()
    model = CostModel(_fit(device), "measured")
    key = _key(device)
    _models[key] = model
    file = _file()
    if file is not None:
        try:
            replace_text(file, json.dumps({**_read(), key: model.weights}, indent=1))
        except CheckpointError as error:
            _log.warning("search costs are measured but not kept: %s", error)
    _log.info("search costs of %s measured in %.1f s", device, time.perf_counter() - started)
    return model


def _terms(engine: str, rows: int, width: int, batch: int, k: int) -> tuple[float, ...]:
    read, multiplied, selected = float(rows * width), float(batch * rows * width), float(batch * rows)
    half = engine == "bfloat16"
    last = float(batch * (k + max(16, k // 2)) * width) if half else float(batch * k)
    if engine == "gemv":
        last = float(rows) if k > 1 else 0.0  # a partition looks at all of them
    far = read if (2 if half else 4) * read > _NEAR_BYTES else 0.0
    return 1.0, float(batch), read, multiplied, selected, last, far


def _row(engine: str, batch: int) -> str:
    """Whose weights a search has."""
    return f"{engine}-one" if batch == 1 and engine in ("bfloat16", "faiss-pairs") else engine


def _fit(device: torch.device) -> dict[str, list[float]]:
    from scipy.optimize import nnls

    seen: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for rows, width, batch, k, engine, search in _probes(device):
        seen.setdefault(_row(engine, batch), []).append(
            (_terms(engine, rows, width, batch, k), _best_of(search, device))
        )
    weights = {}
    for engine, found in seen.items():
        # relative errors count: a small search matters as much as a large one
        scaled = [[term / seconds for term in terms] for terms, seconds in found]
        weights[engine] = [float(w) for w in nnls(scaled, [1.0] * len(found))[0]]
    return weights


def _probes(device: torch.device) -> Iterator[tuple[int, int, int, int, str, Callable[[], object]]]:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((2_000, 64), (2_000, 512), (16_000, 64), (16_000, 512), (50_000, 256), (200_000, 64)):
        keys = torch.randn(rows, width, generator=generator).to(device)
        offset = keys.square().sum(1)
        half = HalfKeys(keys, offset, inner=False) if multiplies_bfloat16(device) else None
        for batch, k in ((1, 1), (1, 32), (16, 32), (128, 1), (128, 32), (512, 32)):
            if batch * rows * width > 2**31:
                continue
            queries = torch.randn(batch, width, generator=generator).to(device)
            for engine in engines_for(device, batch, width, k):
                if engine == "faiss-pairs" and batch * rows * width > 2**28:
                    continue
                yield rows, width, batch, k, engine, _search(engine, queries, keys, offset, k, half)


def _search(
    engine: str, queries: Tensor, keys: Tensor, offset: Tensor, k: int, half: HalfKeys | None
) -> Callable[[], object]:
    if engine == "bfloat16" and half is not None:
        return lambda: half.nearest(queries, k)
    if engine == "gemv":
        single = SingleKeys(keys, offset)
        return lambda: single.nearest(queries, k)
    if engine == "faiss-pairs" and len(queries) == 1:
        pairs = SinglePairs(keys)
        return lambda: pairs.nearest(queries, k)
    if engine.startswith("faiss"):
        return lambda: faiss_nearest(queries, keys, offset, k, "l2")
    return lambda: products_nearest(queries, keys, offset, k, two_stages=engine == "torch-groups")


def _best_of(search: Callable[[], object], device: torch.device, times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        search()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > 0.25:
            break
    return min(seconds)


def _key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    faiss = load_faiss().__version__ if faiss_available() else "none"
    blas = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "own"  # of single queries
    return f"{name}; {torch.get_num_threads()} threads, BLAS {blas}; torch {torch.__version__}; faiss {faiss}; 3"


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {platform.processor()} {capability} {cpu_bfloat16()}"


def _file() -> Path | None:
    given = os.environ.get("NNHEADS_SEARCH_COSTS")
    if given == "default":
        return None
    return Path(given).expanduser() if given else cache_root() / "search-costs.json"


def _read() -> dict[str, dict[str, list[float]]]:
    file = _file()
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(key): {name: [float(w) for w in weights[name]] for name in weights if name in _DEFAULT}
            for key, weights in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _log.warning("search costs in %s cannot be read (%s): measured anew", file, error)
        return {}
