"""Figures: what is in them, and that nothing is drawn on a screen or half written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nnheads.benchmarks import plots
from nnheads.cli.main import main
from nnheads.errors import CheckpointError

RESULTS: dict[str, Any] = {
    "stream": "split-digits",
    "strategy": "impostor",
    "head": "impostor",
    "seed": 3,
    "scenario": "class",
    "accuracy": 0.75,
    "forgetting": 0.125,
    "accuracy_matrix": [[0.9, None], [0.5, 1.0]],
    "classes": [["4", "6"], ["2", "7", "9"]],
    "centers": [
        {"experience": 0, "moment": "end", "centers": {"4": 5, "6": 5}},
        {"experience": 1, "moment": "room", "centers": {"4": 1, "6": 1}},
        {"experience": 1, "moment": "end", "centers": {"4": 2, "6": 3, "2": 2, "7": 2, "9": 1}},
    ],
    "config": {"ema": 0.99, "memory": 10, "validation": None, "share": None},
}


def row(name: str, memory: int | None, mean: list[float], spread: list[float | None]) -> dict[str, Any]:
    seeds = [0] if spread[0] is None else [0, 2]
    return {"name": name, "memory": memory, "seeds": seeds, "curve": {"mean": mean, "spread": spread}}


SUMMARY: dict[str, Any] = {
    "stream": "split-digits",
    "seeds": [0, 2],
    "settings": {"scenario": "class", "validation": None, "share": None},
    "rows": [
        row("replay", 50, [1.0, 0.8], [0.0, 0.1]),
        row("replay", 100, [1.0, 0.9], [0.0, 0.1]),
        row("er-ace", 50, [0.9, 0.7], [None, None]),
        row("naive", None, [1.0, 0.2], [0.0, 0.0]),
    ],
}


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_matrix_names_what_it_shows() -> None:
    axes = plots.matrix_figure(RESULTS).axes[0]
    assert texts(axes) == ["90.0", "50.0", "100.0"]  # what was not measured stays empty
    title = axes.get_title()
    for words in ("split-digits", "strategy impostor", "averaged 0.99", "memory 10", "seed 3", "75.0 %", "12.5 %"):
        assert words in title
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4, 6", "2 and 2 more"]
    assert axes.get_ylabel() == "trained up to experience"


def test_a_large_matrix_has_no_numbers() -> None:
    many = {
        **RESULTS,
        "accuracy_matrix": [[0.5 if j <= i else None for j in range(20)] for i in range(20)],
        "classes": [[str(i)] for i in range(20)],
    }
    axes = plots.matrix_figure(many).axes[0]
    assert texts(axes) == []
    assert axes.get_xlabel() == "tested on experience"


def test_centers_are_stacked_as_they_stood_after_each_experience() -> None:
    axes = plots.centers_figure(RESULTS).axes[0]
    assert axes.get_ylabel() == "centers kept"
    tops: dict[float, float] = {}
    for bar in axes.patches:
        centre = bar.get_x() + bar.get_width() / 2
        tops[round(centre)] = max(tops.get(round(centre), 0.0), bar.get_y() + bar.get_height())
    assert tops == {1: 10.0, 2: 10.0}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["9", "7", "2", "6", "4"]


def test_curves_have_a_panel_for_each_memory_and_a_line_for_each_row() -> None:
    figure = plots.curves_figure(SUMMARY)
    small, large = figure.axes
    assert [line.get_label() for line in small.lines] == ["replay", "er-ace", "naive"]
    assert [line.get_label() for line in large.lines] == ["replay", "naive"]
    assert list(small.lines[0].get_ydata()) == pytest.approx([100, 80])
    [band] = small.collections  # er-ace has one seed, naive no spread
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(70)
    assert small.lines[0].get_color() == large.lines[0].get_color()
    assert "seeds 0,\N{NO-BREAK SPACE}2" in figure.get_suptitle()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["replay", "er-ace (seed 0 alone)", "naive"]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in small.lines}) == 3


def test_the_legend_says_with_which_memory_seeds_are_missing() -> None:
    rows = [{**row, "seeds": [0]} if (row["name"], row["memory"]) == ("replay", 50) else row for row in SUMMARY["rows"]]
    [legend] = plots.curves_figure({**SUMMARY, "rows": rows}).legends
    assert legend.get_texts()[0].get_text() == "replay (with 50 seed 0 alone)"


def test_files(tmp_path: Path) -> None:
    made = plots.plot_run(RESULTS, tmp_path) + plots.plot_comparison(SUMMARY, tmp_path)
    assert [path.name for path in made] == ["matrix.png", "centers.png", "curves.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in made)
    for path in made:
        with Image.open(path) as image:
            assert min(image.size) > 400
    assert plots.plot_run({**RESULTS, "centers": []}, tmp_path / "new") == [tmp_path / "new" / "matrix.png"]
    assert plots.plot_comparison({**SUMMARY, "rows": []}, tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*matrix\.png"):
        plots.plot_run(RESULTS, tmp_path / "file")


@pytest.mark.parametrize(
    ("command", "drawn", "kept"),
    [
        (["run", "split-digits"], "plot_run", "results.json"),
        (["compare", "--stream", "split-digits", "--strategies", "naive"], "plot_comparison", "naive-s0.json"),
    ],
)
def test_who_interrupts_the_drawing_is_told_that_the_rest_is_there(
    command: list[str],
    drawn: str,
    kept: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, drawn, interrupt)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--share", "0.05", "--epochs", "1", "--out", str(tmp_path / "out"), "--quiet"])
    assert ended.value.code == 130
    assert "interrupted; kept: all but figures in" in capsys.readouterr().err
    assert (tmp_path / "out" / kept).is_file()


def test_matplotlib_is_loaded_by_drawing_only_and_without_a_screen() -> None:
    code = (
        "import sys; import nnheads.benchmarks.plots as p; assert 'matplotlib' not in sys.modules; "
        "p.matrix_figure(eval(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, repr(RESULTS)], check=True)
