"""Several processes at one training: ``torchrun`` starts them, `data_parallel` shares the work of the backbone.

Every process goes through the same batches, runs the backbone on its own part of each, and gathers the embeddings of
all. The head then sees whole batches, in every process alike: its loss, its centers and what it remembers are those of
one process, whatever the head. Gradients of the backbone are summed, and those of a gated head's projector, which sees
the own part as well. Batch norm alone sees a part of a batch; its
statistics are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnheads.errors import ConfigError

if TYPE_CHECKING:
    from nnheads.headed import HeadedModel

_sharing = False
_split = False
_alone = False


def launched() -> int:
    """How many processes ``torchrun`` started, whether or not they have joined; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and not _alone else 1


def launched_rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def take_device() -> bool:
    """Make the CUDA device of a process that ``torchrun`` started the current one, where there is one for each; whether
    there is. What resolves a device afterwards gets it."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = launched() > 1 and torch.cuda.is_available() and local < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(local)
    return cuda


def join() -> bool:
    """Join the processes that ``torchrun`` started, where it did and nobody has joined yet; whether there are others.

    The backend is NCCL where each process has a CUDA device, else gloo.
    """
    if not dist.is_available():
        return False
    if not dist.is_initialized() and launched() > 1:
        dist.init_process_group("nccl" if take_device() else "gloo")
    return world_size() > 1


def world_size() -> int:
    """How many processes there are; 1 where there is no group."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def leave() -> None:
    """Leave the group, at the end of a program that joined it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Work for a while as the only process there is, on the device that `join` chose: what is trained is not shared."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def data_parallel(model: nn.Module | None = None) -> Iterator[None]:
    """Share the backbone's work among the processes; all of them must do the same in here, with the same batches.

    Args:
        model: gets the weights of the first process. None where they are equal already.
    """
    global _sharing
    before, _sharing = _sharing, world_size() > 1
    try:
        if _sharing and model is not None:
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
            for tensor in [*model.parameters(), *(b for m in norms for b in m.buffers(recurse=False))]:
                dist.broadcast(tensor.detach(), 0)
        yield
    finally:
        _sharing = before


def features(model: HeadedModel, x: Tensor) -> Tensor:
    """``model.features(x)``, each process embedding a part: (B, d) in all of them; gradients reach the own part.

    Batches with fewer than two samples a process are embedded whole by all.
    """
    global _split
    world = world_size()
    _split = _sharing and len(x) >= 2 * world
    if not _split:
        return model.features(x)
    sizes = [len(part) for part in torch.arange(len(x)).tensor_split(world)]
    start = sum(sizes[: rank()])
    z = model.features(x[start : start + sizes[rank()]])
    parts = gather_rows(z.detach(), sizes)
    parts[rank()] = z
    return torch.cat(parts)


def gather_rows(rows: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
    """The rows (n, ...) of every process; ``sizes`` where they are known."""
    world = world_size()
    if world == 1:
        return [rows]
    if sizes is None:
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(count) for count in counts]
    most = max(sizes)  # gloo and NCCL gather equal sizes
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(found, padded)
    return [part[:size] for part, size in zip(found, sizes, strict=True)]


def sharing(model: HeadedModel) -> nn.ModuleList:
    """What `features` runs on a part of a batch: the backbone, and the projector of a model that is cut in two."""
    projector = model.gated_head().projector if model.at is not None else None
    return nn.ModuleList([model.backbone] if projector is None else [model.backbone, projector])


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of what is in `sharing` over the processes, after a backward pass through `features`."""
    if _sharing and _split:
        _reduce([p.grad for p in parameters if p.grad is not None], 1)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Average running statistics, such as batch norm's, over the processes."""
    if _sharing:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        _reduce([b for m in norms for b in m.buffers(recurse=False) if b.is_floating_point()], world_size())


def refuse(what: str) -> None:
    """ConfigError where processes share the work, which this cannot."""
    if _sharing:
        raise ConfigError(f"{what} cannot be shared among {world_size()} processes: run it without torchrun")


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        dist.barrier()


def _reduce(tensors: list[Tensor], divisor: int) -> None:
    """Sum tensors over the processes in one message, and divide."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten().float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= divisor
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
