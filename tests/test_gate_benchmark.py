"""The benchmark of the gated network: it runs end to end on bundled images and leaves what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnheads.benchmarks import gate, gate_attacks
from nnheads.benchmarks.datasets import load_dataset
from nnheads.errors import ConfigError


def flags(**given: object) -> list[str]:
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    gate.main(
        flags(dataset="digits", backbone="convnet", at="bn1", held_out=200, epochs=3, gate_epochs=2, per_class=20)
        + flags(tolerance=0.02, models=folder / "models", out=folder)
    )
    return folder


def test_it_measures_what_skips_what_it_costs_and_what_it_saves(folder: Path) -> None:
    found = json.loads((folder / "gate.json").read_text(encoding="utf-8"))
    assert found["flops"]["share_of_f2"] > 0.5
    assert found["dense_accuracy"] > 0.7
    assert found["points_lost"] == pytest.approx(100 * (found["dense_accuracy"] - found["accuracy"]))
    skipped = [point["skipped"] for point in found["sweep"]["points"]]
    assert (skipped[0], skipped[-1]) == (0, 1)
    assert skipped == sorted(skipped)
    assert found["sweep"]["network_accuracy"] == pytest.approx(found["dense_accuracy"], abs=0.01)
    assert all(row["ratio"] > 0 for row in found["time"])
    names = [row["data"] for row in found["unexpected"]]
    assert names == ["own test images", "uniform noise", "Gaussian noise, the images' mean and deviation"]
    assert all(0 <= row["auroc_gate"] <= 1 for row in found["unexpected"][1:])
    assert (folder / "gate.png").stat().st_size > 1000
    assert str(folder) not in json.dumps(found)


def test_a_saved_pair_is_measured_again_without_training(folder: Path, tmp_path: Path) -> None:
    models = folder / "models"
    saved = flags(dense=models / "dense", gated=models / "gated")
    gate.main(flags(dataset="digits", held_out=200, per_class=20, tolerance=0.02, out=tmp_path) + saved)
    first, again = (json.loads((each / "gate.json").read_text(encoding="utf-8")) for each in (folder, tmp_path))
    assert again["accuracy"] == first["accuracy"]
    assert again["gate_seconds"] is None


def test_attacks_leave_accuracies_and_queries(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("foolbox")
    models = folder / "models"
    saved = flags(dense=models / "dense", gated=models / "gated", surrogate=models / "dense")
    gate_attacks.main(flags(dataset="digits", transfer_images=40, query_images=4, out=tmp_path) + saved)
    found = json.loads((tmp_path / "attacks.json").read_text(encoding="utf-8"))
    rows = found["transfer"]["rows"]
    assert rows[0]["surrogate"] == rows[0]["dense"]
    assert rows[-1]["surrogate"] < rows[0]["surrogate"]
    assert [row["model"] for row in found["query"]["rows"]] == ["dense", "gated"]
    assert all(row["queries_per_image"] > 10 for row in found["query"]["rows"])


def test_images_held_out_are_not_trained_on() -> None:
    data = load_dataset("digits").train
    train, held_out = gate.parts(data, 100)
    assert len(train) + len(held_out) == len(data)
    assert not bool(torch.isin(train.ids, held_out.ids).any())
    with pytest.raises(ConfigError, match="--held-out"):
        gate.parts(data, len(data))
