"""The study of drift on small embeddings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnheads.benchmarks.drift import Embedded, Form, drift_study, study_file
from nnheads.benchmarks.drift import _drifts as drifts
from nnheads.benchmarks.drift import _head as make_head
from nnheads.benchmarks.drift_table import table
from nnheads.benchmarks.runner import RunConfig, run
from nnheads.errors import DataError


def clusters(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    means = 1.5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(99))
    return means[y] + torch.randn(n, 8, generator=generator), y


def small_study(**options: Any) -> dict[str, Any]:
    data = Embedded(*clusters(160), *clusters(60, 1))
    given = {"centers": 100, "k": 8, "singles": 6, "at_once": 10, "held_out": 50, "ridges": (0.1, 1.0)}
    return drift_study(data, **{**given, **options})


def test_the_study_has_every_form_change_and_place_and_is_json() -> None:
    result = small_study()
    assert json.loads(json.dumps(result)) == result
    forms = ["influence", "exact", "least-squares 0.1", "least-squares 1"]
    assert [row["form"] for row in result["single"]] == forms
    assert all(
        row[f"{kind} {where}"] > 0
        for row in result["single"]
        for kind in ("drop", "add")
        for where in ("affected", "held out")
    )
    assert [(r["kind"], r["choice"], r["form"]) for r in result["at_once"]] == [
        (kind, choice, form)
        for choice in ("random", "algorithm 1")
        for kind in ("drop", "add")
        for form in ["none", *forms]
    ]
    nothing = [row for row in result["at_once"] if row["form"] == "none"]
    assert all(row["affected"] == row["held out"] == 1 for row in nothing)
    assert all((row["accuracy_at_added"] is None) == (row["kind"] == "drop") for row in result["at_once"])
    assert small_study() == result
    assert len(table(result).splitlines()) == 1 + len(forms) + 1 + 1 + 4 * (len(forms) + 1)


def test_drift_is_relative_to_doing_nothing() -> None:
    """Least squares on labels that may move freely leaves next to no drift; with a huge ridge it changes nothing."""
    z, y = clusters(80)
    head = make_head(z, y, 8, 4)
    held = len(head.memory)
    soft = torch.full((held, 4), 0.25) + 0.05 * (head.memory.values_at(torch.arange(held)) - 0.25)
    head.memory.relabel(head.memory.ids[:held], soft)
    reverse = torch.bincount(head.neighbors(head.memory.keys[:held]).rows.flatten())
    row = int(reverse.argmax())
    what = (head.memory.ids[row : row + 1],)
    near = head.neighbors(head.memory.keys[:held])
    points = head.memory.keys[:held][(near.rows == row).any(1) & (torch.arange(held) != row)]
    forms = [Form("free", "least-squares", 1e-6), Form("tight", "least-squares", 1e9)]
    [found] = drifts(head, "drop", what, forms, [points])
    assert found is not None
    assert found["free"] < 0.1
    assert found["tight"] == pytest.approx(1, abs=1e-3)


def test_a_saved_model_embeds_the_images_of_its_data_set(tmp_path: Path) -> None:
    run(RunConfig(stream="split-digits", epochs=1), tmp_path / "run")
    small = [
        "--dataset",
        "digits",
        "--centers",
        "60",
        "--k",
        "8",
        "--singles",
        "2",
        "--at-once",
        "4",
        "--held-out",
        "20",
    ]
    command = [sys.executable, "-m", "nnheads.benchmarks.drift", str(tmp_path / "run" / "model"), *small]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "drift.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "drift.json").read_text())
    assert result["settings"]["held_out"] == 20
    assert "influence" in done.stdout
    nothing = subprocess.run(command[:4], capture_output=True, text=True, check=False)
    assert nothing.returncode == 2
    assert nothing.stderr.startswith("error: drift: --dataset NAME")


def test_embeddings_from_a_file_and_too_few_of_them(tmp_path: Path) -> None:
    z, y = clusters(160)
    zq, yq = clusters(60, 1)
    np.savez(tmp_path / "e.npz", z=z.numpy(), y=y.numpy(), zq=zq.numpy(), yq=yq.numpy())
    options: dict[str, Any] = {"k": 8, "singles": 2, "at_once": 4, "held_out": 20, "ridges": (1.0,)}
    result = study_file(tmp_path / "e.npz", centers=60, **options)
    assert result["settings"]["centers"] == 60
    with pytest.raises(DataError, match="162 samples and 20 held-out ones are needed, there are 160"):
        study_file(tmp_path / "e.npz", centers=158, **options)
    np.savez(tmp_path / "bad.npz", z=z.numpy())
    with pytest.raises(DataError, match="cannot read z, y, zq and yq from"):
        study_file(tmp_path / "bad.npz")
