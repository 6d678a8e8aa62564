"""Runs that are killed, in earnest and in the middle of a save, and go on to the same numbers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nnheads.storage
from nnheads.benchmarks import runner
from nnheads.benchmarks.checkpoint import experiences_done
from nnheads.benchmarks.runner import RunConfig, run
from nnheads.errors import ConfigError

QUICK = RunConfig(epochs=1, memory=50)
KINDS = {
    "replay": QUICK,
    "replay-ema": replace(QUICK, ema=0.9),
    "impostor": replace(QUICK, strategy="impostor", strategy_options={"fine_tune": 1, "n_a": 5, "n_d": 5}),
    "impostor-ema": replace(QUICK, strategy="impostor", ema=0.9),
    "whitened": replace(
        QUICK,
        strategy="impostor",
        strategy_options={"redistribute": "influence", "choose": "mixed:0.5"},
        head_options={"whiten": 0.3},
    ),
    "whitened-codes": replace(QUICK, strategy="impostor", head_options={"whiten": 0.3, "bytes_per_center": 16}),
}


def wait_for(state: Path, experiences: int, alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while experiences_done(state) < experiences:
        assert alive(), "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=list(KINDS))
def test_killed_by_the_kernel_and_resumed(number: int, tmp_path: Path) -> None:
    config = list(KINDS.values())[number]
    state, out = tmp_path / "state", tmp_path / "out"
    whole = run(config)  # also imports what the child needs
    child = multiprocessing.get_context("fork").Process(target=run, args=(config, out), kwargs={"checkpoint": state})
    child.start()
    wait_for(state, 1 + number % 4, child.is_alive)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (out / "results.json").exists()
    told: list[str] = []
    found = run(config, out, checkpoint=state, resume=True, progress=lambda what, done, total: told.append(what))
    assert not any(what.startswith("experience 1 of 5") for what in told)  # it was not learned again
    for key in ("accuracy_matrix", "gradient_samples", "memory_parts", "centers"):
        assert found[key] == whole[key], key


def test_a_polite_kill_says_how_to_go_on_and_the_command_does(tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "nnheads", "run", "split-digits", "--strategy", "impostor", "--memory", "50"]
    command += ["--strategy-option", "choose=mixed:0.5", "--epochs", "1", "--threads", "1"]
    command += ["--checkpoint", str(state), "--out", str(tmp_path / "out"), "--no-plots"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(state, 1, lambda: process.poll() is None)
    process.terminate()
    _, told = process.communicate(timeout=100)
    assert process.returncode == 143, told
    assert "if this run is killed, add --resume to go on" in told
    done = experiences_done(state)
    what = f"{done} experience{'s' * (done > 1)}"
    assert told.splitlines()[-1] == f"interrupted; kept: {what} in {state}; go on with the same command and --resume"
    again = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["config"]["strategy_options"]["choose"] == "mixed:0.5"
    whole = run(replace(QUICK, strategy="impostor", strategy_options={"choose": "mixed:0.5"}))
    assert found["accuracy_matrix"] == whole["accuracy_matrix"]


CODED = replace(QUICK, strategy="impostor", memory=400, head_options={"bytes_per_center": 8})


@pytest.mark.parametrize("config", [QUICK, CODED], ids=["replay", "compressed-centers"])
def test_killed_while_a_checkpoint_is_written(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config)
    original, calls = nnheads.storage.write_text, 0

    def fail(path: Path, text: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            path.write_text(text[: len(text) // 2])
            raise KeyboardInterrupt
        original(path, text)

    monkeypatch.setattr(nnheads.storage, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        run(config, checkpoint=tmp_path / "state")
    assert experiences_done(tmp_path / "state") == 2
    # what a kill in the middle of a save leaves beside the checkpoint is never taken for one
    left = tmp_path / ".state.abc.partial"
    left.mkdir()
    (left / "run.json").write_text("{")
    found = run(config, checkpoint=tmp_path / "state", resume=True)
    for key in ("accuracy_matrix", "memory_parts"):
        assert found[key] == whole[key]


def test_a_model_that_was_saved_before_the_kill_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runner.write_json

    def fail(path: Path, content: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        run(QUICK, tmp_path / "out", checkpoint=tmp_path / "state")
    monkeypatch.setattr(runner, "write_json", original)
    assert (tmp_path / "out" / "model").is_dir()
    found = run(QUICK, tmp_path / "out", checkpoint=tmp_path / "state", resume=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


def test_two_runs_never_write_to_one_folder(tmp_path: Path) -> None:
    from nnheads.benchmarks.locks import exclusive
    from nnheads.cli.folders import alone_in

    with alone_in(tmp_path), pytest.raises(ConfigError, match="another run writes to"), alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    command = [sys.executable, "-m", "nnheads", "run", "split-digits", "--out", str(tmp_path)]
    with exclusive(tmp_path / ".run.lock"):
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"another run writes to {tmp_path}: name another folder" in done.stderr
