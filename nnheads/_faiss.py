"""The one place that loads FAISS, and its brute-force search on tensors' own memory."""

from __future__ import annotations

import functools
import logging
import threading
from types import ModuleType
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from nnheads.errors import ConfigError

_GPU_TEMP_BYTES = 256 * 2**20  # FAISS would take 1.5 GB a device
GPU_MAX_K: Final = 2048  # a limit of FAISS's GPU kernels

_log = logging.getLogger(__name__)
_gpu = threading.local()  # StandardGpuResources are not thread-safe and cost about 100 ms each


def load_faiss() -> ModuleType:
    """FAISS, imported when first needed; ConfigError where it cannot be."""
    # torch is imported above: the other order has crashed or given wrong results on GPUs.
    try:
        import faiss
    except Exception as error:  # a broken binary raises more than ImportError
        raise ConfigError(
            f"this needs the package faiss-gpu or faiss-cpu ({_line(error)}): "
            "install it, or search with engine='torch' and keep the centers raw"
        ) from error
    module: ModuleType = faiss
    return module


@functools.cache
def faiss_available() -> bool:
    """Whether FAISS can be imported; where it cannot, one line in the log says so."""
    try:
        load_faiss()
    except ConfigError as error:
        _log.warning("searching with torch alone: %s", error)
        return False
    return True


@functools.cache
def faiss_gpu_available() -> bool:
    """Whether FAISS sees a GPU; where torch has one and FAISS does not, one line in the log says so."""
    if not faiss_available():
        return False
    seen = int(load_faiss().get_num_gpus()) > 0
    if not seen and torch.cuda.is_available():
        _log.warning("this FAISS build sees no GPU: torch searches there")
    return seen


def faiss_nearest(queries: Tensor, keys: Tensor, offset: Tensor, k: int, metric: str) -> Tensor:
    """Exact nearest rows by FAISS, with no copy of the tensors.

    Args:
        queries: (B, d) float32 on the keys' device (unit vectors for cosine).
        keys: (N, d) float32 on the CPU or a CUDA device (unit vectors for cosine); all of them may be found.
        offset: (N,) the keys' squared norms; read for L2 on the CPU alone.
        k: at most N.
        metric: ``"l2"``, ``"l1"`` or ``"cosine"``.

    Returns:
        (B, k) int64 rows, nearest first.

    Raises:
        ConfigError: FAISS is missing, sees no GPU where the keys are on one, or failed.
    """
    faiss = load_faiss()
    queries, keys = queries.contiguous(), keys.contiguous()
    if keys.is_cuda:
        return _gpu_nearest(queries, keys, k, metric)
    batch, (count, width) = queries.shape[0], keys.shape
    rows, distances = torch.empty(batch, k, dtype=torch.int64), np.empty((batch, k), np.float32)
    pointer = faiss.swig_ptr
    vectors = (pointer(queries.numpy()), pointer(keys.numpy()), width, batch, count)
    found = (pointer(distances), pointer(rows.numpy()))  # to make a tensor of an array takes longer
    try:
        if metric == "l1":
            faiss.knn_extra_metrics(*vectors, faiss.METRIC_L1, 0.0, k, *found)
        elif metric == "cosine":  # not L2: a key of zeros has no unit vector
            faiss.knn_inner_product(*vectors, k, *found)
        else:
            faiss.knn_L2sqr(*vectors, k, *found, pointer(offset.numpy()))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(f"FAISS {faiss.__version__} failed ({_line(error)}): use engine='torch'") from error
    return rows


@final
class SinglePairs:
    """Keys to compare single queries with, by FAISS on a CPU, and as few calls as there can be besides; for L2.

    Args:
        keys: (N, d) float32, contiguous, kept by reference; all of them may be found.
    """

    def __init__(self, keys: Tensor) -> None:
        faiss = load_faiss()
        self.width = keys.shape[1]
        self._search, self._pointer = faiss.knn_L2sqr, faiss.swig_ptr
        self._keys = keys.numpy()
        self._place = self._pointer(self._keys)

    def nearest(self, query: Tensor, k: int) -> Tensor | None:
        """(1, k) rows, nearest first, for a query (1, d); None where they are not all at a finite distance, or FAISS
        failed: `faiss_nearest` says how."""
        given = np.ascontiguousarray(query.numpy())
        distances, rows = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
        pointer = self._pointer
        sizes = self.width, 1, len(self._keys), k
        try:
            self._search(pointer(given), self._place, *sizes, pointer(distances), pointer(rows))
        except (AssertionError, RuntimeError, TypeError):
            return None
        return torch.from_numpy(rows) if rows[0, -1] >= 0 else None


def _gpu_nearest(queries: Tensor, keys: Tensor, k: int, metric: str) -> Tensor:
    faiss = load_faiss()
    if faiss.get_num_gpus() == 0:
        raise ConfigError("this FAISS build sees no GPU, and the keys are on CUDA: use engine='torch' or 'auto'")
    if k > GPU_MAX_K:
        raise ConfigError(f"FAISS on a GPU finds at most {GPU_MAX_K} neighbours, got k={k}: use engine='torch'")
    import faiss.contrib.torch_utils  # makes knn_gpu take torch tensors, on torch's current stream

    device = keys.device.index or 0
    with torch.cuda.device(device):
        kind = {"l2": faiss.METRIC_L2, "l1": faiss.METRIC_L1, "cosine": faiss.METRIC_INNER_PRODUCT}[metric]
        try:
            _, rows = faiss.knn_gpu(_gpu_resources(device), queries, keys, k, metric=kind, device=device)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ConfigError(f"FAISS {faiss.__version__} failed ({_line(error)}): use engine='torch'") from error
    found: Tensor = rows
    return found


def _gpu_resources(device: int) -> Any:
    """FAISS's scratch memory and handles: one a device and thread, kept."""
    kept: dict[int, Any] = _gpu.__dict__.setdefault("resources", {})
    if device not in kept:
        kept[device] = load_faiss().StandardGpuResources()
        kept[device].setTempMemory(_GPU_TEMP_BYTES)
    return kept[device]


def _line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
