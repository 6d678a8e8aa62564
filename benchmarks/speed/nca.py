"""The NCA loss in blocks beside pytorch-metric-learning's NCALoss: time, and peak memory in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.benchmarks.speed.harness import OURS, Report, Row, Settings, in_turn, needs
from nnheads.functional import nca_loss

PEER = "pytorch-metric-learning NCALoss"
_CLASSES = 100


def rows(settings: Settings, report: Report) -> list[Row]:
    """Time of loss and gradient at each size, and the peak memory of both at the largest."""
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
    return found


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
