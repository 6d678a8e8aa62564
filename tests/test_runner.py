"""Runs: every head and strategy, results, scenarios, refusals, interrupted runs. On a few digits, in seconds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nnheads.benchmarks import streams
from nnheads.benchmarks.results import read_results
from nnheads.benchmarks.runner import RunConfig, evaluate_row, run
from nnheads.benchmarks.streams import Stream
from nnheads.errors import CheckpointError, ConfigError, UnknownNameError
from nnheads.heads import list_heads
from nnheads.strategies import list_strategies

PER_CLASS = 40
real_make_stream = streams.make_stream


def short_stream(name: str, *, experiences: int = 3, **options: Any) -> Stream:
    """The first experiences of a stream, with a few training images of each class."""
    whole = real_make_stream(name, **options)
    rows, parts, start = [], [], 0
    for e in range(experiences):
        part = whole.train_indices(e)
        chosen = torch.cat([part[whole.train.labels[part] == c][:PER_CLASS] for c in whole.experiences[e]])
        rows.append(chosen)
        parts.append(torch.arange(start, start + len(chosen)))
        start += len(chosen)
    train = whole.train.subset(torch.cat(rows))
    return replace(whole, train=train, experiences=whole.experiences[:experiences], train_parts=tuple(parts))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs see a short stream."""
    monkeypatch.setattr(streams, "make_stream", short_stream)


QUICK = RunConfig(epochs=2, memory=30)


@pytest.mark.parametrize("head", list_heads())
@pytest.mark.usefixtures("short")
def test_every_head_learns_by_replay(head: str) -> None:
    # by default knn asks 30 neighbours, which here would be all there are
    found = run(replace(QUICK, head=head, epochs=6, head_options={"k": 5} if head == "knn" else {}))
    assert found["head"] == head
    assert found["accuracy"] > 0.4  # six classes
    assert found["exemplars"] == 30
    matrix = found["accuracy_matrix"]
    assert [[value is None for value in row] for row in matrix] == [[j > i for j in range(3)] for i in range(3)]


@pytest.mark.parametrize("strategy", [spec.name for spec in list_strategies()])
@pytest.mark.usefixtures("short")
def test_every_strategy_runs(strategy: str) -> None:
    # GDumb's passes go over the exemplars alone, one step each
    found = run(replace(QUICK, strategy=strategy, epochs=40 if strategy == "gdumb" else 4))
    assert found["strategy"] == strategy
    assert found["accuracy"] > 0.2  # six classes
    assert found["exemplars"] <= (30 if strategy != "cumulative" else 6 * PER_CLASS)
    assert found["memory_bytes"] == sum(found["memory_parts"].values())
    assert math.isfinite(found["forgetting"])
    trains = strategy != "slda"
    assert (found["gradient_samples"] > 0) == trains


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        *((name, 2 * PER_CLASS) for name in ("replay", "naive", "avalanche-replay", "er-ace", "der")),
        ("joint", 3 * 2 * PER_CLASS),
        ("cumulative", 2 * 2 * PER_CLASS),
        ("icarl", 2 * PER_CLASS + 30),
        ("gdumb", 30),
    ],
)
@pytest.mark.usefixtures("short")
def test_a_rest_of_one_sample_is_left_out(strategy: str, count: int) -> None:
    """``count``: samples of an experience as the strategy trains on them."""
    settings = {"backbone": "resnet9", "epochs": 1, "batch_size": count - 1, "learning_rate": 1e-3}
    found = run(replace(QUICK, strategy=strategy, precision="float32", **settings))
    assert math.isfinite(found["accuracy"])
    assert found["gradient_samples"] >= count - 1


@pytest.mark.usefixtures("short")
def test_a_rest_of_one_new_sample_leaves_a_small_memory_as_it_is() -> None:
    found = run(replace(QUICK, strategy="avalanche-replay", memory=12, batch_size=79, epochs=1))
    assert found["gradient_samples"] == 3 * (2 * PER_CLASS - 1) + 2 * 12


@pytest.mark.usefixtures("short")
def test_every_pass_with_a_gradient_is_counted() -> None:
    naive, ewc = (run(replace(QUICK, strategy=name))["gradient_samples"] for name in ("naive", "ewc"))
    assert ewc == naive + 3 * 2 * PER_CLASS  # of each experience once more, for the importances


@pytest.mark.usefixtures("short")
def test_upper_bounds_do_not_forget() -> None:
    assert run(replace(QUICK, strategy="joint", epochs=6))["accuracy"] > 0.8
    assert run(replace(QUICK, strategy="naive", epochs=6))["accuracy"] < 0.5


@pytest.mark.usefixtures("short")
def test_results_on_disk(tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = run(QUICK, out)
    assert read_results(out) == found == json.loads((out / "results.json").read_text())
    wanted = "stream head strategy backbone seed scenario accuracy forgetting accuracy_matrix train_seconds"
    wanted += " eval_seconds memory_bytes exemplars config versions device gradient_samples seconds"
    assert set(wanted.split()) <= set(found)
    assert set(found["versions"]) == {"nnheads", "torch", "avalanche", "faiss", "python"}
    config = found["config"]
    assert (config["backbone"], config["batch_size"], config["replay_batch"]) == ("convnet", 32, 32)
    assert found["memory_parts"]["exemplars"] == 30 * (64 + 32)
    assert sorted(path.name for path in out.iterdir()) == ["model", "results.json"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("strategy", ["replay", "naive"])
def test_the_saved_model_answers_as_the_run_did(tmp_path: Path, strategy: str) -> None:
    from nnheads.io import load

    found = run(replace(QUICK, strategy=strategy, precision="float32", seed=1), tmp_path)
    model = load(tmp_path / "model")
    stream = short_stream("split-digits", seed=1)
    assert model.class_names == stream.class_names
    assert model.preprocessing == stream.preprocessing
    row = []
    for e in range(3):
        test = stream.test_set(e)
        with torch.no_grad():
            row.append(float((model(stream.preprocessing(test.images)).argmax(1) == test.labels).float().mean()))
    assert row == pytest.approx(found["accuracy_matrix"][-1], abs=0.01)


@pytest.mark.usefixtures("short")
def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds results\.json already"):
        run(QUICK, tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run(QUICK, tmp_path / "file")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("strategy", ["replay", "avalanche-replay"])
def test_a_seed_gives_the_same_matrix_again(strategy: str) -> None:
    config = replace(QUICK, strategy=strategy)
    first, again, other = run(config), run(config), run(replace(config, seed=1))
    assert first["accuracy_matrix"] == again["accuracy_matrix"]
    assert first["accuracy_matrix"] != other["accuracy_matrix"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("strategy", "head"), [("replay", "impostor"), ("replay", "dense"), ("naive", None)])
def test_knowing_the_task_helps(strategy: str, head: str | None) -> None:
    config = replace(QUICK, strategy=strategy, head=head)
    by_class, by_task = run(config), run(replace(config, scenario="task"))
    assert by_task["scenario"] == "task"
    assert by_task["accuracy"] >= by_class["accuracy"]
    if strategy == "naive":
        assert by_task["accuracy"] > by_class["accuracy"] + 0.2


@pytest.mark.usefixtures("short")
def test_future_experiences_on_request() -> None:
    found = run(replace(QUICK, epochs=1, future=True))
    matrix, untrained = found["accuracy_matrix"], found["untrained_accuracy"]
    assert all(value is not None for row in matrix for value in row)
    assert matrix[0][2] == 0.0  # classes without a single exemplar are never the answer
    assert found["forward_transfer"] == pytest.approx(-(untrained[1] + untrained[2]) / 2)
    assert run(replace(QUICK, epochs=1))["forward_transfer"] is None


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("strategy", ["naive", "icarl", "scr", "slda"])
def test_the_untrained_model_can_be_evaluated(strategy: str) -> None:
    found = run(replace(QUICK, epochs=1, future=True, strategy=strategy))
    assert len(found["untrained_accuracy"]) == 3
    assert math.isfinite(found["forward_transfer"])
    assert found["gradient_samples"] == run(replace(QUICK, epochs=1, strategy=strategy))["gradient_samples"]


@pytest.mark.usefixtures("short")
def test_an_untrained_model_that_knows_the_task_guesses_among_its_classes() -> None:
    found = run(replace(QUICK, epochs=1, future=True, strategy="slda", scenario="task"))
    share = found["untrained_accuracy"][1]
    # Before it has seen them, it knows as little of their classes as it did at the beginning.
    assert found["accuracy_matrix"][0][1] == pytest.approx(share)
    assert 0.3 < share < 0.7
    assert found["forward_transfer"] == pytest.approx(0.0)


@pytest.mark.usefixtures("short")
def test_all_classes_at_once_have_no_forward_transfer() -> None:
    assert run(replace(QUICK, epochs=1, future=True, strategy="joint"))["forward_transfer"] is None


@pytest.mark.usefixtures("short")
def test_on_held_out_training_images() -> None:
    found = run(replace(QUICK, epochs=1, validation=0.25))
    assert found["test_counts"] == [20, 20, 20]  # a quarter of 40 images of each class
    assert found["gradient_samples"] < run(replace(QUICK, epochs=1))["gradient_samples"]
    half = run(replace(QUICK, epochs=1, share=0.5, validation=0.25, replay_batch=0))
    assert (half["gradient_samples"], half["test_counts"]) == (6 * 15, [20, 20, 20])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("strategy", ["replay", "er-ace"])
def test_tensorboard_has_the_accuracies_after_each_experience(tmp_path: Path, strategy: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run(replace(QUICK, epochs=1, strategy=strategy), tensorboard=tmp_path)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    for e in range(3):
        events = log.Scalars(f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{e:03d}")
        assert [event.step for event in events] == list(range(e + 1, 4))
        assert [event.value for event in events] == pytest.approx([row[e] for row in found["accuracy_matrix"][e:]])
    last = log.Scalars("Top1_Acc_Stream/eval_phase/test_stream/Task000")[-1]
    assert (last.step, last.value) == (3, pytest.approx(found["accuracy"]))
    assert log.Scalars("Memory/exemplars")[-1].value == found["exemplars"]


@pytest.mark.usefixtures("short")
def test_a_run_that_goes_on_has_one_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("experience 3"):
            raise KeyboardInterrupt

    where = {"checkpoint": tmp_path / "checkpoint", "tensorboard": tmp_path / "log"}
    with pytest.raises(KeyboardInterrupt):
        run(replace(QUICK, epochs=1), progress=interrupt, **where)
    run(replace(QUICK, epochs=1), resume=True, **where)
    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()
    assert [e.step for e in log.Scalars("Top1_Acc_Stream/eval_phase/test_stream/Task000")] == [1, 2, 3]


def test_tensorboard_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--tensorboard needs the package tensorboard: pip install tensorboard"):
        run(QUICK, tensorboard=tmp_path)


def test_one_experience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "make_stream", lambda name, **options: short_stream(name, experiences=1, **options))
    found = run(QUICK)
    assert (len(found["accuracy_matrix"]), found["forgetting"], found["backward_transfer"]) == (1, 0.0, 0.0)


def test_new_instances_are_evaluated_once_for_all() -> None:
    class Counting:
        channels_last = False
        calls = 0

        def scores(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += len(x)
            return torch.zeros(len(x), 10)

    stream = real_make_stream("new-instances:split-digits")
    learner: Any = Counting()
    row = evaluate_row(learner, stream, 1, torch.device("cpu"))
    assert learner.calls == len(stream.test)
    assert row[0] == row[1]
    assert row[2:] == [None, None, None]


def test_new_instances_run() -> None:
    found = run(RunConfig(stream="new-instances:split-digits", epochs=1, memory=100))
    assert found["exemplars"] == 100
    assert found["accuracy"] > 0.8


@pytest.mark.usefixtures("short")
def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    run(replace(QUICK, epochs=1), progress=lambda *event: told.append(event))
    assert [what for what, _, _ in told if "learned" in what][-1].startswith("experience 3 of 3 learned, accuracy ")
    assert all(0 <= done <= total or total == 0 for _, done, total in told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number, 1 or more, not 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"memory": -1}, "memory must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"ema": 1.0}, "ema must be between 0 and 1"),
        ({"ema": "high"}, "ema must be between 0 and 1, not 'high'"),
        ({"validation": 1}, "validation must be between 0 and 1"),
        ({"precision": "half"}, "precision must be auto, float32 or bfloat16, not 'half'"),
        ({"scenario": "domain"}, "scenario must be class or task, not 'domain'"),
        ({"seed": 2**64}, "seed must be below 2 \\*\\* 64"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 9}, "memory of 9 exemplars is smaller than the 10 classes"),
        ({"strategy": "icarl", "head": "impostor"}, "brings its own classifier"),
        ({"strategy": "slda", "ema": 0.9}, "strategy 'slda' trains no weights"),
        ({"strategy": "naive", "exemplar_bytes": 384}, "strategy 'naive' keeps no exemplars"),
        ({"strategy": "gdumb", "exemplar_bytes": 384}, "images of 64 bytes are too small to be compressed"),
        ({"strategy": "naive", "strategy_options": {"n_a": 1}}, "'naive' has no options of its own, got n_a"),
        ({"strategy": "impostor", "strategy_options": {"n_b": 1}}, "unknown option of strategy 'impostor' 'n_b'"),
        ({"strategy": "impostor", "memory": 9}, "memory of 9 exemplars is smaller than the 10 classes"),
        ({"strategy": "naive", "head_options": {"k": 3}}, "takes no head options, got k"),
        ({"strategy": "avalanche-replay", "replay_batch": 0}, "replay_batch must be 1 or more"),
        ({"strategy": "icarl", "stream": "new-instances:split-digits"}, "needs experiences with classes of their own"),
        ({"head_options": {"colour": 1}}, "colour"),
    ],
)
def test_settings_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(RunConfig(**options))


@pytest.mark.parametrize("options", [{"head": "impost"}, {"strategy": "replya"}, {"stream": "split-digit"}])
def test_unknown_names(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        run(RunConfig(**options))


# ---- interrupted runs --------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a process that ends."""


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"head": "nngk", "ema": 0.9}, {"head": "kernel"}, {"head": "dense"}, {"strategy": "impostor"}],
    ids=["impostor", "nngk-ema", "kernel", "dense", "impostor-strategy"],
)
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, options: dict[str, Any], after: int) -> None:
    config = replace(QUICK, epochs=1, **options)
    whole = run(config)

    def kill(what: str, done: int, total: int) -> None:
        # in the middle of the next experience, or at the very end
        if what.startswith(f"experience {after + 1} of 3: training") or (after == 3 and "3 of 3 learned" in what):
            raise Killed

    if after < 3:
        with pytest.raises(Killed):
            run(config, progress=kill, checkpoint=tmp_path / "state")
    else:
        run(config, checkpoint=tmp_path / "state")
    found = run(config, tmp_path / "out", checkpoint=tmp_path / "state", resume=True)
    assert found["accuracy_matrix"] == whole["accuracy_matrix"]
    for key in ("gradient_samples", "memory_parts", "exemplars"):
        assert found[key] == whole[key]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "impostor", "ema": 0.9, "head_options": {"whiten": 0.3, "bytes_per_center": 16}},
        {"strategy": "impostor", "strategy_options": {"redistribute": "influence", "choose": "worst", "drop": "best"}},
        {"strategy": "impostor", "strategy_options": {"fine_tune": 1, "views": 2}},
        {"strategy": "impostor", "strategy_options": {"drift": "distill"}},
        {"head": "nngk"},
        {"head": "dense", "ema": 0.9},
        {"strategy": "avalanche-replay", "ema": 0.9},
    ],
    ids=str,
)
def test_a_stream_on_a_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    config = replace(QUICK, epochs=6, device="cuda", precision="float32", **options)
    found = run(config)
    assert found["device"] != "cpu"
    assert found["accuracy"] > 0.4  # six classes
    beside = run(replace(config, device="cpu"))
    for key in ("gradient_samples", "memory_parts", "exemplars"):
        assert found[key] == beside[key]
    if options.get("strategy") == "avalanche-replay":
        return

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("experience 3 of 3: training"):
            raise Killed

    with pytest.raises(Killed):
        run(config, progress=kill, checkpoint=tmp_path)
    resumed = run(config, checkpoint=tmp_path, resume=True)
    # sums are not taken in the same order twice there
    assert resumed["accuracy"] == pytest.approx(found["accuracy"], abs=0.1)


@pytest.mark.usefixtures("short")
def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        run(QUICK, checkpoint=state, resume=True)
    run(replace(QUICK, epochs=1), checkpoint=state)
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        run(QUICK, checkpoint=state)
    with pytest.raises(CheckpointError, match=r"started with epochs=1 \(now 2\)"):
        run(QUICK, checkpoint=state, resume=True)
    with pytest.raises(ConfigError, match="strategy 'er-ace' cannot be resumed"):
        run(replace(QUICK, strategy="er-ace"), checkpoint=tmp_path / "other")
    written = json.loads((state / "run.json").read_text())
    del written["config"]["strategy_options"]["replay_dropped"]  # as before there was that option
    (state / "run.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=r"started with replay_dropped=False \(now True\)"):
        run(replace(QUICK, epochs=1), checkpoint=state, resume=True)
    as_before = replace(QUICK, epochs=1, strategy_options={"replay_dropped": False})
    run(as_before, checkpoint=state, resume=True)
    tensors = state / "run.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="bytes where"):
        run(as_before, checkpoint=state, resume=True)


@pytest.mark.usefixtures("short")
def test_memory_bytes_are_what_a_checkpoint_holds(tmp_path: Path) -> None:
    found = run(replace(QUICK, epochs=1, memory=90), checkpoint=tmp_path)
    from nnheads.storage import read_tensors

    recorded = json.loads((tmp_path / "run.json").read_text())["tensors"]
    tensors = read_tensors(tmp_path / "run.safetensors", recorded)
    kept = {
        "exemplars": [t for name, t in tensors.items() if name.startswith("buffer.")],
        "centers": [t for name, t in tensors.items() if name.startswith("model.head.memory.")],
    }
    for part, held in kept.items():
        assert found["memory_parts"][part] == pytest.approx(sum(t.numel() * t.element_size() for t in held), rel=0.05)
