"""A model on whole data sets: its embeddings, its answers and how good they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnheads.compiling import compiling
from nnheads.devices import Precision, autocast_for, prefers_channels_last, resolve_device
from nnheads.errors import DataError
from nnheads.headed import HeadedModel, check_headed
from nnheads.loaders import Batches, Data, Target, ordered_batches


@dataclass(frozen=True)
class Evaluation:
    """The answers of a model on a data set.

    Attributes:
        log_probs: (N, C) float32 log-probabilities, on the CPU.
        labels: (N,) int64, on the CPU.
        seconds: how long it took, loading included.
    """

    log_probs: Tensor
    labels: Tensor
    seconds: float

    def __repr__(self) -> str:
        return f"Evaluation({len(self.labels)} samples, accuracy {self.accuracy:.4f}, {self.seconds:.1f} s)"

    @property
    def predictions(self) -> Tensor:
        """(N,) int64, the likeliest class of each."""
        return self.log_probs.argmax(1)

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return float((self.predictions == self.labels).double().mean())

    @property
    def log_loss(self) -> float:
        """Mean negative log-probability of the right class; infinite where a label is no class of the head."""
        return float(F.nll_loss(self._wide().double(), self.labels))

    @property
    def ece(self) -> float:
        """Expected calibration error of the likeliest class, in 15 bins of equal width, 0 to 1."""
        return calibration_error(self.log_probs, self.labels)

    def _wide(self) -> Tensor:
        return _with_columns(self.log_probs, int(self.labels.max()) + 1)


def calibration_error(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error of the likeliest class, in bins of equal width, 0 to 1.

    Args:
        log_probs: (N, C) log-probabilities; where rounding puts a probability above 1, it counts as 1.
        labels: (N,) int64, 0 or more; one that is no class of the C is never right.
        bins: how many.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    wide = _with_columns(log_probs, max(2, int(labels.max()) + 1))  # the metric takes no single class
    probabilities = wide.exp().clamp_max(1)  # beyond 1 by rounding, the metric would take all of them for logits
    return float(multiclass_calibration_error(probabilities, labels, wide.shape[1], n_bins=bins, norm="l1"))


def _with_columns(log_probs: Tensor, classes: int) -> Tensor:
    """Log-probabilities of so many classes at least; those that are not there are impossible."""
    return F.pad(log_probs, (0, max(0, classes - log_probs.shape[1])), value=-torch.inf)


def evaluate(
    model: HeadedModel,
    data: Data,
    *,
    batch_size: int = 512,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    leave_one_out: bool = False,
    compile: bool | str = False,
) -> Evaluation:
    """The answers of a model on a data set, in evaluation mode.

    Args:
        model: moved to ``device``; otherwise unchanged.
        data: an `ImageSet`, a data set of (x, y) or (x, y, id), or a loader. Every sample counts once, in the order of
            the data set, also where a loader shuffles.
        batch_size: of what is not a loader already.
        device: see `resolve_device`.
        precision: see `resolve_precision`.
        leave_one_out: whether the samples are those in the memory and each is to be judged without itself, by its id.
        compile: run the backbone compiled: True for torch's compiler, or the name of a backend, see
            `nnheads.compiling.compiling`. Compiling takes a minute or so, once for each shape and mode.

    Raises:
        DataError: there are no samples, or what is given is no data set; labels are no classes, or an `ImageSet`
            numbers its named classes otherwise than the model; ``leave_one_out`` and batches without ids.
        ConfigError: the backbone cannot be compiled.
    """
    started = time.perf_counter()

    def answer(x: Tensor, ids: Tensor) -> Tensor:
        return model(x, ids=ids if leave_one_out else None)  # type: ignore[no-any-return]

    check_headed("evaluate", model)
    with compiling(model, compile):
        log_probs, labels, _ = _over(
            model, data, answer, batch_size, device, precision, one_class=True, needs_ids=leave_one_out
        )
    return Evaluation(log_probs, labels, time.perf_counter() - started)


def embed(
    model: HeadedModel,
    data: Data,
    *,
    batch_size: int = 512,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    compile: bool | str = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings of a data set, in evaluation mode and in the order of the data set.

    One pass costs little more than the backbone alone: an `ImageSet` is decoded once and prepared batch by batch; it
    goes to CUDA by pinned memory, while the network works; channels last and bfloat16 where the hardware is faster so.

    Args:
        model, data, batch_size, device, precision, compile: as in `evaluate`.

    Returns:
        Embeddings (N, d), float32 or float64, labels (N,) and ids (N,), int64, all on the CPU; id -1 where there is
        none.

    Raises:
        DataError, ConfigError: as in `evaluate`.
    """

    @torch.inference_mode()
    def features(x: Tensor, ids: Tensor) -> Tensor:
        return model.features(x)

    check_headed("embed", model)
    with compiling(model, compile):
        return _over(model, data, features, batch_size, device, precision)


def target_for(model: HeadedModel, device: torch.device, precision: Precision, **fields: Any) -> Target:
    """What batches for a model on a device look like."""
    dtypes = [p.dtype for p in model.backbone.parameters() if p.is_floating_point()]
    return Target(
        device,
        dtypes[0] if dtypes else torch.float32,
        model.preprocessing,
        channels_last=prefers_channels_last(device, precision),
        class_names=model.class_names,
        **fields,
    )


def _check_classes(y: Tensor) -> None:
    """DataError where answers cannot be right or wrong, as labels are no classes."""
    if y.dim() != 1 or y.is_floating_point():
        raise DataError(
            f"to be evaluated a sample needs one class: labels must be whole numbers (n,), not {y.dtype} "
            f"{tuple(y.shape)}; of soft labels take y.argmax(1)"
        )
    if y.device.type == "cpu" and len(y) and int(y.min()) < 0:
        raise DataError(f"label {int(y.min())} is no class: leave samples without one out")


@torch.no_grad()
def _over(
    model: HeadedModel,
    data: Data,
    function: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
    device: str | torch.device,
    precision: Precision,
    *,
    one_class: bool = False,
    needs_ids: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    where = resolve_device(device)
    model.to(where)
    target = target_for(model, where, precision, needs_ids=needs_ids)
    batches: Batches = ordered_batches(data, target, batch_size=batch_size)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parts = []
    try:
        for x, y, ids in batches:
            if one_class:
                _check_classes(y)
            with autocast_for(where, precision):
                found = function(x, ids)
            parts.append((found if found.dtype == torch.float64 else found.float(), y, ids))
    finally:
        for module, training in modes:
            module.training = training
    if not parts:
        raise DataError("there are no samples to evaluate: the data set is empty")
    results, labels, all_ids = zip(*parts, strict=True)
    return torch.cat(results).cpu(), torch.cat(labels).cpu(), torch.cat(all_ids).cpu()
