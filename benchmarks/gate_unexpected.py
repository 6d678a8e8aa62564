"""How well a low gate tells what does not belong: other data sets and noise, beside the dense network's confidence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnheads.benchmarks.datasets import in_form, load_images
from nnheads.data import ImageSet
from nnheads.errors import DataError
from nnheads.headed import HeadedModel, evaluating
from nnheads.training import evaluate

OTHER = 2000
"""Images of each data set that the gate's values are compared on."""


def unexpected(dense: HeadedModel, gated: HeadedModel, test: ImageSet, data_dir: Path | None) -> list[dict[str, Any]]:
    """How well a low g, and a low probability of the likeliest class, tell other data from the test images.

    Args:
        dense: the plain network, whose likeliest probability is the rival score.
        gated: the gated network.
        test: test images of the network's own data set; ``OTHER`` of them are drawn.
        data_dir: where the other data sets are; those that are missing are left out. Default: ``$NNHEADS_DATA``.

    Returns:
        For each: ``data``, ``images``, ``mean_gate``, ``skipped`` and the areas under the ROC curve ``auroc_gate``,
        ``auroc_gated_probability`` and ``auroc_dense_probability``.
    """
    from sklearn.metrics import roc_auc_score

    def scores(images: Tensor) -> dict[str, Tensor]:
        found = {"gate": gate_values(gated, images)}
        for name, model in (("gated_probability", gated), ("dense_probability", dense)):
            labels = torch.zeros(len(images), dtype=torch.long)
            answers = evaluate(model, ImageSet(images, labels, class_names=test.class_names))
            found[name] = answers.log_probs.amax(1).exp()
        return found

    own = _some(test)
    inside = scores(own.images)
    rows = [{"data": "own test images", "images": len(own), **_gate_facts(gated, inside["gate"])}]
    for name, images in _others(test, own, data_dir).items():
        outside = scores(images)
        truth = torch.cat([torch.ones(len(own)), torch.zeros(len(images))]).numpy()
        areas = {
            f"auroc_{score}": float(roc_auc_score(truth, torch.cat([inside[score], outside[score]]).double().numpy()))
            for score in inside
        }
        rows.append({"data": name, "images": len(images), **_gate_facts(gated, outside["gate"]), **areas})
    return rows


@torch.no_grad()
def gate_values(model: HeadedModel, images: Tensor) -> Tensor:
    """The gate's value g (n,) of images (n, C, H, W) uint8; on the CPU."""
    head = model.gated_head()
    found = []
    with evaluating(model):
        before = head.gate.threshold.clone()
        head.gate.threshold.fill_(0)  # g is wanted, not the answer: nothing need enter the second part
        try:
            for part in images.split(512):
                found.append(model.gated(prepared(model, part)).gate.cpu())
        finally:
            head.gate.threshold.copy_(before)
    return torch.cat(found)


def prepared(model: HeadedModel, images: Tensor) -> Tensor:
    """Images (n, C, H, W) uint8 as the backbone takes them, where it is."""
    assert model.preprocessing is not None
    return model.preprocessing(images).to(model.device)


def _gate_facts(model: HeadedModel, gate: Tensor) -> dict[str, float]:
    threshold = float(model.gated_head().gate.threshold)
    return {"mean_gate": float(gate.mean()), "skipped": float((gate >= threshold).double().mean())}


def _some(test: ImageSet) -> ImageSet:
    # Drawn, for test images may come class by class.
    return test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:OTHER])


def _others(test: ImageSet, own: ImageSet, data_dir: Path | None) -> dict[str, Tensor]:
    """Test images of other data sets than ``test``, in its size, and noise like the images drawn from it."""
    generator = torch.Generator().manual_seed(0)
    shape = own.images.shape
    found = {}
    where = data_dir or os.environ.get("NNHEADS_DATA")  # nothing is downloaded for this
    for name in ("cifar100", "cifar10", "mnist") if where else ():
        try:
            other = load_images(name, where, train=False).images
        except DataError:  # not there: the table says which were
            continue
        drawn = torch.randperm(len(other), generator=generator)[:OTHER]
        if torch.equal(other[:2], test.images[:2]):  # the network's own data set
            continue
        found[name] = in_form(other[drawn], (int(shape[2]), int(shape[3])), int(shape[1]))
    found["uniform noise"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    images = own.images.float()
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    noise = mean + std * torch.randn(shape, generator=generator)
    found["Gaussian noise, the images' mean and deviation"] = noise.round().clamp(0, 255).to(torch.uint8)
    return found
