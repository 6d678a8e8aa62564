"""`nnheads.benchmarks.compare`: what is measured, kept, resumed and refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import nnheads.attach
import nnheads.training
from nnheads import list_heads
from nnheads.benchmarks.compare import MEASURES, RECIPES, CompareConfig, compare
from nnheads.benchmarks.comparison import expand_heads
from nnheads.benchmarks.datasets import DATASETS, load_dataset
from nnheads.cli.compare_tables import show_heads
from nnheads.errors import AttachError, CheckpointError, ConfigError, DataError, UnknownNameError
from nnheads.weights import build_pretrained, published_statistics

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


def test_a_head_may_have_options_of_its_own(tmp_path: Path) -> None:
    heads = ("impostor", "impostor+centers=fixed+k=5")
    rows = compare(CompareConfig(heads=heads, epochs=1, device="cpu"), tmp_path)["rows"]
    assert [row["head"] for row in rows] == list(heads)
    assert rows[0]["log_loss"] != rows[1]["log_loss"]
    assert (tmp_path / "impostor+centers=fixed+k=5-seed0.json").is_file()


def test_the_gated_network_is_cut_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    attach = nnheads.attach.attach_head

    def seen(*args: Any, **options: Any) -> nnheads.HeadedModel:
        made.append(attach(*args, **options))
        return made[-1]

    monkeypatch.setattr("nnheads.attach.attach_head", seen)
    config = CompareConfig(heads=("dense", "biased+at=bn2+gate_epochs=1"), epochs=1, device="cpu")
    summary = compare(config, tmp_path)
    dense, row = summary["rows"]
    assert made[-1].at == "bn2"
    assert row["accuracy"]["mean"] > 0.2
    # how much skips stands beside it, and only where something can
    skipped = made[-1].gated(made[-1].preprocessing(load_dataset("digits").test.images)).skipped
    assert row["skipped"]["mean"] == pytest.approx(float(skipped.float().mean()), abs=0.01)
    assert dense["skipped"] is None
    show_heads(summary)
    assert "f2 %" in (told := capsys.readouterr().out)
    assert "skip f2: share of the test images" in told
    show_heads({**summary, "rows": [dense]})
    assert "f2 %" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("impostor+centers", "'centers' in 'impostor.centers' must have the form key=value"),
        ("impostor+center=tied", "unknown option of head 'impostor' 'center'.*did you mean 'centers'"),
        ("impostor+k=5+k=6", "gives k twice"),
        ("impostr+k=5", "unknown head 'impostr'"),
        ("impostor+centers=lose", "centers must be one of"),
        ("impostor+at=features.3", "unknown option of head 'impostor' 'at'"),
        ("biased+at=nowhere", "'nowhere'"),
        ("biased+projector=pooled", "a projector needs a place"),
    ],
)
def test_mistakes_in_a_heads_options(head: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, AttachError), match=message):
        compare(CompareConfig(heads=("dense", head), epochs=1, device="cpu"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_stands_for_every_registered_head() -> None:
    heads = expand_heads(["nngk", "all", "nngk+k=5"])
    assert heads[0] == "nngk"
    assert sorted(heads) == sorted([*list_heads(), "nngk+k=5"])
    CompareConfig(heads=heads).check()


# ---- where the backbone starts from ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, trained on digits."""
    data = load_dataset("digits")
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 10, 1), "dense")
    nnheads.fit(model, data.train, epochs=2, optimizer="adamw", lr=3e-3, device="cpu", progress=False)
    return nnheads.save(model, tmp_path_factory.mktemp("weights") / "model")


def test_frozen_backbones_start_from_a_file_and_stay_as_they_are(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nnheads.HeadedModel] = []
    fit = nnheads.training.fit

    def spy(model: nnheads.HeadedModel, *args: Any, **options: Any) -> Any:
        made.append(model)
        return fit(model, *args, **options)

    monkeypatch.setattr(nnheads.training, "fit", spy)
    heads = ("dense", "nngk", "knn", "nca")
    config = CompareConfig(heads=heads, epochs=1, device="cpu", freeze=True, weights=trained)
    rows = {row["head"]: row for row in compare(config, tmp_path)["rows"]}
    expected = nnheads.load(trained).backbone.state_dict()
    for model in made:
        found = model.backbone.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # a vote over frozen features has nothing to learn
    results = {head: json.loads((tmp_path / f"{head}-seed0.json").read_text()) for head in heads}
    assert [results[head]["gradient_samples"] for head in heads] == [1438, 1438, 0, 0]
    assert all(rows[head]["accuracy"]["mean"] > 0.85 for head in ("nngk", "knn", "nca"))
    with pytest.raises(ConfigError, match=r"was made with freeze True, not None"):
        compare(replace(config, freeze=False), tmp_path, resume=True)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, trained: Path) -> None:
    file = trained / "backbone.safetensors"
    with pytest.raises(CheckpointError, match=r"does not fit ResNet9: 'stem.0.weight' is missing and \d+ more"):
        compare(CompareConfig(heads=("knn",), backbone="resnet9", weights=file, epochs=1), tmp_path)
    pickled = tmp_path / "weights.pth"
    torch.save({}, pickled)
    with pytest.raises(CheckpointError, match=r"pickled weights are not read; save them with safetensors"):
        compare(CompareConfig(heads=("knn",), weights=pickled, epochs=1), tmp_path / "new")
    plain = tmp_path / "plain.safetensors"
    save_file(nnheads.build_backbone("convnet", 7, 1).state_dict(), plain)  # of another number of classes
    rows = compare(CompareConfig(heads=("knn",), weights=plain, freeze=True), tmp_path / "plain")["rows"]
    assert rows[0]["accuracy"]["mean"] > 0.5


def test_published_weights_are_taken_with_their_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    name = "shufflenet_v2_x0_5"
    known = torchvision.models.get_model_weights(name).DEFAULT
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = torchvision.models.get_model(name).state_dict()
    torch.save(published, cache / known.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = build_pretrained(f"torchvision:{name}")
    assert all(torch.equal(tensor, published[key]) for key, tensor in backbone.state_dict().items())
    assert published_statistics(f"torchvision:{name}", backbone) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = nnheads.attach_head(backbone, "knn", num_classes=4)
    assert model.head.num_classes == 4


def test_weights_that_cannot_be_had_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ConfigError, match=r"no weights for 'torchvision:resnet18' \(.*no network.*give the file"):
        build_pretrained("torchvision:resnet18")
    with pytest.raises(UnknownNameError, match="did you mean"):
        build_pretrained("torchvision:resnet180")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrained": True}, "'convnet' has no published weights: give --backbone torchvision:NAME"),
        ({"pretrained": True, "weights": Path("a")}, "not both"),
        ({"weights": Path("nowhere.safetensors")}, "no such file: nowhere.safetensors"),
        ({"freeze": True}, "--freeze without --pretrained or --weights"),
    ],
)
def test_mistakes_about_weights(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CompareConfig(**changes).check()


def test_images_are_resized(tmp_path: Path) -> None:
    data = load_dataset("digits", size=16)
    assert data.train.images.shape == (1438, 1, 16, 16)
    assert data.preprocessing.size == (16, 16)
    data.preprocessing(data.test.images[:2])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (90, 70), (9 * number, 200, 3)).save(tmp_path / name / f"{number}.png")
    own = load_dataset(f"images:{tmp_path}", size=80)
    assert own.train.images.shape[1:] == (3, 80, 80)
    assert own.preprocessing.size == (80, 80)


def test_foreign_images_are_looked_for_before_a_head_is_trained(tmp_path: Path) -> None:
    told: list[str] = []
    config = replace(QUICK, ood="cifar10", data_dir=tmp_path)
    with pytest.raises(DataError, match="cifar"):
        compare(config, tmp_path / "out", progress=lambda what, done, whole: told.append(what))
    assert not [what for what in told if "epoch" in what]
