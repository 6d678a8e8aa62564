"""Studies: what they declare, that a smoke run fills tables and figures, that a killed one goes on, and its reports."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nnheads.analysis import knn_predictions, probe
from nnheads.benchmarks.locks import exclusive
from nnheads.benchmarks.studies.fitting import Recipe, cross_entropy, moments, train
from nnheads.benchmarks.studies.images import fitted, statistics, study_images
from nnheads.benchmarks.studies.networks import activation_convnet, dnn_or_knn_network
from nnheads.benchmarks.studies.registry import get_study, list_studies
from nnheads.benchmarks.studies.report import entry_text, table_markdown, write_report
from nnheads.benchmarks.studies.running import StudyRun, cell_file, read_cells, run_study
from nnheads.benchmarks.studies.study import Cell, Curves, Entry, Job, Outcome, Scale, Study, Table
from nnheads.data import ImageSet
from nnheads.errors import CheckpointError, ConfigError, DataError, UnknownNameError

PLAN = {"paper": Scale("all."), "cpu": Scale("some."), "smoke": Scale("little.", {"size": 1}, cells=("a", "b"))}


def _toy(run: Any = None) -> Study:
    def by_default(job: Job) -> Outcome:
        value = job.settings["value"] + 0.01 * job.seed
        return Outcome({"accuracy": value, "none": None}, {"training": {"step": [1, 2], "accuracy": [0.1, value]}})

    return Study(
        "toy",
        "a toy",
        "a paper",
        (Cell("a", {"value": 0.5, "size": 9}), Cell("b", {"value": 0.25, "size": 9}), Cell("c", {"value": 0.1})),
        (
            Table(
                "I",
                "numbers",
                (
                    Entry("one", "ours", "a", "accuracy", 51.5),
                    Entry("one", "theirs", "b", "accuracy"),
                    Entry("two", "ours", "c", "accuracy", 10.0),
                    Entry("two", "theirs", "b", "none", 3.0),
                ),
            ),
            Table("F", "curves", curves=Curves(("a", "c"), "training", "step", (("accuracy", "acc"),), "step", "%")),
        ),
        {name: PLAN[name] for name in ("smoke", "cpu", "paper")},
        run or by_default,
    )


def _run(study: Study, out: Path, **options: Any) -> list[dict[str, Any]]:
    resume = options.pop("resume", False)
    told = {key: options.pop(key) for key in ("finished", "skipped") if key in options}
    return run_study(StudyRun(study, **{"scale": "smoke", "device": "cpu", **options}), out, resume=resume, **told)


def test_a_cell_is_one_file_with_all_it_needs(tmp_path: Path) -> None:
    results = _run(_toy(), tmp_path, seeds=(0, 1))
    assert sorted(p.name for p in (tmp_path / "cells").iterdir()) == [
        f"{cell}-seed{seed}.json" for cell in "ab" for seed in (0, 1)
    ]
    held = json.loads(cell_file(tmp_path, "a", 1).read_text())
    assert held in results
    assert held["config"] == {"value": 0.5, "size": 1}  # the scale's settings replace the cell's
    assert (held["study"], held["cell"], held["scale"], held["seed"]) == ("toy", "a", "smoke", 1)
    assert held["measures"]["accuracy"] == pytest.approx(0.51)
    assert held["seconds"] >= 0
    assert torch.__version__.startswith(held["versions"]["torch"])
    assert held["device"].startswith("cpu")


def test_finished_cells_are_kept_and_others_are_refused(tmp_path: Path) -> None:
    first = _run(_toy(), tmp_path)

    def never(job: Job) -> Outcome:
        raise AssertionError("run again")

    assert _run(_toy(never), tmp_path, resume=True) == first
    with pytest.raises(ConfigError, match="--resume"):
        _run(_toy(), tmp_path)
    changed = replace(_toy(), cells=(Cell("a", {"value": 0.6}), *_toy().cells[1:]))
    with pytest.raises(ConfigError, match=r"value 0\.5, not 0\.6"):
        _run(changed, tmp_path, resume=True)
    cell_file(tmp_path, "a", 0).write_text("{")
    with pytest.raises(CheckpointError, match="remove it"):
        _run(_toy(), tmp_path, resume=True)


def test_a_folder_of_another_study_or_scale_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    _run(_toy(), tmp_path)

    def never(job: Job) -> Outcome:
        raise AssertionError("run")

    with pytest.raises(ConfigError, match="study toy at scale smoke, not toy at scale cpu: give another --out"):
        _run(_toy(never), tmp_path, resume=True, scale="cpu", seeds=(1,))
    with pytest.raises(ConfigError, match="study toy at scale smoke, not other at scale smoke: give another --out"):
        _run(replace(_toy(never), name="other"), tmp_path, resume=True, seeds=(1,))


def test_a_cell_without_its_images_is_skipped_and_said(tmp_path: Path) -> None:
    def run(job: Job) -> Outcome:
        if job.settings["value"] == 0.5:
            raise DataError("no horses here")
        return Outcome({"accuracy": 1.0})

    said: list[tuple[str, str]] = []
    results = _run(_toy(run), tmp_path, skipped=lambda cell, why: said.append((cell, why)))
    assert [result["cell"] for result in results] == ["b"]
    assert said == [("a", "no horses here")]
    with pytest.raises(DataError, match="horses"):
        _run(_toy(run), tmp_path / "other", only=("a",))


def test_the_report_comes_from_the_files_alone(tmp_path: Path) -> None:
    _run(_toy(), tmp_path, seeds=(0, 1))

    def never(job: Job) -> Outcome:
        raise AssertionError("run again")

    text = write_report(_toy(never), tmp_path).read_text()
    assert "| one | 50.50 ± 0.71 (51.5) | 25.50 ± 0.71 |" in text
    assert "| two | - (10) | - (3) |" in text  # not run; nothing measured
    assert "Scale smoke: little. Seeds 0, 1" in text
    assert "![curves](F.png)" in text
    assert (tmp_path / "I.png").stat().st_size > 1000
    held = cell_file(tmp_path, "a", 0)
    held.write_text(held.read_text().replace('"smoke"', '"cpu"'))
    with pytest.raises(ConfigError, match="several scales"):
        write_report(_toy(), tmp_path)


def test_numbers_in_the_form_of_their_column() -> None:
    results = [{"cell": "a", "seed": 0, "measures": {"m": 81952.0, "p": 0.99711}}]
    assert entry_text(Entry("", "", "a", "m", 81952, "count"), results) == "81,952 (81,952)"
    assert entry_text(Entry("", "", "a", "p", 0.9971, "share"), results) == "0.9971 (0.9971)"
    assert entry_text(Entry("", "", "b", "p", None, "share"), results) == "-"
    gap = table_markdown(Table("G", "gap", (Entry("r", "gap", "a", "p", 4.4, "points"),)), results)
    assert gap.splitlines()[2:] == ["| | gap points |", "|---|---|", "| r | 99.71 (4.4) |"]
    table = Table("T", "title", (Entry("r", "c", "a", "p"),), note="read this")
    assert table_markdown(table, results) == "## T: title\n\nread this\n\n| | c % |\n|---|---|\n| r | 99.71 |"


def test_what_cannot_be_run_is_refused() -> None:
    study = _toy()
    with pytest.raises(UnknownNameError, match="known: F, I"):
        study.chosen("smoke", ("IX",))
    with pytest.raises(UnknownNameError, match="scale"):
        study.chosen("smok")
    with pytest.raises(ConfigError, match="no cell"):
        study.chosen("smoke", only=("c",))
    assert [cell.name for cell in study.chosen("paper", ("i",))] == ["a", "b", "c"]
    with pytest.raises(UnknownNameError, match="did you mean 'conv-knn'"):
        get_study("conv-kn")
    with pytest.raises(UnknownNameError, match="cell"):
        replace(study, cells=study.cells[:1]).check()


@pytest.mark.parametrize("name", list_studies())
def test_every_study_is_whole(name: str) -> None:
    study = get_study(name)
    for scale in study.scales:
        for cell in study.chosen(scale):
            json.dumps(study.settings(cell, scale))
    shown = {cell for table in study.tables for cell in table.cells}
    assert shown == {cell.name for cell in study.cells}  # nothing is run that no table shows


@pytest.mark.parametrize("name", list_studies())
def test_every_study_runs_at_its_smallest_scale(name: str, tmp_path: Path) -> None:
    study = get_study(name)
    results = _run(study, tmp_path)
    assert len(results) == len(study.chosen("smoke"))
    for result in results:
        filled = {key: value for key, value in result["measures"].items() if value is not None}
        assert filled, result["cell"]
    text = write_report(study, tmp_path).read_text()
    assert text.count("## ") >= 1
    assert read_cells(tmp_path, study)


PUBLISHED = {
    "mnist-conv-knn": 81_952,
    "mnist-baseline": 274_246,
    "svhn-conv-knn": 83_552,
    "svhn-baseline": 390_534,
    "cifar10-conv-knn": 446_832,
    "cifar10-baseline": 1_498_234,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_conv_knn_has_the_published_number_of_parameters(name: str) -> None:
    study = get_study("conv-knn")
    settings = study.settings(study.cell(f"parameters-{name}"), "paper")
    found = study.run(Job(settings, 0, None, "cpu", lambda what, done, total: None))
    assert found.measures["parameters"] == PUBLISHED[name]


@pytest.mark.parametrize(("name", "embedding"), [("lenet-640", 640), ("mlp-640", 640), ("wrn-10-2", 128)])
@pytest.mark.parametrize("form", [(1, 28), (3, 32)])
def test_networks_embed_on_the_unit_sphere(name: str, embedding: int, form: tuple[int, int]) -> None:
    from nnheads.analysis import layer_embeddings

    network, layers = dnn_or_knn_network(name, form[0], 7, form[1])
    x = torch.randn(3, form[0], form[1], form[1])
    found = layer_embeddings(network, [(x, torch.zeros(3, dtype=torch.int64))], layers, device="cpu")
    assert layers[-1] == "embedding"
    assert found["embedding"].shape == (3, embedding)
    assert torch.allclose(found["embedding"].norm(dim=1), torch.ones(3), atol=1e-5)
    assert found["output"].shape == (3, 7)


def test_wide_resnet_28_10_is_the_papers() -> None:
    with torch.device("meta"):
        network, layers = dnn_or_knn_network("wrn-28-10", 3, 10, 32)
    assert sum(p.numel() for p in network.parameters()) == 36_479_194  # as in Wide-ResNet's own code
    assert layers[1:4] == ["unit_1.0", "unit_1.1", "unit_1.2"]
    assert len(layers) == 14
    with pytest.raises(UnknownNameError):
        dnn_or_knn_network("wrn-27-10", 3, 10, 32)


@pytest.mark.parametrize(("place", "count"), [("final", 1), ("iterative", 2), ("post", 2), ("both", 4)])
def test_activations_are_where_the_table_has_them(place: Any, count: int) -> None:
    network = activation_convnet(1, 10, 28, "tanh", place)
    assert sum(isinstance(module, torch.nn.Tanh) for module in network.modules()) == count
    assert network.classifier.bias is None
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def _images(count: int = 60) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 60, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    pixels[:, 0, 0] += (80 * labels).to(torch.uint8)[:, None]
    return ImageSet(pixels, labels)


def _fit(watch_at: Any = (), watch: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images = _images()
    recipe = Recipe.of({"precision": "float32", **settings})
    return train(
        model, cross_entropy, images, statistics(images), recipe, seed=0, device="cpu", watch=watch, watch_at=watch_at
    )


def test_the_rate_falls_on_a_plateau_and_training_ends_after_the_last_drop() -> None:
    # a rate so small that the loss never falls by a thousandth: every second epoch is a plateau
    done = _fit(batch_size=30, epochs=50, lr=1e-9, schedule="plateau", patience=2, drops=2)
    assert [round(rate * 1e11, 6) for rate in done.rates] == [100, 100, 100, 10, 10, 1, 1]
    assert done.steps == 14


def test_the_rate_falls_at_milestones_and_full_batches_are_one_step() -> None:
    done = _fit(batch_size=0, steps=10, lr=0.5, schedule="milestones", milestones=[0.2, 0.5], factor=5.0)
    assert done.rates == pytest.approx([0.5] * 2 + [0.1] * 3 + [0.02] * 5)
    assert done.losses[-1] < done.losses[0]
    assert len(done.losses) == 10


def test_training_is_watched_where_asked() -> None:
    done = _fit(batch_size=20, steps=7, lr=0.1, watch=lambda step: {"twice": 2.0 * step}, watch_at=(0, 2, -1))
    assert done.columns() == {"step": [0, 2, 7], "twice": [0, 4, 14]}
    assert moments(1000, 4) == [0, 62, 250, 562, 1000]
    with pytest.raises(ConfigError, match="epochs or steps"):
        _fit(epochs=1, steps=1)
    with pytest.raises(ConfigError, match="diverged"):
        _fit(batch_size=20, epochs=200, lr=1e38)


def test_images_of_a_cell() -> None:
    def images(**settings: Any) -> Any:
        return study_images(Job({"dataset": "digits", **settings}, 0, None, "cpu", lambda *_: None))

    few = images(train_images=50, test_images=20, form=[3, 32])
    assert few.train.labels.bincount().tolist() == [5] * 10
    assert few.train.images.shape == (50, 3, 32, 32)
    assert few.train.ids.tolist() == list(range(50))
    assert len(few.test) == 20
    assert images(per_class=7).train.labels.bincount().tolist() == [7] * 10
    assert images(per_class=144).train.labels.bincount().tolist() == [
        min(144, n) for n in images().train.labels.bincount()
    ]
    two = images(classes=[3, 8])
    assert set(two.train.labels.tolist()) == {0, 1}
    assert two.train.class_names == ("3", "8")
    random = images(labels="random")
    plain = images()
    assert torch.equal(random.train.images, plain.train.images)
    assert 0.05 < float((random.train.labels == plain.train.labels).float().mean()) < 0.15
    with pytest.raises(DataError, match="ask for fewer"):
        images(train_images=5000)
    with pytest.raises(DataError, match="--data-dir"):
        images(dataset="images:horses-or-humans")


def test_small_images_are_enlarged_and_padded() -> None:
    grown = fitted(torch.full((1, 1, 8, 8), 9, dtype=torch.uint8), 3, 28)
    assert grown.shape == (1, 3, 28, 28)
    assert int((grown > 0).sum()) == 3 * 24 * 24
    assert fitted(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), 1, 20).shape == (1, 1, 20, 20)


def test_one_search_answers_for_every_k() -> None:
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(50, 4, generator=generator), torch.randn(20, 4, generator=generator)
    y = torch.arange(50) % 3
    found = knn_predictions(x, y, queries, (1, 5, 80), metric="l2")
    for k, predicted in found.items():
        assert torch.equal(predicted, probe(x, y, "knn", k=k, metric="l2").predict(queries))


def _study(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nnheads", "study", "dnn-or-knn", "--scale", "smoke", "--out", "out", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    # one thread, as this process has: sums in another order end in other numbers
    process = _study(["--seeds", "0,1,2", "--threads", "1"], tmp_path)
    cells = tmp_path / "out" / "cells"
    until = time.monotonic() + 300  # a busy machine takes longer than the test needs on an idle one
    while not list(cells.glob("*.json")) and time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    held = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 0 < len(held) < 6
    study = get_study("dnn-or-knn")
    results = _run(study, tmp_path / "out", seeds=(0, 1), resume=True)
    assert {path: path.stat().st_mtime_ns for path in held} == held  # not run again
    whole = _run(study, tmp_path / "whole", seeds=(0, 1))

    def numbers(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in result["measures"].items() if k != "train_seconds"} for result in results]

    assert numbers(results) == numbers(whole)
    assert not list(cells.glob(".*"))  # neither locks nor halves of files


def test_the_lock_of_a_process_killed_at_its_end_is_removed(tmp_path: Path) -> None:
    _run(_toy(), tmp_path)
    left, busy = (tmp_path / "cells" / f".{cell}-seed0.lock" for cell in "ab")
    left.touch()
    with exclusive(busy):
        _run(_toy(), tmp_path, resume=True)
        assert not left.exists()
        assert busy.exists()


def test_the_command_lists_runs_and_reports(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from nnheads.cli.main import main

    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["study", *arguments])
        assert not end.value.code, capsys.readouterr().err
        return str(capsys.readouterr().out)

    assert "dnn-or-knn" in command("list")
    assert json.loads(command("list", "--json"))[0]["tables"]
    shown = command("conv-knn", "--scale", "smoke", "--table", "parameters", "--device", "cpu")
    assert "81,952 (81,952)" in shown
    assert "scale smoke: digits in place of all data" in shown
    assert "runs/study-conv-knn-smoke-001/report.md" in shown
    again = command("conv-knn", "--scale", "smoke", "--report", "--table", "parameters")
    assert again == shown
    found = json.loads(command("conv-knn", "--scale", "smoke", "--table", "parameters", "--resume", "--json"))
    assert len(found["results"]) == 8
    with pytest.raises(SystemExit) as end:
        main(["study", "conv-knn", "--scale", "huge"])
    assert end.value.code == 2
    assert "unknown scale 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["geometric", "geometric-flip", "photometric"])
def test_augmentations_change_each_image_and_depend_on_the_generator_alone(name: str) -> None:
    from nnheads.benchmarks.studies.augmentations import BY_NAME

    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images = one.repeat(6, 1, 1, 1)
    made = BY_NAME[name](images, torch.Generator().manual_seed(1))
    assert made.dtype == torch.uint8
    assert made.shape == images.shape
    assert len({bytes(image.numpy()) for image in made}) == 6
    assert torch.equal(made, BY_NAME[name](images, torch.Generator().manual_seed(1)))


def test_mixup_mixes_labels_as_it_mixes_images() -> None:
    from nnheads.benchmarks.studies.augmentations import mixed_up

    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 0])
    x = torch.nn.functional.one_hot(y, 3).float()
    mixed, soft = mixed_up(x, y, 3, alpha=1.0)
    assert torch.allclose(mixed, soft)
    assert torch.allclose(soft.sum(1), torch.ones(4))
    assert ((soft > 0).sum(1) == 2).any()


def test_an_attack_moves_every_pixel_by_its_strength() -> None:
    import nnheads
    from nnheads.benchmarks.studies.biased import fast_gradient_sign

    images = _images(20)
    preprocessing = statistics(images)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    model = nnheads.attach_head(net, "dense", preprocessing=preprocessing)
    job = Job({}, 0, None, "cpu", lambda what, done, total: None)
    moved = fast_gradient_sign(model, images, 4, job).images.int() - images.images.int()
    assert int(moved.abs().max()) == 4

    def loss(part: ImageSet) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.nll_loss(model(preprocessing(part.images)), part.labels))

    assert loss(fast_gradient_sign(model, images, 4, job)) > loss(images)


def test_pictures_are_drawn_from_the_file_alone(tmp_path: Path) -> None:
    from nnheads.benchmarks.studies.figures import draw
    from nnheads.benchmarks.studies.pictures import as_png
    from nnheads.benchmarks.studies.study import Picture

    strip = as_png([torch.zeros(1, 8, 8, dtype=torch.uint8)] * 3)
    series = {
        "confusion": {"class": ["a", "b"], "a": [9, 1], "b": [0, 5]},
        "nearest": {"class": ["a"], "png": [strip], "labels": [["a", "b"]]},
    }
    result = {"cell": "a", "seed": 0, "scale": "smoke", "series": series, "measures": {}}
    for kind in ("confusion", "nearest"):
        table = Table(kind, "a picture", picture=Picture(kind, ("a",)))  # type: ignore[arg-type]
        assert table.cells == ("a",)
        made = draw(_toy(), table, [result], tmp_path / f"{kind}.png")
        assert made is not None
        assert made.stat().st_size > 1000
        assert draw(_toy(), table, [], tmp_path / "none.png") is None


def test_curves_of_seeds_that_end_at_different_times_are_drawn(tmp_path: Path) -> None:
    from nnheads.benchmarks.studies.figures import draw

    study = _toy()
    [table] = [table for table in study.tables if table.curves is not None]
    results = [
        {
            "cell": "a",
            "seed": steps,
            "scale": "smoke",
            "measures": {},
            "series": {"training": {"step": list(range(steps)), "accuracy": [0.1 * n for n in range(steps)]}},
        }
        for steps in (3, 5)
    ]
    made = draw(study, table, results, tmp_path / "curves.png")
    assert made is not None
    assert made.stat().st_size > 1000


def test_svhn_is_read_as_its_authors_offer_it(tmp_path: Path) -> None:
    from scipy.io import savemat

    from nnheads.benchmarks.datasets import load_dataset

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 32, 3, 4), generator=generator, dtype=torch.uint8)
    for part in ("train", "test"):
        savemat(
            tmp_path / f"{part}_32x32.mat", {"X": pixels.numpy(), "y": torch.tensor([[10], [1], [2], [10]]).numpy()}
        )
    data = load_dataset("svhn", tmp_path)
    assert data.train.labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(data.train.images[2], pixels[..., 2].permute(2, 0, 1))
    (tmp_path / "test_32x32.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match="fetch it again"):
        load_dataset("svhn", tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": pixels.numpy(), "y": torch.ones(4, 1).numpy()}, do_compression=True)
    whole = (tmp_path / "test_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").write_bytes(whole[:3000] + bytes(50) + whole[3050:])
    with pytest.raises(DataError, match="fetch it again"):
        load_dataset("svhn", tmp_path)
    with pytest.raises(DataError, match=r"put train_32x32\.mat and test_32x32\.mat into"):
        load_dataset("svhn", tmp_path.parent)


def test_a_folder_of_images_is_read_in_the_size_of_the_network(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        place = tmp_path / "birds-200" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((90 + number, 120), 80).convert("RGB").save(place / f"{number}.png")
    settings = {"dataset": "images:birds-200", "form": [3, 100]}
    data = study_images(Job(settings, 0, tmp_path, "cpu", lambda *_: None))
    assert data.train.images.shape[1:] == (3, 100, 100)
    # enlarged from a smaller copy, neighbouring pixels would be equal
    assert float((data.train.images[..., 1:] == data.train.images[..., :-1]).float().mean()) < 0.2
    with pytest.raises(DataError, match="no folder cars-196/"):
        study_images(Job({"dataset": "images:cars-196"}, 0, tmp_path, "cpu", lambda *_: None))


def test_one_that_waits_takes_over_what_others_leave(tmp_path: Path) -> None:
    lock = tmp_path / "cells" / ".a-seed0.lock"
    with ThreadPoolExecutor() as pool, exclusive(lock) as mine:
        assert mine
        waiting = pool.submit(run_study, StudyRun(_toy(), "smoke", device="cpu"), tmp_path, wait=True)
        while not cell_file(tmp_path, "b", 0).is_file():
            assert not waiting.done()
            time.sleep(0.01)
        assert not cell_file(tmp_path, "a", 0).exists()
        lock.unlink()  # as when its process ends
        assert [result["cell"] for result in waiting.result(timeout=20)] == ["a", "b"]


@pytest.mark.slow
def test_processes_of_torchrun_share_the_cells_of_a_study(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "nnheads"]
    arguments = ["study", "nngk", "--scale", "smoke", "--device", "cpu"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*launcher, *arguments, *more]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = run("--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)["results"]  # of one process alone
    assert len(results) == len(get_study("nngk").chosen("smoke"))
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == sorted(
        cell_file(tmp_path, result["cell"], 0).name for result in results
    )
    again = run("--out", str(tmp_path))
    assert again.returncode != 0
    assert "holds results already" in again.stderr
