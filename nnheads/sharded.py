"""A memory whose rows are shared among processes; exact search by gathering each share's nearest."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nnheads.distributed import gather_rows, is_main, rank, wait, world_size
from nnheads.errors import CheckpointError, ConfigError
from nnheads.index import Engine, build_index
from nnheads.memory import Memory


class Found(NamedTuple):
    """Neighbours, nearest first: ids (B, k) and labels (B, k), -1 for none, distances (B, k), infinite for none."""

    ids: Tensor
    labels: Tensor
    distances: Tensor


@final
class ShardedMemory:
    """Samples spread over the processes of a group by their ids; every process calls every method.

    Where a sample lives depends on its id and the number of processes alone, so that a file written by any number of
    them is read by any other.

    Args:
        dim: width d of the keys.
        num_classes: number of classes.
        engine: see `nnheads.index.build_index`.
    """

    def __init__(self, dim: int, num_classes: int, engine: Engine = "auto") -> None:
        self.own = Memory(dim, num_classes)
        self._index = build_index(engine)
        self._fresh = False

    def __len__(self) -> int:
        """Samples of all processes."""
        counts = gather_rows(torch.tensor([len(self.own)], device=self.own.ids.device))
        return int(torch.cat(counts).sum())

    def add(self, keys: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Add samples, the same call in every process: each keeps its own share. See `Memory.add`."""
        mine = self._mine(ids)
        self.own.add(keys[mine], labels[mine], ids[mine])
        self._fresh = False

    def drop(self, ids: Tensor) -> None:
        """Forget samples, the same call in every process. See `Memory.drop`."""
        self.own.drop(ids[self._mine(ids)])
        self._fresh = False

    def search(self, queries: Tensor, k: int) -> Tensor:
        """(B, k) ids of the nearest samples of all processes; see `neighbors`."""
        return self.neighbors(queries, k).ids

    @torch.no_grad()
    def neighbors(self, queries: Tensor, k: int) -> Found:
        """The nearest samples of all processes for this process's own queries: those that one process would find.

        Queries may differ from process to process, and so may their number. Which of
        samples that are equally far are taken, where not all fit, is arbitrary; those taken come in the order of ids.

        Args:
            queries: (B, d) float32.
            k: neighbours to return.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        parts = gather_rows(queries)
        sizes = [len(part) for part in parts]
        near = self._own_nearest(torch.cat(parts), k)
        # The answers to a process's queries, from every process.
        start = sum(sizes[: rank()])
        shares = [torch.stack(gather_rows(column))[:, start : start + sizes[rank()]] for column in near]
        ids, labels, distances = (share.transpose(0, 1).flatten(1) for share in shares)
        order = ids.argsort(dim=1, stable=True)  # so that a stable sort by distance leaves lower ids first
        order = order.gather(1, distances.gather(1, order).argsort(dim=1, stable=True))[:, :k]
        return Found(ids.gather(1, order), labels.gather(1, order), distances.gather(1, order))

    def _own_nearest(self, queries: Tensor, k: int) -> Found:
        if not self._fresh:
            self._index.build(self.own.keys, self.own.active)
            self._fresh = True
        rows = self._index.search(queries, k)
        held = rows.clamp_min(0)
        none = rows < 0
        if not len(self.own):
            empty = torch.full(rows.shape, torch.inf, device=rows.device)
            return Found(rows, rows, empty)
        distances = torch.cat(
            [
                (self.own.keys[some] - query.unsqueeze(1)).norm(dim=2)
                for some, query in zip(held.split(256), queries.split(256), strict=True)
            ]
        )
        ids, labels = self.own.ids[held].masked_fill(none, -1), self.own.labels[held].masked_fill(none, -1)
        return Found(ids, labels, distances.masked_fill(none, torch.inf))

    def save(self, path: str | Path) -> None:
        """Write all samples to one safetensors file, in the order of their ids; the first process writes."""
        held = len(self.own)
        columns = [torch.cat(gather_rows(c[:held])) for c in (self.own.keys, self.own.labels, self.own.ids)]
        if is_main():
            order = columns[2].argsort()
            names = ("keys", "labels", "ids")
            beside = Path(path).with_name(f".{Path(path).name}.new")
            save_file({name: column[order].cpu() for name, column in zip(names, columns, strict=True)}, beside)
            beside.replace(path)
        wait()

    def load(self, path: str | Path) -> None:
        """Take this process's share of what `save` wrote, by however many processes.

        Raises:
            CheckpointError: there is no such file, or its keys are of another width.
        """
        try:
            held = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path} ({error}): give a file that ShardedMemory.save wrote") from error
        if held["keys"].shape[1:] != (self.own.dim,):
            raise CheckpointError(f"{path} holds keys {held['keys'].shape[1]} wide, this memory takes {self.own.dim}")
        self.own.clear()
        self.add(held["keys"], held["labels"], held["ids"])

    def _mine(self, ids: Tensor) -> Tensor:
        return ids % world_size() == rank()
