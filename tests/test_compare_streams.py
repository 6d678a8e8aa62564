"""Strategies side by side on a stream: variants, runs that are kept, locks, learning rates, means."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nnheads.benchmarks.runner
from nnheads.benchmarks.checkpoint import experiences_done
from nnheads.benchmarks.compare import compare
from nnheads.benchmarks.compare_streams import MEASURES, all_cells, compare_streams, summarize_streams
from nnheads.benchmarks.comparison import CompareConfig
from nnheads.benchmarks.config import RunConfig
from nnheads.benchmarks.locks import exclusive
from nnheads.benchmarks.specs import stream_spec
from nnheads.benchmarks.stream_comparison import StreamComparison, stream_cells
from nnheads.benchmarks.variants import Variant, variants
from nnheads.errors import CheckpointError, ConfigError, DivergedError, UnknownNameError
from nnheads.strategies.registry import strategy_spec

BASE = RunConfig(stream="split-digits", device="cpu")


def plan(*strategies: str, **given: Any) -> StreamComparison:
    return StreamComparison(variants=variants(strategies), base=BASE, **given)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs take no time; a better rate and a higher seed give a better accuracy."""
    configs: list[RunConfig] = []

    def fake(config: RunConfig, out: None, **options: Any) -> dict[str, Any]:
        configs.append(config)
        best = {"replay": 0.1, "naive": 0.3}.get(config.strategy, 0.03)
        accuracy = 0.5 + 0.1 * config.seed - abs((config.learning_rate or best) - best)
        slow = 2.0 if config.strategy == "avalanche-replay" else 1.0
        return {
            "config": config.resolve(stream_spec(config.stream), strategy_spec(config.strategy)).to_dict(),
            "strategy": config.strategy,
            "head": config.head or "impostor",
            "seed": config.seed,
            "accuracy": accuracy,
            "forgetting": 0.1,
            "anytime_accuracy": 0.6,
            "accuracy_matrix": [[1.0, None], [0.5, accuracy]],
            "test_counts": [10, 30],
            "gradient_samples": 100,
            "memory_bytes": 800,
            "train_seconds": 3.0 * slow + (config.memory == 60),
            "eval_seconds": 1.0 * slow,
            "processor": "abacus",
            "device": "cpu",
            "versions": {"torch": "2"},
        }

    monkeypatch.setattr(nnheads.benchmarks.runner, "run", fake)
    return configs


# ---- variants ----------------------------------------------------------------------------------------------------


def test_settings_go_where_they_belong() -> None:
    variant = Variant.read("impostor+ema=0.99+n_a=0+n-d=0+k=8+lr=0.05+choose=mixed:0.5+tie=0.1")
    config = variant.apply(replace(BASE, head_options={"floor": 0.01}))
    assert (config.strategy, config.ema, config.learning_rate) == ("impostor", 0.99, 0.05)
    assert config.strategy_options == {"n_a": 0, "n_d": 0, "choose": "mixed:0.5"}
    assert config.head_options == {"floor": 0.01, "k": 8, "tie": 0.1}
    assert variant.file_name == "impostor+ema=0.99+n_a=0+n-d=0+k=8+lr=0.05+choose=mixed-0.5+tie=0.1"
    assert Variant.read("replay + head=nngk").apply(BASE).head == "nngk"


def test_heads_and_rates_multiply_where_nothing_else_is_said() -> None:
    found = variants(["replay", "impostor+head=nngk"], ["dense", "impostor"], [0.1, 0.3])
    assert [variant.name for variant in found] == [
        "replay+head=dense+lr=0.1",
        "replay+head=dense+lr=0.3",
        "replay+head=impostor+lr=0.1",
        "replay+head=impostor+lr=0.3",
        "impostor+head=nngk+lr=0.1",
        "impostor+head=nngk+lr=0.3",
    ]
    [tied] = variants(["replay+ema=0.9"], ["impostor+centers=tied"])
    assert (tied.settings["head"], tied.head_options, tied.settings["ema"]) == ("impostor", {"centers": "tied"}, 0.9)


def test_what_is_begun_is_not_taken_over_without_being_told(asked: list[RunConfig], tmp_path: Path) -> None:
    (tmp_path / ".replay-s0.checkpoint").mkdir()
    with pytest.raises(ConfigError, match="holds results already"):
        compare_streams(plan("replay"), tmp_path)
    assert compare_streams(plan("replay"), tmp_path, resume=True)["finished"] == 1


def test_comparisons_are_not_mixed_in_a_folder(asked: list[RunConfig], tmp_path: Path) -> None:
    compare_streams(plan("replay"), tmp_path)
    before = (tmp_path / "summary.json").read_text()
    other = replace(plan("er-ace"), base=replace(BASE, stream="new-instances:split-digits"))
    told = "holds a comparison on stream split-digits, not on "
    with pytest.raises(ConfigError, match=told + "stream new-instances:split-digits: give another --out"):
        compare_streams(other, tmp_path, resume=True)
    with pytest.raises(ConfigError, match=told + "dataset digits"):
        compare(CompareConfig(heads=("dense",)), tmp_path, resume=True)
    assert (tmp_path / "summary.json").read_text() == before
    (tmp_path / "summary.json").unlink()  # an interrupted one has none
    with pytest.raises(ConfigError, match=told):
        compare_streams(other, tmp_path, resume=True)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "dense-seed0.json").write_text('{"head": "dense", "settings": {"dataset": "mnist"}}')
    with pytest.raises(ConfigError, match="holds a comparison on dataset mnist, not on dataset digits"):
        compare(CompareConfig(heads=("dense",)), tmp_path / "heads", resume=True)
    assert not [c for c in asked if c.strategy == "er-ace"]


def test_results_of_another_precision_are_not_taken_for_these(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = plan("replay", memory=(50,))
    compare_streams(comparison, tmp_path)
    file = tmp_path / "replay-m50-s0.json"
    content = json.loads(file.read_text())
    spec = strategy_spec("replay")
    for made, now in ((False, True), (True, False)):
        monkeypatch.setattr("nnheads.devices.multiplies_bfloat16", lambda device, made=made: made)
        resolved = comparison.config(comparison.variants[0], 50, 0).resolve(stream_spec("split-digits"), spec)
        file.write_text(json.dumps({**content, "config": json.loads(json.dumps(resolved.to_dict()))}))
        assert compare_streams(comparison, tmp_path, resume=True)["finished"] == 1
        monkeypatch.setattr("nnheads.devices.multiplies_bfloat16", lambda device, now=now: now)
        names = ("bfloat16", "float32") if made else ("float32", "bfloat16")
        with pytest.raises(ConfigError, match=rf"precision='{names[0]}' \(now '{names[1]}'\)"):
            compare_streams(comparison, tmp_path, resume=True)
    # results from before that was written down: AVX512-BF16 did not count then
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "config": {**content["config"], "precision": "auto"}}))
    monkeypatch.setattr("nnheads.devices.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("nnheads.devices.cpu_bfloat16", lambda: "AMX")
    assert compare_streams(comparison, tmp_path, resume=True)["finished"] == 1
    monkeypatch.setattr("nnheads.devices.cpu_bfloat16", lambda: "AVX512_BF16")
    with pytest.raises(ConfigError, match=r"precision='float32' \(now 'bfloat16'\)"):
        compare_streams(comparison, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replai", "unknown strategy 'replai'.*did you mean 'replay'"),
        ("replay+ema", r"'ema' in 'replay\+ema' must have the form key=value"),
        ("replay+ema=", "must have the form key=value"),
        ("replay+ema=0.9+ema=0.8", "gives ema twice"),
        ("replay+lr=0.1+learning_rate=0.2", "gives learning_rate twice"),
        ("replay+seed=1", "unknown setting in .* 'seed'"),
        ("replay+emma=0.9", "unknown setting in .* 'emma'.*did you mean 'ema'"),
        ("replay+n_a=1", "unknown setting in .* 'n_a'"),
        ("er-ace+k=3", "unknown setting in .* 'k'"),
        ("icarl+k=3", "unknown setting in .* 'k'"),
        ("replay+head=knnn", "unknown head 'knnn'"),
        ("replay+head=3", r"head=3 in 'replay\+head=3' is not the name of a head"),
        ("impostor+head=knn", "needs a head that votes with Gaussian kernels .*, not 'knn'"),
        ("icarl+head=knn", "'icarl' brings its own classifier"),
        ("replay+ema=much", "ema must be between 0 and 1, not 'much'"),
        ("replay+memory=many", "memory must be a whole number"),
        ("slda+ema=0.9", "strategy 'slda' trains no weights"),
        ("replay+backbone=convne", "convnet"),
    ],
)
def test_mistakes_in_a_variant(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(text).check()


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        (StreamComparison((), base=BASE), "at least one strategy"),
        (plan("replay", "replay+ema=0.9", "replay"), "'replay' is given twice"),
        (replace(plan("slda"), base=replace(BASE, ema=0.9)), "--ema averages the weights that are trained"),
        (replace(plan("naive"), base=replace(BASE, exemplar_bytes=384)), "none of the strategies given keeps any"),
        (replace(plan("replay"), base=replace(BASE, strategy_options={"n_a": 1})), "none of the strategies given has"),
        (plan("replay+head=dense", "impostor+drift=slow"), "drift must be one of free, frozen, distill, not 'slow'"),
        (plan("replay", "impostor+choose=best"), "choose must be one of"),
        (plan("replay+head=dense", "replay+k=0"), "k must be"),
        (plan("replay", "er-ace+replay=0"), "replay_batch must be 1 or more"),
        (plan("replay", "impostor+exemplars=false+ema=0.9"), "ema needs the centers' images"),
        (
            replace(plan("replay", "icarl"), base=replace(BASE, stream="new-instances:split-digits")),
            "needs experiences with classes of their own",
        ),
        (plan("replay", "der+alpha=-1"), "alpha of strategy 'der' must be a number, 0 or more, not -1"),
        (plan("replay", rates=(0.1, 0.3)), "give --validation"),
        (plan("naive", "replay", memory=(200, 9)), "memory of 9 exemplars is smaller than the 10 classes"),
        (
            replace(plan("replay+lr=0.1", rates=(0.1, 0.3)), base=replace(BASE, validation=0.1)),
            "there is none to choose",
        ),
        (replace(plan("replay"), base=replace(BASE, stream="split-digit")), "did you mean 'split-digits'"),
        (replace(plan("replay"), base=replace(BASE, device="abacus")), "abacus"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(comparison: StreamComparison, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_streams(comparison, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_only_some_know_is_for_those() -> None:
    base = replace(BASE, ema=0.9, strategy_options={"n_a": 1})
    comparison = replace(plan("replay", "impostor", "slda"), base=base)
    comparison.check()
    replay, impostor, slda = (comparison.config(variant, 50, 0) for variant in comparison.variants)
    assert (replay.ema, dict(replay.strategy_options)) == (0.9, {})
    assert (impostor.ema, dict(impostor.strategy_options)) == (0.9, {"n_a": 1})
    assert (slda.ema, dict(slda.strategy_options)) == (None, {})


# ---- runs --------------------------------------------------------------------------------------------------------


def test_every_variant_memory_and_seed_once(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = plan("replay", "naive", "replay+memory=70", memory=(50, 100), seeds=(0, 1))
    told: list[tuple[str, int, int]] = []
    compare_streams(comparison, tmp_path, finished=lambda r, done, total: told.append((r["variant"], done, total)))
    made = {path.stem for path in tmp_path.glob("*-s*.json")}
    assert made == {
        f"{name}-s{seed}" for seed in (0, 1) for name in ("replay-m50", "replay-m100", "naive", "replay+memory=70")
    }
    assert [(c.strategy, c.memory, c.seed) for c in asked][:4] == [
        ("replay", 50, 0), ("naive", None, 0), ("replay", 70, 0), ("replay", 100, 0)
    ]  # fmt: skip
    assert told[-1] == ("replay", 8, 8)
    asked.clear()
    again = compare_streams(comparison, tmp_path, resume=True)
    assert not asked
    assert again == json.loads((tmp_path / "summary.json").read_text())
    assert not list(tmp_path.glob(".*"))


def test_another_row_or_seed_makes_only_what_is_missing(asked: list[RunConfig], tmp_path: Path) -> None:
    compare_streams(plan("replay", memory=(50,)), tmp_path)
    asked.clear()
    summary = compare_streams(plan("replay", "er-ace", memory=(50,), seeds=(0, 1)), tmp_path, resume=True)
    assert [(c.strategy, c.seed) for c in asked] == [("er-ace", 0), ("replay", 1), ("er-ace", 1)]
    assert (summary["finished"], summary["runs"]) == (4, 4)


def test_only_some(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = plan("replay", "er-ace", memory=(50,), seeds=(0, 1))
    summary = compare_streams(comparison, tmp_path, only=["er-*", "replay-m50-s1"])
    assert [(c.strategy, c.seed) for c in asked] == [("er-ace", 0), ("replay", 1), ("er-ace", 1)]
    assert (summary["finished"], summary["runs"]) == (3, 4)
    assert [row["seeds"] for row in summary["rows"]] == [[1], [0, 1]]
    with pytest.raises(ConfigError, match="--only der-: there is no such run; there are replay-m50-s0, er-ace-m50-s0"):
        stream_cells(comparison, tmp_path, ["der-"])


def test_results_are_never_mixed_or_overwritten(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = plan("replay", memory=(50,))
    compare_streams(comparison, tmp_path)
    with pytest.raises(ConfigError, match="holds results already"):
        compare_streams(comparison, tmp_path)
    other = replace(comparison, base=replace(BASE, epochs=3, data_dir="elsewhere"))
    with pytest.raises(ConfigError, match=r"replay-m50-s0\.json was made with epochs=None, not 3"):
        compare_streams(other, tmp_path, resume=True)
    file = tmp_path / "replay-m50-s0.json"
    # a setting that is newer than the results had its default
    content = json.loads(file.read_text())
    del content["asked"]["validation"]
    file.write_text(json.dumps(content))
    compare_streams(comparison, tmp_path, resume=True)
    file.write_text(file.read_text()[:50])
    with pytest.raises(CheckpointError, match=r"replay-m50-s0\.json cannot be read"):
        compare_streams(comparison, tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        compare_streams(comparison, tmp_path / "file")


def test_results_made_with_other_defaults_are_not_taken_for_these(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = plan("impostor", memory=(50,))
    compare_streams(comparison, tmp_path)
    file = tmp_path / "impostor-m50-s0.json"
    content = json.loads(file.read_text())
    resolved = comparison.config(comparison.variants[0], 50, 0).resolve(
        stream_spec(BASE.stream), strategy_spec("impostor")
    )
    content["config"] = json.loads(json.dumps(resolved.to_dict()))
    assert content["config"]["strategy_options"]["redistribute"] == "none"  # nobody gave it
    file.write_text(json.dumps(content))
    compare_streams(comparison, tmp_path, resume=True)
    content["config"]["strategy_options"] = {"fine_tune": 0, "replay_dropped": True}  # as once: those given alone
    file.write_text(json.dumps(content))
    compare_streams(comparison, tmp_path, resume=True)
    for name, old, told in (
        (
            "strategy_options",
            {"redistribute": "influence", "replay_dropped": True},
            r"redistribute='influence' \(now 'none'\)",
        ),
        ("strategy_options", {"fine_tune": 0}, r"replay_dropped=False \(now True\)"),  # before it was an option
        ("head_options", {**content["config"]["head_options"], "k": 7}, r"k=7 \(now None\)"),
        ("ema", 0.5, r"ema=0.5 \(now 0.99\)"),
    ):
        changed = {**content, "config": {**content["config"], name: old}}
        file.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=rf"impostor-m50-s0\.json was made with other defaults, {told}: give"):
            compare_streams(comparison, tmp_path, resume=True)
    content["config"] = json.loads(json.dumps(resolved.to_dict()))
    file.write_text(json.dumps(content))
    asked_for = replace(comparison, base=replace(comparison.base, strategy_options={"replay_dropped": True}))
    assert compare_streams(asked_for, tmp_path, resume=True)["finished"] == 1
    as_before = replace(comparison, base=replace(comparison.base, strategy_options={"replay_dropped": False}))
    with pytest.raises(ConfigError, match=r"strategy_options=\{'replay_dropped': True\}, not"):
        compare_streams(as_before, tmp_path, resume=True)
    content["config"]["strategy_options"] = {"fine_tune": 0}
    file.write_text(json.dumps(content))
    assert compare_streams(as_before, tmp_path, resume=True)["finished"] == 1
    file.write_text(json.dumps({**content, "config": None}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        compare_streams(comparison, tmp_path, resume=True)


def test_the_backbone_of_images_in_a_folder_is_chosen_by_their_size(asked: list[RunConfig], tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "1.png")
    base = replace(BASE, stream=f"images:{tmp_path / 'images'}")
    comparison = replace(plan("replay", memory=(50,)), base=base)
    compare_streams(comparison, tmp_path / "out")
    file = tmp_path / "out" / "replay-m50-s0.json"
    content = json.loads(file.read_text())
    spec = stream_spec(base.stream)
    resolved = comparison.config(comparison.variants[0], 50, 0).resolve(spec, strategy_spec("replay"))
    content["config"] = json.loads(json.dumps({**resolved.to_dict(), "backbone": "convnet"}))
    file.write_text(json.dumps(content))
    assert compare_streams(comparison, tmp_path / "out", resume=True)["finished"] == 1


def test_means_spreads_and_ratios_by_hand(asked: list[RunConfig], tmp_path: Path) -> None:
    summary = compare_streams(plan("replay", "avalanche-replay", "naive", memory=(50, 60), seeds=(0, 1, 3)), tmp_path)
    rows = {(row["name"], row["memory"]): row for row in summary["rows"]}
    assert list(rows) == [
        ("replay", 50), ("replay", 60), ("avalanche-replay", 50), ("avalanche-replay", 60), ("naive", None)
    ]  # fmt: skip
    row = rows["replay", 50]
    assert set(MEASURES) < set(row)
    assert row["accuracy"]["mean"] == pytest.approx((0.5 + 0.6 + 0.8) / 3)
    assert row["accuracy"]["spread"] == pytest.approx(0.152753, rel=1e-5)
    assert row["seconds"] == {"mean": 4.0, "spread": 0.0}
    assert summary["reference"] == "avalanche-replay"
    assert row["time_ratio"] == rows["naive", None]["time_ratio"] == {"mean": 0.5, "spread": 0.0}
    # after the second experience 10 test images are at 0.5 and 30 at the accuracy
    assert row["curve"]["mean"] == pytest.approx([1.0, (10 * 0.5 + 30 * 1.9 / 3) / 40])
    own = compare_streams(plan("avalanche-replay", "replay+memory=60", memory=(50, 60), seeds=(0,)), tmp_path / "own")
    by_name = {(row["name"], row["memory"]): row for row in own["rows"]}
    seconds = by_name["avalanche-replay", 60]["seconds"]["mean"]  # and not those with a memory of 50
    ratio = by_name["replay+memory=60", None]["seconds"]["mean"] / seconds
    assert by_name["replay+memory=60", None]["time_ratio"]["mean"] == pytest.approx(ratio)
    for name in ("processor", "device"):  # another machine took its own time, or one that is not known
        path = tmp_path / "own" / "avalanche-replay-m60-s0.json"
        held = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in held.items() if key != name}))
        resumed = plan("avalanche-replay", "replay+memory=60", memory=(50, 60), seeds=(0,))
        again = compare_streams(resumed, tmp_path / "own", resume=True)
        assert [row["time_ratio"] for row in again["rows"] if row["name"] == "replay+memory=60"] == [None]
        path.write_text(json.dumps(held))
    alone = summarize_streams(plan("naive", seeds=(0,)), stream_cells(plan("naive", seeds=(0,)), tmp_path))
    assert alone["rows"][0]["accuracy"]["spread"] is None
    assert alone["reference"] == "naive"


def test_rates_are_chosen_on_held_out_images_and_never_on_test(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = replace(
        plan("replay", "naive", "er-ace+lr=0.2", memory=(50, 60), seeds=(0, 1), rates=(0.03, 0.1, 0.3)),
        base=replace(BASE, validation=0.1),
    )
    summary = compare_streams(comparison, tmp_path)
    trials, runs = asked[:6], asked[6:]
    assert {(c.validation, c.seed) for c in trials} == {(0.1, 0)}
    assert {(c.strategy, c.memory) for c in trials} == {("replay", 50), ("naive", None)}
    assert {c.validation for c in runs} == {None}
    assert {(c.strategy, c.learning_rate) for c in runs} == {("replay", 0.1), ("naive", 0.3), ("er-ace", 0.2)}
    assert summary["learning_rates"] == {"replay": 0.1, "naive": 0.3}
    assert len(all_cells(comparison, tmp_path)) == len(asked)
    assert {row["name"] for row in summary["rows"]} == {"replay", "naive", "er-ace+lr=0.2"}
    asked.clear()
    assert compare_streams(comparison, tmp_path, resume=True) == summary
    assert not asked


def test_rates_beyond_the_grid_are_tried_until_the_best_is_not_at_its_end(
    asked: list[RunConfig], tmp_path: Path
) -> None:
    comparison = replace(
        plan("replay", "naive", "er-ace", "joint+lr=0.2", memory=(50,), rates=(0.003, 0.01, 0.03), extend_rates=True),
        base=replace(BASE, validation=0.1),
    )
    summary = compare_streams(comparison, tmp_path)
    assert summary["rates"] == {
        "replay": [0.003, 0.01, 0.03, 0.09, 0.3],  # the best, 0.1, is not among them
        "naive": [0.003, 0.01, 0.03, 0.09, 0.3, 0.9],
        "er-ace": [0.003, 0.01, 0.03, 0.09],
    }
    assert summary["learning_rates"] == {"replay": 0.09, "naive": 0.3, "er-ace": 0.03}
    tried = [(c.strategy, c.learning_rate) for c in asked if c.validation]
    assert len(tried) == len(set(tried)) == 5 + 6 + 4
    downwards = replace(comparison, variants=variants(["er-ace"]), rates=(0.1, 0.3))
    assert compare_streams(downwards, tmp_path / "down")["rates"] == {"er-ace": [0.01, 0.03, 0.1, 0.3]}


@pytest.mark.parametrize(
    ("rates", "best", "further"),
    [
        ((0.01, 0.03, 0.1), 0.1, 0.3),
        ((0.01, 0.03, 0.1), 0.01, 0.003),
        ((0.01, 0.03, 0.1), 0.03, None),
        ((0.1, 0.12), 0.12, 0.14),
        ((0.2, 0.25), 0.2, 0.16),
        ((0.08, 0.1, 0.1), 0.1, 0.12),
        ((0.1, 0.1), 0.1, None),
        ((0.1, 0.10001), 0.10001, None),
    ],
)
def test_the_rate_beyond_a_grid(rates: tuple[float, ...], best: float, further: float | None) -> None:
    assert plan("replay", rates=rates, extend_rates=True).rate_beyond(rates, best) == further


def test_rates_are_tried_for_the_rows_of_the_runs_wanted_alone(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = replace(
        plan("replay", "naive", "er-ace", memory=(50,), seeds=(0, 1), rates=(0.03, 0.1), extend_rates=True),
        base=replace(BASE, validation=0.1),
    )
    assert len(all_cells(comparison, tmp_path, ["naive-s0"])) == 2 + 1
    found = compare_streams(comparison, tmp_path, only=["naive-s0"])
    assert {c.strategy for c in asked} == {"naive"}
    assert (found["learning_rates"], found["rates"]) == ({"naive": 0.3}, {"naive": [0.03, 0.1, 0.3, 1.0]})
    assert (found["finished"], found["runs"]) == (1, 6)
    asked.clear()
    found = compare_streams(comparison, tmp_path, resume=True, only=["er-*"])  # what was found before stays
    assert {c.strategy for c in asked} == {"er-ace"}
    assert [(row["name"], row["seeds"]) for row in found["rows"]] == [("naive", [0]), ("er-ace", [0, 1])]
    assert found["learning_rates"] == {"naive": 0.3, "er-ace": 0.03}
    trials = json.loads((tmp_path / "validation" / "summary.json").read_text())
    assert {row["strategy"] for row in trials["rows"]} == {"naive", "er-ace"}
    asked.clear()
    whole = compare_streams(comparison, tmp_path, resume=True)
    assert sum(c.validation is None for c in asked) == 3
    assert (whole["finished"], list(whole["learning_rates"])) == (6, ["replay", "naive", "er-ace"])


def test_a_rate_that_is_no_longer_chosen_concerns_the_whole_row(asked: list[RunConfig], tmp_path: Path) -> None:
    narrow = replace(plan("naive", seeds=(0, 1), rates=(0.03, 0.1)), base=replace(BASE, validation=0.1))
    compare_streams(narrow, tmp_path)
    found = compare_streams(replace(narrow, extend_rates=True), tmp_path, resume=True, only=["naive-s1"])
    assert [row["seeds"] for row in found["rows"]] == [[1]]
    assert sorted(file.name for file in tmp_path.glob("*.old")) == [
        "naive-s0.lr=0.1.json.old",
        "naive-s1.lr=0.1.json.old",
    ]
    asked.clear()
    (tmp_path / "naive-s0.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):  # before a run is made
        compare_streams(replace(narrow, seeds=(0, 1, 2)), tmp_path, resume=True, only=["naive-s2"])
    assert not asked


def test_a_run_interrupted_at_a_rate_that_is_no_longer_chosen_is_set_aside(
    asked: list[RunConfig], tmp_path: Path
) -> None:
    narrow = replace(plan("naive", rates=(0.03, 0.1)), base=replace(BASE, validation=0.1))
    checkpoint = tmp_path / ".naive-s0.checkpoint"
    checkpoint.mkdir()
    (checkpoint / "run.json").write_text(json.dumps({"config": {"learning_rate": 0.1}, "matrix": [[1.0]]}))
    compare_streams(replace(narrow, extend_rates=True), tmp_path, resume=True)
    assert json.loads((tmp_path / "naive-s0.json").read_text())["asked"]["learning_rate"] == 0.3
    aside = tmp_path / ".naive-s0.lr=0.1.checkpoint.old"
    assert (aside / "run.json").is_file()
    assert not checkpoint.exists()
    [cell] = stream_cells(narrow.with_rates({"naive": 0.1}), tmp_path)
    checkpoint.mkdir()
    (checkpoint / "run.json").write_text(json.dumps({"config": {"learning_rate": 0.3}, "matrix": []}))
    cell.set_aside()  # and back
    assert experiences_done(checkpoint) == 1
    assert not aside.exists()


def test_results_at_a_rate_that_is_no_longer_chosen_are_set_aside(asked: list[RunConfig], tmp_path: Path) -> None:
    narrow = replace(plan("naive", rates=(0.03, 0.1)), base=replace(BASE, validation=0.1))
    compare_streams(narrow, tmp_path)
    before = (tmp_path / "naive-s0.json").read_text()
    found = compare_streams(replace(narrow, extend_rates=True), tmp_path, resume=True)
    assert found["learning_rates"] == {"naive": 0.3}
    assert (tmp_path / "naive-s0.lr=0.1.json.old").read_text() == before
    assert json.loads((tmp_path / "naive-s0.json").read_text())["asked"]["learning_rate"] == 0.3
    later = (tmp_path / "naive-s0.json").read_text()
    asked.clear()
    compare_streams(narrow, tmp_path, resume=True)  # and back, with nothing made twice
    assert (tmp_path / "naive-s0.json").read_text() == before
    compare_streams(replace(narrow, extend_rates=True), tmp_path, resume=True)
    assert (tmp_path / "naive-s0.json").read_text() == later
    assert not asked
    with pytest.raises(ConfigError, match=r"made with learning_rate=0\.3, not 0\.1"):  # nothing was chosen here
        compare_streams(replace(plan("naive"), base=replace(BASE, learning_rate=0.1)), tmp_path, resume=True)


def test_a_network_that_learns_at_no_rate_ends_the_search_for_one(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = nnheads.benchmarks.runner.run
    monkeypatch.setattr(nnheads.benchmarks.runner, "run", lambda *a, **b: {**real(*a, **b), "accuracy": 0.1})
    comparison = replace(plan("er-ace", rates=(0.1, 0.3), extend_rates=True), base=replace(BASE, validation=0.1))
    assert len(compare_streams(comparison, tmp_path)["rates"]["er-ace"]) == 8


def diverging(monkeypatch: pytest.MonkeyPatch, when: Callable[[RunConfig], bool]) -> None:
    real = nnheads.benchmarks.runner.run

    def made(config: RunConfig, *given: Any, **options: Any) -> dict[str, Any]:
        if when(config):
            raise DivergedError("training diverged: give a lower lr")
        return real(config, *given, **options)

    monkeypatch.setattr(nnheads.benchmarks.runner, "run", made)


def test_a_rate_at_which_training_diverges_is_not_chosen(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda config: config.strategy == "naive" and (config.learning_rate or 0) > 0.2)
    comparison = replace(plan("naive", "replay", rates=(0.03, 0.1, 0.3)), base=replace(BASE, validation=0.1))
    told: list[str] = []
    found = compare_streams(
        replace(comparison, extend_rates=True), tmp_path, progress=lambda what, done, total: told.append(what)
    )
    assert told == ["naive+lr=0.3-s0 diverged"]
    assert found["learning_rates"] == {"naive": 0.1, "replay": 0.1}
    assert found["finished"] == 2


def test_a_run_that_diverges_does_not_keep_others_from_being_made(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda config: config.strategy == "impostor" and config.seed == 0)
    comparison = plan("impostor", "naive", seeds=(0, 1))
    with pytest.raises(DivergedError, match=r"impostor.*-s0: training diverged: give a lower lr"):
        compare_streams(comparison, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["runs"]) == (3, 4)


def test_a_run_that_diverged_is_not_tried_again_until_its_record_is_removed(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[RunConfig] = []

    def too_high(config: RunConfig) -> bool:
        tried.append(config)
        return config.strategy == "naive"

    diverging(monkeypatch, too_high)
    comparison = plan("naive", "replay")
    record = tmp_path / "naive-s0.diverged.json"
    for expected in (2, 2):  # the second time nothing is made
        with pytest.raises(DivergedError, match="naive-s0: training diverged: give a lower lr"):
            compare_streams(comparison, tmp_path, resume=True)
        assert len(tried) == expected
        assert record.is_file()
    with pytest.raises(DivergedError, match=rf"or remove {record} to try it again"):
        compare_streams(comparison, tmp_path, resume=True)
    record.unlink()
    with pytest.raises(DivergedError):
        compare_streams(comparison, tmp_path, resume=True)
    assert len(tried) == 3
    record.write_text("{")
    with pytest.raises(CheckpointError, match=r"naive-s0\.diverged\.json cannot be read .*: remove it"):
        compare_streams(comparison, tmp_path, resume=True)


def test_that_a_run_diverged_counts_for_the_same_settings_alone(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda config: config.learning_rate == 0.3)
    high, low = (replace(plan("naive"), base=replace(BASE, learning_rate=rate)) for rate in (0.3, 0.1))
    with pytest.raises(DivergedError):
        compare_streams(high, tmp_path)
    assert compare_streams(low, tmp_path, resume=True)["finished"] == 1
    assert not (tmp_path / "naive-s0.diverged.json").exists()


def test_rates_at_which_training_diverged_count_for_a_row_that_is_not_asked_for(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float | None] = []

    def too_high(config: RunConfig) -> bool:
        tried.append(config.learning_rate)
        return (config.learning_rate or 0) > 0.2

    diverging(monkeypatch, too_high)
    comparison = replace(plan("naive", "replay", rates=(0.1, 0.3)), base=replace(BASE, validation=0.1))
    compare_streams(comparison, tmp_path)
    before = len(tried)
    found = compare_streams(comparison, tmp_path, resume=True, only=["replay-*"])
    assert found["learning_rates"] == {"naive": 0.1, "replay": 0.1}
    assert len(tried) == before


def test_results_that_lack_something_are_named(asked: list[RunConfig], tmp_path: Path) -> None:
    compare_streams(plan("naive"), tmp_path)
    path = tmp_path / "naive-s0.json"
    whole = json.loads(path.read_text())
    for name in ("train_seconds", "config", "accuracy_matrix"):
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(CheckpointError, match=rf"naive-s0\.json cannot be read \(it has no {name}\): remove it"):
            compare_streams(plan("naive"), tmp_path, resume=True)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="it has no asked, config"):
        compare_streams(plan("naive"), tmp_path, resume=True)


def test_no_rate_is_chosen_where_no_weights_are_trained(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = replace(plan("slda", "naive", rates=(0.1, 0.3)), base=replace(BASE, validation=0.1))
    found = compare_streams(comparison, tmp_path)
    assert list(found["learning_rates"]) == ["naive"]
    assert [config.strategy for config in asked].count("slda") == 1


def test_a_row_that_diverges_at_every_rate_says_so(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda config: True)
    comparison = replace(plan("naive", rates=(0.1, 0.3)), base=replace(BASE, validation=0.1))
    with pytest.raises(DivergedError, match="give a lower lr"):
        compare_streams(comparison, tmp_path)


def test_a_row_that_diverges_at_every_rate_does_not_keep_others_from_being_asked_for(
    asked: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda config: config.strategy == "naive")
    comparison = replace(plan("naive", "replay", rates=(0.1, 0.3)), base=replace(BASE, validation=0.1))
    with pytest.raises(DivergedError):
        compare_streams(comparison, tmp_path)
    found = compare_streams(comparison, tmp_path, resume=True, only=["replay-*"])
    assert found["learning_rates"] == {"replay": 0.1}
    assert found["finished"] == 1


def test_what_was_set_aside_comes_back_where_nothing_took_its_place(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = replace(plan("naive"), base=replace(BASE, learning_rate=0.1))

    def cell(rate: float) -> Any:
        return stream_cells(comparison.with_rates({"naive": rate}), tmp_path)[0]

    def begin(rate: float, experiences: int) -> None:
        cell(rate).checkpoint.mkdir()
        state = {"config": {"learning_rate": rate}, "matrix": [[1.0]] * experiences}
        (cell(rate).checkpoint / "run.json").write_text(json.dumps(state))

    begin(0.1, 2)
    cell(0.3).set_aside()
    cell(0.1).set_aside()  # nothing was begun at 0.3
    assert experiences_done(cell(0.1).checkpoint) == 2
    cell(0.3).set_aside()
    begin(0.1, 1)  # anew, by a run that knew nothing of the other
    cell(0.3).set_aside()
    assert not cell(0.3).checkpoint.exists()
    cell(0.1).set_aside()
    assert experiences_done(cell(0.1).checkpoint) == 1


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    comparison = plan("replay+epochs=1", memory=(50,))
    checkpoint = stream_cells(comparison, tmp_path)[0].checkpoint
    checkpoint.mkdir()
    (checkpoint / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*run\.json.*: remove .*checkpoint to start anew"):
        compare_streams(comparison, tmp_path, resume=True)


def test_rates_may_be_tried_on_a_share(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = replace(plan("replay", rates=(0.1, 0.3), trial_share=0.4), base=replace(BASE, validation=0.1))
    compare_streams(comparison, tmp_path)
    assert [(c.share, c.validation) for c in asked] == [(0.4, 0.1), (0.4, 0.1), (None, None)]


# ---- several processes -------------------------------------------------------------------------------------------


def hold(path: Path, held: Any) -> None:
    with exclusive(path) as mine:
        held.put(mine)
        time.sleep(600)


def test_a_lock_is_exclusive_and_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "locks" / ".a.lock"
    context = multiprocessing.get_context("fork")
    held = context.Queue()
    process = context.Process(target=hold, args=(path, held), daemon=True)
    process.start()
    assert held.get(timeout=60) is True
    with exclusive(path) as mine:
        assert not mine
    assert path.read_text() == f"{process.pid}\n"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert path.exists()  # as it was left
    with exclusive(path) as mine:
        assert mine
        with exclusive(path) as again:
            assert not again
    assert not path.exists()


def test_a_run_that_another_process_makes_is_left_to_it(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = plan("replay", "er-ace", memory=(50,))
    busy = stream_cells(comparison, tmp_path)[0]
    with exclusive(busy.lock):
        summary = compare_streams(comparison, tmp_path, resume=True)
    assert [c.strategy for c in asked] == ["er-ace"]
    assert (summary["finished"], summary["runs"]) == (1, 2)
    assert not busy.lock.exists()
    compare_streams(comparison, tmp_path, resume=True)
    assert [c.strategy for c in asked] == ["er-ace", "replay"]


def test_what_a_process_killed_at_its_end_left_is_removed(asked: list[RunConfig], tmp_path: Path) -> None:
    comparison = plan("replay", "er-ace", memory=(50,))
    compare_streams(comparison, tmp_path)
    left, busy = stream_cells(comparison, tmp_path)
    left.lock.touch()
    left.checkpoint.mkdir()
    with exclusive(busy.lock):
        compare_streams(comparison, tmp_path, resume=True)
        assert not left.lock.exists()
        assert not left.checkpoint.exists()
        assert busy.lock.exists()
    assert len(asked) == 2


def work(out: Path) -> None:
    compare_streams(plan("replay+epochs=1", "naive+epochs=1", memory=(50,), seeds=(0, 1)), out, resume=True)


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=500)
        assert process.exitcode == 0
    comparison = plan("replay+epochs=1", "naive+epochs=1", memory=(50,), seeds=(0, 1))
    results = [cell.finished() for cell in stream_cells(comparison, tmp_path)]
    assert all(result and result["accuracy"] > 0.05 for result in results)
    assert not [path.name for path in tmp_path.glob(".*")]


def test_an_interrupted_run_goes_on_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    comparison = plan("impostor+epochs=1", memory=(50,))
    compare_streams(comparison, tmp_path / "whole")

    def interrupt(what: str, done: int, total: int) -> None:
        if "experience 3 of 5: training" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_streams(comparison, tmp_path / "cut", progress=interrupt)
    [left] = (tmp_path / "cut").iterdir()
    told: list[str] = []
    compare_streams(comparison, tmp_path / "cut", resume=True, progress=lambda what, done, total: told.append(what))
    assert not any("experience 2 of 5" in what for what in told)
    assert not left.exists()
    first, second = (json.loads(next((tmp_path / name).glob("*-s0.json")).read_text()) for name in ("whole", "cut"))
    assert first["accuracy_matrix"] == second["accuracy_matrix"]


def test_an_unknown_stream_or_strategy_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError):
        plan("replay+head=impost").check()
