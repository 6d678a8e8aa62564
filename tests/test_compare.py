"""`nnheads.benchmarks.compare`: what is measured, kept, resumed and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nnheads.training
from nnheads.benchmarks.compare import MEASURES, RECIPES, CompareConfig, compare
from nnheads.benchmarks.datasets import DATASETS
from nnheads.errors import CheckpointError, ConfigError, UnknownNameError

QUICK = CompareConfig(heads=("dense", "knn"), seeds=(0, 1), epochs=1, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compare")
    return out, compare(QUICK, out)


def test_one_file_a_configuration_and_a_summary(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    names = {f"{head}-seed{seed}.json" for head in ("dense", "knn") for seed in (0, 1)}
    assert {path.name for path in out.glob("*.json")} == names | {"summary.json"}
    assert json.loads((out / "summary.json").read_text()) == summary
    for name in names:
        result = json.loads((out / name).read_text())
        assert set(MEASURES) - {"agreement"} <= set(result)
        assert result["settings"]["epochs"] == 1
        assert 0 <= result["ece"] <= 1
        assert result["versions"]["torch"]


def test_rows_hold_mean_and_spread_and_agreement_with_dense(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    rows = {row["head"]: row for row in summary["rows"]}
    both = [json.loads((out / f"knn-seed{seed}.json").read_text())["accuracy"] for seed in (0, 1)]
    assert rows["knn"]["accuracy"]["mean"] == pytest.approx(sum(both) / 2)
    assert rows["knn"]["accuracy"]["spread"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)
    assert rows["dense"]["agreement"] == {"mean": 1.0, "spread": 0.0}
    assert 0 < rows["knn"]["agreement"]["mean"] < 1
    assert rows["dense"]["memory_bytes"]["mean"] == 0
    # 1,437 embeddings of 128 float32 numbers at the least
    assert rows["knn"]["memory_bytes"]["mean"] >= 1437 * 128 * 4
    assert rows["knn"]["ms_per_sample"]["mean"] > 0


def test_without_dense_there_is_no_agreement(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    alone = CompareConfig(heads=("knn",), seeds=(0,), epochs=1, device="cpu")
    (row,) = compare(alone, out, resume=True)["rows"]
    assert row["agreement"] is None
    assert row["accuracy"]["spread"] is None


def test_every_head_starts_from_the_same_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[torch.Tensor] = []
    fit = nnheads.training.fit

    def spy(model: nnheads.HeadedModel, *args: Any, **options: Any) -> Any:
        started.append(torch.cat([p.detach().flatten() for p in model.backbone.parameters()]))
        return fit(model, *args, **options)

    monkeypatch.setattr(nnheads.training, "fit", spy)
    config = CompareConfig(heads=("dense", "nca"), seeds=(0, 1), epochs=1, device="cpu")
    compare(config, tmp_path)
    first_dense, first_nca, second_dense, second_nca = started
    assert torch.equal(first_dense, first_nca)
    assert torch.equal(second_dense, second_nca)
    assert not torch.equal(first_dense, second_dense)


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    def interrupt(result: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(QUICK, tmp_path, finished=interrupt)
    kept = tmp_path / "dense-seed0.json"
    assert [path.name for path in tmp_path.glob("*.json")] == [kept.name]
    before = kept.read_bytes()
    made: list[tuple[str, int]] = []
    summary = compare(
        QUICK, tmp_path, resume=True, finished=lambda result: made.append((result["head"], result["seed"]))
    )
    assert made == [("knn", 0), ("dense", 1), ("knn", 1)]
    assert kept.read_bytes() == before
    for ours, whole in zip(summary["rows"], finished[1]["rows"], strict=True):
        assert ours["accuracy"] == whole["accuracy"]
        assert ours["agreement"] == whole["agreement"]


def test_results_are_never_mixed_or_overwritten(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"holds results already.*--resume"):
        compare(QUICK, out)
    longer = CompareConfig(heads=("dense", "knn"), seeds=(0, 1), epochs=2, device="cpu")
    with pytest.raises(ConfigError, match=r"dense-seed0\.json was made with epochs 1, not 2"):
        compare(longer, out, resume=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "dense-seed0.json"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"dense-seed0\.json"):
        compare(QUICK, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"heads": ("dense", "knnn")}, UnknownNameError, "did you mean 'knn'"),
        ({"heads": ()}, ConfigError, "at least one head"),
        ({"dataset": "digit"}, UnknownNameError, "did you mean 'digits'"),
        ({"backbone": "convnets"}, UnknownNameError, "convnet"),
        ({"device": "abacus"}, ConfigError, "abacus"),
        ({"epochs": 0}, ConfigError, "epochs"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    out = tmp_path / "new"
    with pytest.raises(error, match=words):
        compare(CompareConfig(**{"epochs": 1, **changes}), out)
    assert not out.exists()


def test_every_data_set_has_a_recipe_that_nca_can_train_with() -> None:
    assert set(RECIPES) == set(DATASETS)
    for name, recipe in RECIPES.items():
        assert recipe.batch_size >= 2 * DATASETS[name].classes
