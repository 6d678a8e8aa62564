"""The NCA loss in blocks beside pytorch-metric-learning's NCALoss: time, and peak memory in processes of their own.

And a linear map learned with it beside scikit-learn's NeighborhoodComponentsAnalysis: L-BFGS from the same start.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nnheads.benchmarks.speed.embeddings import read_embeddings
from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn, needs
from nnheads.functional import nca_loss

PEER = "pytorch-metric-learning NCALoss"
SKLEARN = "scikit-learn NeighborhoodComponentsAnalysis"
_CLASSES = 100
_STEPS = 10  # of L-BFGS


def rows(settings: Settings, report: Report) -> list[Row]:
    """Time of loss and gradient at each size, the peak memory at the largest, and the time of learning a linear map."""
    needs("pytorch-metric-learning")
    sizes = (256, 512) if settings.quick else (256, 512, 1024, 2048, 4096, 8192)
    found = []
    for width in (64, 512):
        for size in sizes:
            case = f"batch {size:,}, d {width}"
            if not settings.wants(case):
                continue
            row = in_turn({name: _step(name, size, width) for name in (OURS, PEER)}, settings.rounds).row(case)
            row["met"] = row["ratio"] <= 1.0
            found.append(row)
            report(f"{case}: {row['ms'][OURS]:.2f} ms, {PEER} {row['ms'][PEER]:.2f} ms, ratio {row['ratio']:.3f}")
    case = f"memory at batch {sizes[-1]:,}, d 64"
    if settings.wants(case):
        memory = {name: _peak_bytes(name, sizes[-1], 64) for name in (OURS, PEER)}
        ratio = memory[OURS] / memory[PEER]
        found.append({"case": case, "bytes": memory, "ratio": ratio, "met": ratio <= 1 / 8})
        report(f"{case}: {memory[OURS] / 2**20:.1f} MB, {PEER} {memory[PEER] / 2**20:.1f} MB, ratio {ratio:.3f}")
    return found + _maps(settings, report)


def _maps(settings: Settings, report: Report) -> list[Row]:
    """Milliseconds of learning a linear map in as many steps from the same start, and the loss it ends with."""
    found = []
    for title, x, y, width in _samples(settings):
        case = f"linear map of {title}, {len(x):,} x {x.shape[1]} to {width}"
        if not settings.wants(case):
            continue
        learned: dict[str, NDArray[Any]] = {}
        calls = {
            name: partial(_keep, learned, name, partial(learn, x, y, width))
            for name, learn in ((OURS, _learn_map), (SKLEARN, _sklearn_map))
        }
        timings = in_turn(calls, settings.rounds, patient=True)
        row = timings.row(case)
        row["loss"] = {name: _map_loss(torch.from_numpy(transform), x, y).item() for name, transform in learned.items()}
        row["met"] = row["ratio"] <= 1.0
        found.append(row)
        report(f"{case}: {row['ms'][OURS]:.0f} ms, {SKLEARN} {row['ms'][SKLEARN]:.0f} ms, ratio {row['ratio']:.3f}")
    return found


def _keep(learned: dict[str, NDArray[Any]], name: str, learn: Callable[[], NDArray[Any]]) -> None:
    learned[name] = learn()


def _samples(settings: Settings) -> list[tuple[str, NDArray[Any], NDArray[Any], int]]:
    """Title, float64 samples (N, d), labels (N,) and how many numbers to map to."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    sets = [("digits", x / 16, y, 16)]
    if settings.embeddings is not None:
        kept, _ = read_embeddings(settings.embeddings, "train", "train_labels")
        some = slice(0, 500 if settings.quick else 5000)
        z = kept["train"][some].double()
        sets.append(
            ("embeddings of CIFAR-100", (z / z.norm(dim=1).mean()).numpy(), kept["train_labels"][some].numpy(), 32)
        )
    return sets


def _map_loss(transform: Tensor, x: NDArray[Any], y: NDArray[Any]) -> Tensor:
    return nca_loss(torch.from_numpy(x) @ transform.T, torch.from_numpy(y), "expected", "sqeuclidean")


def _learn_map(x: NDArray[Any], y: NDArray[Any], width: int) -> NDArray[Any]:
    """The map (width, d), by the optimizer that scikit-learn takes."""
    from scipy.optimize import minimize
    from sklearn.decomposition import PCA

    def evaluate(flat: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        transform = torch.from_numpy(flat.reshape(width, -1)).requires_grad_()
        loss = len(x) * _map_loss(transform, x, y)  # the sum, as scikit-learn has it
        (gradient,) = torch.autograd.grad(loss, transform)
        return loss.item(), gradient.numpy().ravel()

    start = PCA(width, random_state=0).fit(x).components_
    done = minimize(evaluate, start.ravel(), jac=True, method="L-BFGS-B", tol=0.0, options={"maxiter": _STEPS})
    learned: NDArray[Any] = done.x.reshape(width, -1)
    return learned


def _sklearn_map(x: NDArray[Any], y: NDArray[Any], width: int) -> NDArray[Any]:
    from sklearn.neighbors import NeighborhoodComponentsAnalysis

    learner = NeighborhoodComponentsAnalysis(width, init="pca", max_iter=_STEPS, tol=0.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, nor is it to
        learner.fit(x, y)
    return np.asarray(learner.components_)


def _step(name: str, size: int, width: int) -> Callable[[], Tensor]:
    """Loss and gradient: the same mathematics, squared distances of unit vectors and minus the mean logarithm."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(size, width, generator=generator)
    y = torch.randint(0, _CLASSES, (size,), generator=generator)
    if name == OURS:

        def loss(x: Tensor) -> Tensor:
            return nca_loss(F.normalize(x), y, "log", "sqeuclidean")
    else:
        from pytorch_metric_learning.losses import NCALoss

        theirs = NCALoss()

        def loss(x: Tensor) -> Tensor:
            found: Tensor = theirs(x, y)
            return found

    def step() -> Tensor:
        x = z.clone().requires_grad_()
        value = loss(x)
        value.backward()
        return value.detach()

    return step


def _peak_bytes(name: str, size: int, width: int) -> int:
    """How much the resident memory of a fresh process rises at most over what it is before the large batch."""
    code = (
        "import sys, torch\n"
        "from nnheads.benchmarks.speed.harness import resident_bytes\n"
        "from nnheads.benchmarks.speed.nca import _step\n"
        "name, size, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "torch.set_num_threads(1)\n"
        "_step(name, 64, width)()\n"
        "step = _step(name, size, width)\n"
        "before, _ = resident_bytes(reset=True)\n"
        "step()\n"
        "print(resident_bytes()[1] - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(size), str(width)], capture_output=True, text=True, check=True
    )
    return max(1, int(done.stdout.split()[-1]))
