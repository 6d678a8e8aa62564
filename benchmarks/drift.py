"""How much the predictions drift when centers come and go, and what redistributing labels is worth.

Drift is the norm of the change of the predictions after redistribution, divided by that of doing nothing: below 1 the
redistribution helps, above 1 it harms. It is measured at the affected points (the centers that count the one in
question among their neighbours) and at held-out samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast, final

import torch
from torch import Tensor

from nnheads.benchmarks.drift_table import WHERE, table
from nnheads.benchmarks.scripts import check_whole, run_script
from nnheads.center_choice import best_predicted, worst_predicted
from nnheads.centers import Redistribution, add_centers, drop_centers
from nnheads.errors import ConfigError, DataError
from nnheads.heads import build_head
from nnheads.heads.kernel_vote import KernelVoteHead

if TYPE_CHECKING:
    from nnheads.data import ImageSet
    from nnheads.headed import HeadedModel

RIDGES: Final = (0.03, 0.1, 0.3, 1.0, 3.0)
_TINY: Final = 1e-9

Kind = Literal["drop", "add"]


@final
@dataclass(frozen=True)
class Form:
    """A form of redistribution by the name it has in the table."""

    name: str
    redistribute: Redistribution
    ridge: float = 1.0


@final
@dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings to measure on.

    Attributes:
        z, y: (N, d) embeddings and (N,) labels that centers, and samples to add, are drawn from.
        zq, yq: (M, d) and (M,) held-out samples.
    """

    z: Tensor
    y: Tensor
    zq: Tensor
    yq: Tensor


def drift_study(
    data: Embedded,
    *,
    centers: int = 1000,
    k: int = 32,
    singles: int = 200,
    at_once: int = 100,
    held_out: int = 1000,
    ridges: Sequence[float] = RIDGES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every form of redistribution on the same centers, drops and adds.

    Args:
        data: embeddings.
        centers: how many of ``data.z`` are centers; the rest are there to be added.
        k: neighbours.
        singles: drops, and adds, that are each done alone; the median over them is reported.
        at_once: centers dropped, or added, one after the other, with labels redistributed at each.
        held_out: held-out samples.
        ridges: of the form ``least-squares``.
        seed: of what is drawn.

    Returns:
        JSON values: ``settings``, ``sigma``, ``single`` (for each form the median drift of drops and adds, at the
        affected points and held out), and ``at_once`` (for each choice of centers and each form: drift, accuracy held
        out before and after, and accuracy at the added points, with their own centers and without).

    Raises:
        DataError: too few samples.
        ConfigError: a number below 1.
    """
    for name, value in (
        ("centers", centers),
        ("k", k),
        ("singles", singles),
        ("at_once", at_once),
        ("held_out", held_out),
    ):
        check_whole(name, value)
    wanted = centers + max(singles, at_once)
    if len(data.z) < wanted or len(data.zq) < held_out:
        raise DataError(
            f"drift: {wanted} samples and {held_out} held-out ones are needed, there are {len(data.z)} and "
            f"{len(data.zq)}: give more or ask for fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.z), generator=generator)
    rows, spare = order[:centers], order[centers:]
    query = torch.randperm(len(data.zq), generator=generator)[:held_out]
    zq, yq = data.zq[query].float(), data.yq[query]
    head = _head(data.z[rows].float(), data.y[rows], k, int(torch.cat([data.y, data.yq]).max()) + 1)
    forms = [
        Form("influence", "influence"),
        Form("exact", "exact"),
        *(Form(f"least-squares {ridge:g}", "least-squares", ridge) for ridge in ridges),
    ]
    new = data.z[spare].float(), data.y[spare]
    picked = torch.randperm(centers, generator=generator)[:singles]
    single = {
        "drop": _single(head, "drop", forms, zq, [(head.memory.ids[r : r + 1],) for r in picked]),
        "add": _single(head, "add", forms, zq, [(new[0][i : i + 1], new[1][i : i + 1]) for i in range(singles)]),
    }
    many = []
    for choice in ("random", "algorithm 1"):
        if choice == "random":
            ids, at = head.memory.ids[torch.randperm(centers, generator=generator)[:at_once]], torch.arange(at_once)
        else:
            ids, at = best_predicted(head, at_once), worst_predicted(head, *new, at_once)
        many += _at_once(head, "drop", choice, forms, zq, yq, (ids,))
        many += _at_once(head, "add", choice, forms, zq, yq, (new[0][at], new[1][at]))
    return {
        "settings": {
            "centers": centers,
            "k": k,
            "singles": singles,
            "at_once": at_once,
            "held_out": held_out,
            "seed": seed,
        },
        "sigma": float(head.width()),
        "single": [
            {
                "form": form.name,
                **{f"{kind} {where}": single[kind][where][form.name] for kind in single for where in WHERE},
            }
            for form in forms
        ],
        "at_once": many,
    }


def study_file(path: str | Path, **options: Any) -> dict[str, Any]:
    """`drift_study` on the arrays ``z, y, zq, yq`` of an ``.npz`` file."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            z, y, zq, yq = (torch.from_numpy(arrays[name]) for name in ("z", "y", "zq", "yq"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read z, y, zq and yq from {path}: {error}") from error
    return drift_study(Embedded(z, y.long(), zq, yq.long()), **options)


def model_embeddings(model: HeadedModel, train: ImageSet, test: ImageSet) -> Embedded:
    """What a trained model makes of images, whose labels follow the model's class names where both have them.

    Raises:
        ConfigError: the model does not know its preprocessing, or has not all of the classes.
    """
    from nnheads.evaluation import embed

    if model.preprocessing is None:
        raise ConfigError("drift: the model needs its preprocessing; see attach_head(preprocessing=)")
    if model.class_names is not None and train.class_names:
        missing = [name for name in train.class_names if name not in model.class_names]
        if missing:
            raise ConfigError(
                f"drift: the model does not know the class {missing[0]!r}: name the data it was trained on"
            )
        order = torch.tensor([model.class_names.index(name) for name in train.class_names])
        train, test = (replace(part, labels=order[part.labels]) for part in (train, test))
    z, y, _ = embed(model, train)
    zq, yq, _ = embed(model, test)
    return Embedded(z.cpu(), y.cpu(), zq.cpu(), yq.cpu())


# ---- one change ------------------------------------------------------------------------------------------------------


def _head(z: Tensor, y: Tensor, k: int, classes: int) -> KernelVoteHead:
    chosen = build_head("impostor", z.shape[1], classes, k=k)
    chosen.memorize(z, y)
    chosen.refreshed()
    assert isinstance(chosen, KernelVoteHead)
    # The width is a number from here on, or a change of the centers would be a change of the width too.
    head = build_head("impostor", z.shape[1], classes, k=k, sigma=float(chosen.width()))
    head.memorize(z, y)
    assert isinstance(head, KernelVoteHead)
    return head.eval()


def _changed(head: KernelVoteHead, kind: Kind, what: tuple[Tensor, ...], form: Form) -> KernelVoteHead:
    """A copy of the head, changed."""
    made = copy.deepcopy(head)
    if kind == "drop":
        drop_centers(made, what[0], form.redistribute, form.ridge)
    else:
        add_centers(made, what[0], what[1], redistribute=form.redistribute, ridge=form.ridge)
    return made


@torch.no_grad()
def _predict(head: KernelVoteHead, z: Tensor) -> Tensor:
    return cast(Tensor, head(z)).exp()


def _affected(head: KernelVoteHead, kind: Kind, what: tuple[Tensor, ...]) -> Tensor:
    """Keys of the centers that count a dropped center, or will count an added one, among their neighbours."""
    held = len(head.memory)
    keys = head.memory.all_keys()
    found = head.neighbors(keys)
    if kind == "drop":
        hit = torch.isin(found.ids, what[0]).any(1) & ~torch.isin(head.memory.ids[:held], what[0])
    else:
        hit = (torch.cdist(keys, what[0]) < found.distances[:, -1:]).any(1)
    return keys[hit]


def _drifts(
    head: KernelVoteHead, kind: Kind, what: tuple[Tensor, ...], forms: Sequence[Form], points: Sequence[Tensor]
) -> list[dict[str, float] | None]:
    """For each set of points the drift of each form; None where doing nothing changes nothing."""
    before = [_predict(head, z) for z in points]
    change: dict[str, list[float]] = {}
    for form in [Form("none", "none"), *forms]:
        made = _changed(head, kind, what, form)
        change[form.name] = [float((_predict(made, z) - b).norm()) for z, b in zip(points, before, strict=True)]
    return [
        {form.name: change[form.name][i] / nothing for form in forms} if nothing > _TINY else None
        for i, nothing in enumerate(change["none"])
    ]


def _single(
    head: KernelVoteHead, kind: Kind, forms: Sequence[Form], zq: Tensor, changes: Sequence[tuple[Tensor, ...]]
) -> dict[str, dict[str, float | None]]:
    """Median drift over changes that are each made alone, by place and form; None where none changed anything."""
    found: dict[str, list[dict[str, float]]] = {where: [] for where in WHERE}
    for what in changes:
        drifts = _drifts(head, kind, what, forms, (_affected(head, kind, what), zq))
        for where, drift in zip(WHERE, drifts, strict=True):
            if drift is not None:
                found[where].append(drift)
    return {
        where: {form.name: statistics.median(d[form.name] for d in drifts) if drifts else None for form in forms}
        for where, drifts in found.items()
    }


def _at_once(
    head: KernelVoteHead,
    kind: Kind,
    choice: str,
    forms: Sequence[Form],
    zq: Tensor,
    yq: Tensor,
    what: tuple[Tensor, ...],
) -> list[dict[str, Any]]:
    """Drift and accuracies where many centers change, for doing nothing and for each form."""
    affected, held_out = _drifts(head, kind, what, forms, (_affected(head, kind, what), zq))
    rows = []
    for form in [Form("none", "none"), *forms]:
        made = _changed(head, kind, what, form)
        with_own = without = None
        if kind == "add":
            ids = made.memory.ids[len(head.memory) : len(made.memory)]
            with torch.no_grad():
                with_own = _accuracy(made(what[0]), what[1])
                without = _accuracy(made(what[0], ids=ids), what[1])
        rows.append(
            {
                "kind": kind,
                "choice": choice,
                "form": form.name,
                "affected": 1.0 if affected is None else affected.get(form.name, 1.0),
                "held out": 1.0 if held_out is None else held_out.get(form.name, 1.0),
                "accuracy_before": _accuracy(_predict(head, zq), yq),
                "accuracy_after": _accuracy(_predict(made, zq), yq),
                "accuracy_at_added": with_own,
                "accuracy_at_added_without_own": without,
            }
        )
    return rows


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).float().mean())


def main() -> None:
    """``python -m nnheads.benchmarks.drift MODEL --dataset NAME [--data-dir DIR] [--json FILE]``."""
    parser = argparse.ArgumentParser(description="Drift of predictions when centers are dropped and added.")
    parser.add_argument("source", type=Path, help="saved model, or .npz with z, y (N) and zq, yq (M)")
    parser.add_argument("--dataset", help="whose training images become centers and whose test images are held out")
    parser.add_argument("--data-dir", type=Path)
    for name, default in (("centers", 1000), ("k", 32), ("singles", 200), ("at-once", 100), ("held-out", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    source, dataset, data_dir, out = (given.pop(name) for name in ("source", "dataset", "data_dir", "json"))
    if source.suffix == ".npz":
        result = study_file(source, **given)
    else:
        result = drift_study(_embedded_by(source, dataset, data_dir, given), **given)
    print(table(result))
    if out is not None:
        from nnheads.benchmarks.results import device_name, versions, write_json

        about = {"dataset": dataset, "versions": versions(), "device": device_name(torch.device("cpu"))}
        write_json(out, result | about)
    else:
        print(json.dumps(result["settings"] | {"sigma": result["sigma"]}))


def _embedded_by(model: Path, dataset: str | None, data_dir: Path | None, given: dict[str, Any]) -> Embedded:
    from nnheads.benchmarks.datasets import load_images
    from nnheads.io import load

    if dataset is None:
        raise ConfigError("drift: --dataset NAME says whose images the model embeds")
    parts = []
    # Three times what is needed, drawn evenly: embedding all of a data set takes minutes.
    wanted = 3 * (given["centers"] + max(given["singles"], given["at_once"])), 3 * given["held_out"]
    for train, count in zip((True, False), wanted, strict=True):
        images = load_images(dataset, data_dir, train=train)
        parts.append(images.subset(torch.linspace(0, len(images) - 1, min(count, len(images))).long()))
    return model_embeddings(load(model), *parts)


if __name__ == "__main__":
    run_script(main)
