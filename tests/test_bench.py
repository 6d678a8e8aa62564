"""The harness of ``nnheads bench``: turns, medians, ratios, what goes to JSON, and the program's own command."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from nnheads.benchmarks.speed import approximate, stream
from nnheads.benchmarks.speed.harness import OURS, Settings, Timings, document, in_turn
from nnheads.benchmarks.speed.registry import BENCHES
from nnheads.cli.main import app
from nnheads.errors import ConfigError, UnknownNameError


def test_contenders_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def contender(name: str) -> None:
        calls.append(name)
        sum(range(200_000))

    timings = in_turn({"a": lambda: contender("a"), "b": lambda: contender("b")}, rounds=3, clock=time.process_time)
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3}
    order = [name for at, name in enumerate(calls) if not at or calls[at - 1] != name]
    assert order[-6:] == ["a", "b"] * 3
    with pytest.raises(ConfigError, match="rounds"):
        in_turn({}, 0)


def test_ratios_are_of_the_same_round_and_peers_are_the_others() -> None:
    timings = Timings({OURS: [1.0, 2, 4], "slow": [10.0, 10, 10], "fast": [2.0, 4, 4], f"{OURS} plain": [0.1] * 3})
    row = timings.row("case")
    assert (row["fastest_peer"], row["ratio"]) == ("fast", 0.5)
    assert row["ms"]["slow"] == 10_000


def test_the_document_says_how_and_on_what() -> None:
    found = document("nca", "a bar", [{"case": "x", "met": True}, {"case": "y"}], Settings(rounds=7))
    assert found["met"] == "1 of 1"
    assert found["rounds"] == 7
    assert {"torch", "faiss", "python", "scikit-learn", "pytorch-metric-learning"} <= set(found["versions"])
    assert "/" not in found["device"] + found["processor"]
    assert document("updates", "a bar", [], Settings(), wall=True)["clock"] == "wall"


def test_the_command_lists_measures_and_names_mistakes(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["bench"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in BENCHES)
    pytest.importorskip("pytorch_metric_learning")
    out = tmp_path / "nca.json"
    arguments = ["bench", "nca", "--quick", "--rounds", "2", "--only", "batch 256, d 64", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == ["batch 256, d 64"]
    for wrong, kind in (
        (["ncaa"], UnknownNameError),
        (["nca", "--rounds", "0"], ConfigError),
        (["embeddings"], ConfigError),
        (["embeddings", "--epochs", "0"], ConfigError),
    ):
        assert isinstance(CliRunner().invoke(app, ["bench", *wrong]).exception, kind)


def test_peers_that_compute_the_same_find_the_same(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    out = tmp_path / "nca.json"
    arguments = ["bench", "nca", "--quick", "--rounds", "1", "--only", "digits", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    [row] = json.loads(out.read_text())["rows"]
    ours, theirs = row["loss"].values()
    assert ours == pytest.approx(theirs, rel=1e-6)  # one formula, one optimizer, one start
    done = CliRunner().invoke(app, ["bench", "classes", "--quick", "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    for row in json.loads(out.read_text())["rows"]:
        assert min(row["same_classes"].values()) > 0.99  # ties of the vote are broken in different ways


def test_learning_a_stream_is_timed_beside_avalanche_and_a_plain_loop(tmp_path: Path) -> None:
    out = tmp_path / "stream.json"
    done = CliRunner().invoke(app, ["bench", "stream", "--quick", "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    first, *ratios = json.loads(out.read_text())["rows"]
    counts = first["gradient_samples"]
    names = {OURS, stream.DENSE, stream.IMPOSTOR, stream.AVALANCHE, stream.AVALANCHE_HALF, stream.PLAIN}
    assert set(first["ms"]) == set(counts) == names | {stream.ICARL}
    counts.pop(stream.ICARL)  # replays otherwise, so that times a sample are compared
    assert max(counts.values()) <= 1.05 * min(counts.values())  # ratios are of equal work
    judged = [row["case"] for row in ratios if "met" in row]
    assert judged == ["over Avalanche's Replay", "over a plain loop", "strategy impostor over Avalanche's Replay"]


def test_what_cannot_be_measured_is_said_before_it_takes_long(tmp_path: Path) -> None:
    file = tmp_path / "embeddings"
    save_file({"maps": torch.zeros(10, 16, 64, dtype=torch.float16), "queries": torch.zeros(10, 64)}, file)
    for arguments, reason in (
        (["million", "--quick", "--embeddings", str(file)], r"20,000 views are needed and 360 can be made"),
        (["startup", "--only", "import"], "startup is measured as a whole"),
        (["nca", "--quick", "--only", "no such"], "nca has no case whose name holds that"),
        (["nca", "--quick", "--out", str(file)], "is there already and not a JSON file"),
        (["embeddings", "--embeddings", str(tmp_path)], "is a folder: name a file"),
    ):
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert re.search(reason, str(done.exception)), (arguments, done.exception)


def test_approximate_search_is_judged_by_what_keeps_the_class(tmp_path: Path) -> None:
    file, out = tmp_path / "embeddings", tmp_path / "approximate.json"
    labels = torch.arange(7000) % 10
    z = 3 * torch.nn.functional.one_hot(labels, 16) + torch.randn(7000, 16, generator=torch.Generator().manual_seed(0))
    save_file({"train": z[:6000], "train_labels": labels[:6000].clone(), "test": z[6000:].clone()}, file)
    arguments = ["bench", "approximate", "--quick", "--rounds", "1", "--only", "hnsw", "--embeddings", str(file)]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    judged = [row["case"] for row in rows if "met" in row]
    # what a user gets, and no effort picked afterwards
    assert judged == ["hnsw, chosen for recall 0.95", "hnsw, chosen for recall 0.99"]
    told = [row for row in rows if "by" in row]
    assert [row["case"].split(", ")[1] for row in told] == [approximate.AT_ONCE, approximate.ONE_BY_ONE]
    best = next(row for row in rows if row["case"] == told[1]["by"])
    assert best["recall@32"] >= 0.95
    assert best["same_class"] >= 0.99
