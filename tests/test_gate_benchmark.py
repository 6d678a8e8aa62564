"""The benchmark of the gated network: it runs end to end on bundled images and leaves what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnheads.benchmarks import gate, gate_attacks, gate_unexpected
from nnheads.benchmarks.datasets import in_form, load_dataset
from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.io import load


def flags(**given: object) -> list[str]:
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


COMMON = {"dataset": "digits", "held_out": 400, "per_class": 20, "tolerance": 0.02, "rounds": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    trained = flags(backbone="convnet", at="bn1", epochs=6, gate_epochs=2)
    gate.main(flags(models=folder / "models", out=folder, **COMMON) + trained)
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
    assert names[0] == "own test images"
    assert names[-2:] == ["uniform noise", "Gaussian noise, the images' mean and deviation"]
    assert set(names[1:-2]) <= {"cifar100", "cifar10", "mnist"}  # where NNHEADS_DATA has them
    assert all(0 <= row["auroc_gate"] <= 1 for row in found["unexpected"][1:])
    assert (folder / "gate.png").stat().st_size > 1000
    assert str(folder) not in json.dumps(found)


def test_a_saved_pair_is_measured_again_without_training(folder: Path, tmp_path: Path) -> None:
    models = folder / "models"
    saved = flags(dense=models / "dense", gated=models / "gated")
    gate.main(flags(out=tmp_path, **COMMON) + saved)
    first, again = (json.loads((each / "gate.json").read_text(encoding="utf-8")) for each in (folder, tmp_path))
    assert again["accuracy"] == first["accuracy"]
    assert again["gate_seconds"] is None
    assert [first[name] for name in ("backbone", "epochs", "gate_epochs", "seed")] == ["convnet", 6, 2, 0]
    assert [again[name] for name in ("backbone", "epochs", "gate_epochs", "seed")] == [None] * 4  # of what is trained


def test_other_data_are_compared_and_the_own_data_set_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = load_dataset("digits").test
    inverted = replace(test, images=255 - test.images)
    # in colour, as the real one is, and larger
    found = {"cifar100": replace(inverted, images=in_form(inverted.images, (9, 9), 3)), "cifar10": test}

    def load_images(name: str, data_dir: Path, *, train: bool) -> ImageSet:
        if name not in found:
            raise DataError("not here")
        return found[name]

    monkeypatch.setattr(gate_unexpected, "load_images", load_images)
    monkeypatch.setattr(gate_unexpected, "OTHER", 50)
    dense, gated = (load(folder / "models" / name) for name in ("dense", "gated"))
    rows = gate_unexpected.unexpected(dense, gated, test, Path("data"))
    names = [row["data"] for row in rows]
    assert names == ["own test images", "cifar100", "uniform noise", "Gaussian noise, the images' mean and deviation"]
    assert all(row["images"] == 50 for row in rows)
    assert all(row["mean_gate"] < rows[0]["mean_gate"] for row in rows[1:])


def test_attacks_leave_accuracies_and_queries(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("foolbox")
    models = folder / "models"
    saved = flags(dense=models / "dense", gated=models / "gated", surrogate=models / "dense")
    small = flags(dataset="digits", transfer_images=20, query_images=4, query_steps=1)
    gate_attacks.main(flags(out=tmp_path) + small + saved)
    found = json.loads((tmp_path / "attacks.json").read_text(encoding="utf-8"))
    rows = found["transfer"]["rows"]
    assert rows[0]["surrogate"] == rows[0]["dense"]
    assert rows[-1]["surrogate"] < rows[0]["surrogate"]
    assert [row["model"] for row in found["query"]["rows"]] == ["dense", "gated"]
    assert all(row["queries_per_image"] > 10 for row in found["query"]["rows"])


def test_a_query_attack_with_nothing_to_start_from_is_an_error(folder: Path) -> None:
    pytest.importorskip("foolbox")
    one = load_dataset("digits").test.subset(torch.tensor([0]))
    with pytest.raises(DataError, match="alike"):
        gate_attacks.query({"dense": load(folder / "models" / "dense")}, one.images.float() / 255, one.labels)


def test_images_held_out_are_not_trained_on() -> None:
    data = load_dataset("digits").train
    train, held_out = gate.parts(data, 100)
    assert len(train) + len(held_out) == len(data)
    assert not bool(torch.isin(train.ids, held_out.ids).any())
    with pytest.raises(ConfigError, match="--held-out"):
        gate.parts(data, len(data))


def test_a_mistake_ends_a_measurement_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nnheads.benchmarks.gate", "--dataset", "digits", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --held-out must be above 0 and below the")
    assert "Traceback" not in done.stderr
