"""Black-box attacks on a gated network and the dense one; ``python -m nnheads.benchmarks.gate_attacks``.

Needs foolbox (``pip install foolbox``). Two attacks that see no gradient of what they attack: adversarial images made
by projected gradient descent on an independently trained surrogate, and HopSkipJump (Chen et al. 2020), which asks for
decisions only. The models are those that ``nnheads.benchmarks.gate --models`` saved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from nnheads.benchmarks.datasets import load_dataset
from nnheads.benchmarks.results import device_name, versions, write_json
from nnheads.benchmarks.scripts import run_script
from nnheads.errors import ConfigError, DataError
from nnheads.headed import HeadedModel
from nnheads.io import load

TRANSFER_EPSILONS = (2 / 255, 4 / 255, 8 / 255)
QUERY_EPSILONS = (0.25, 0.5, 1.0)


@final
class OnUnitImages(nn.Module):
    """A model on images in [0, 1], as attacks change them.

    Args:
        model: with a preprocessing, of images in their own size.
    """

    def __init__(self, model: HeadedModel) -> None:
        super().__init__()
        if model.preprocessing is None:
            raise ConfigError("the model does not say how images are prepared: it was saved without a preprocessing")
        self.model = model
        self.asked = 0
        self.register_buffer("mean", torch.tensor(model.preprocessing.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(model.preprocessing.std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        answer: Tensor = self.model((x - self.get_buffer("mean")) / self.get_buffer("std"))
        return answer


def transfer(
    models: dict[str, HeadedModel],
    surrogate: HeadedModel,
    x: Tensor,
    y: Tensor,
    *,
    epsilons: Sequence[float] = TRANSFER_EPSILONS,
    steps: int = 20,
) -> list[dict[str, Any]]:
    """Accuracy on images that projected gradient descent made for the surrogate, for each bound of the change.

    Args:
        models: what is attacked.
        surrogate: a network trained independently of them.
        x: (n, C, H, W) images in [0, 1].
        y: (n,) labels.
        epsilons: bounds of the change of each pixel.
        steps: of the attack.
    """
    import foolbox

    attacked = foolbox.PyTorchModel(OnUnitImages(surrogate).eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=steps)
    torch.manual_seed(0)
    rows = [_row(0.0, x, y, {"surrogate": surrogate, **models})]
    for epsilon in epsilons:
        made = torch.cat(
            [attack(attacked, a, b, epsilons=epsilon)[1] for a, b in zip(x.split(100), y.split(100), strict=True)]
        )
        rows.append(_row(epsilon, made, y, {"surrogate": surrogate, **models}))
    return rows


def query(
    models: dict[str, HeadedModel],
    x: Tensor,
    y: Tensor,
    *,
    epsilons: Sequence[float] = QUERY_EPSILONS,
    steps: int = 6,
) -> list[dict[str, Any]]:
    """HopSkipJump on each model: the Euclidean size of the change it needs.

    Each image's attack starts from the nearest of the images that the model answers otherwise. (Noise, the attack's
    usual start, leaves out every image of the class that the model sees in noise.)

    Args:
        models: what is attacked.
        x: (n, C, H, W) images in [0, 1].
        y: (n,) labels.
        epsilons: sizes of the change at which accuracy is reported.
        steps: of the attack.

    Raises:
        DataError: a model answers all the images alike: there is nothing to start from.
    """
    import foolbox

    rows = []
    for name, model in models.items():
        torch.manual_seed(0)
        asked = OnUnitImages(model).eval()
        attacked = foolbox.PyTorchModel(asked, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.HopSkipJumpAttack(
            steps=steps, initial_gradient_eval_steps=40, max_gradient_eval_steps=80
        )
        with torch.no_grad():
            answers = asked(x).argmax(1)
            right = answers == y
            starts = _starts(x, answers)[right]
            before = asked.asked
            criterion = foolbox.criteria.Misclassification(y[right])
            made = attack.run(attacked, x[right], criterion, starting_points=starts)
            fooled = asked(made).argmax(1) != y[right]
        sizes = (made - x[right]).flatten(1).norm(dim=1).masked_fill(~fooled, torch.inf)
        rows.append(
            {
                "model": name,
                "accuracy": float(right.double().mean()),
                "attacked_images": int(right.sum()),
                "queries_per_image": (asked.asked - before) / max(1, int(right.sum())),
                "median_change": float(sizes.median()),
                **{f"accuracy_at_{epsilon:g}": float((sizes > epsilon).sum()) / len(x) for epsilon in epsilons},
            }
        )
    return rows


def _starts(x: Tensor, answers: Tensor) -> Tensor:
    """For each image the nearest that is answered otherwise."""
    if len(answers.unique()) < 2:
        raise DataError(f"the model answers all {len(x)} images alike: a query attack needs others to start from")
    flat = x.flatten(1)
    distances = torch.cdist(flat, flat).masked_fill(answers[:, None] == answers, torch.inf)
    return x[distances.argmin(1)]


@torch.no_grad()
def _row(epsilon: float, x: Tensor, y: Tensor, models: dict[str, HeadedModel]) -> dict[str, Any]:
    row: dict[str, Any] = {"epsilon_255": round(255 * epsilon, 3)}
    for name, model in models.items():
        row[name] = float((OnUnitImages(model).eval()(x).argmax(1) == y).double().mean())
        if model.at is not None:
            prepared = (x - OnUnitImages(model).get_buffer("mean")) / OnUnitImages(model).get_buffer("std")
            row[f"{name}_skipped"] = float(model.gated(prepared).skipped.double().mean())
    return row


def _images(dataset: str, data_dir: Path | None) -> Callable[[int], tuple[Tensor, Tensor]]:
    test = load_dataset(dataset, data_dir).test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))

    def take(count: int) -> tuple[Tensor, Tensor]:
        some = test.subset(order[:count])
        return some.images.float() / 255, some.labels

    return take


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack both networks and write ``attacks.json`` where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--dense", type=Path, required=True, help="the saved dense network")
    parser.add_argument("--gated", type=Path, required=True, help="the saved gated network")
    parser.add_argument("--surrogate", type=Path, required=True, help="a saved network trained from another seed")
    parser.add_argument("--transfer-images", type=int, default=500)
    parser.add_argument("--query-images", type=int, default=100)
    parser.add_argument("--query-steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    take = _images(given.dataset, given.data_dir)
    gated = load(given.gated)
    models = {"dense": load(given.dense), "gated": gated}
    found: dict[str, Any] = {
        "dataset": given.dataset,
        "at": gated.at,
        "transfer": {
            "attack": "LinfPGD, 20 steps, on the surrogate",
            "images": given.transfer_images,
            "rows": transfer(models, load(given.surrogate), *take(given.transfer_images)),
        },
        "versions": versions(),
        "device": device_name(gated.device),
    }
    write_json(given.out / "attacks.json", found)  # what follows takes long
    found["query"] = {
        "attack": f"HopSkipJump, {given.query_steps} steps, from the nearest image that is answered otherwise",
        "images": given.query_images,
        "rows": query(models, *take(given.query_images), steps=given.query_steps),
    }
    write_json(given.out / "attacks.json", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    run_script(main)
