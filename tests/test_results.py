"""The contest's tables say what the committed results say, and leave none of them out."""

import json
import statistics
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = (0, 1, 2)

# The heading above a table, the folder its runs are in, and what stands between a row's name and its seed.
CONTESTS = [
    ("#### The bytes of 1,000 images", "contest-split-cifar10", "-m1000"),
    ("#### The bytes of 200 images", "contest-split-cifar10", "-m200"),
    ("#### Split CIFAR-100", "contest-split-cifar100", "-m2000"),
    ("#### Avalanche's rows with averaged weights and small exemplars", "contest-split-cifar10/variants", "-m1000"),
    ("#### Fine-tuning at equal gradient samples", "contest-split-cifar10/fine-tuning", "-m1000"),
    ("Dropped at once, the bytes of 1,000 images:", "contest-split-cifar10/dropped-at-once", "-m1000"),
    ("Dropped at once, the bytes of 200 images:", "contest-split-cifar10/dropped-at-once", "-m200"),
    (
        "Dropped at once, Split CIFAR-100, the bytes of 2,000 images:",
        "contest-split-cifar100/dropped-at-once",
        "-m2000",
    ),
    ("By default, 1,000 raw exemplars and a dense head:", "contest-split-cifar10/raw-exemplars", "-m1000"),
    (
        "At a rate of 0.1, the bytes of 1,000 images (the last row drops exemplars at once):",
        "contest-split-cifar10/rate-0.1",
        "-m1000",
    ),
    ("At a rate of 0.1, the bytes of 200 images:", "contest-split-cifar10/rate-0.1", "-m200"),
    ("Codebooks of 4 bits, whole runs:", "contest-split-cifar10/codebooks", "-m200"),
]


def _table(document: Path, heading: str, first: str) -> list[dict[str, str]]:
    """Rows, by column, of the first table below ``heading`` whose header begins with ``first``."""
    lines = document.read_text(encoding="utf-8").splitlines()
    at = next(n for n in range(lines.index(heading), len(lines)) if lines[n].startswith(first))
    end = next(n for n in range(at, len(lines)) if not lines[n].startswith("|"))
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[at:end])
    return [dict(zip(header, row, strict=True)) for row in rows]


def _run(folder: str, run: str) -> dict[str, Any] | None:
    path = RESULTS / folder / f"{run}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _accuracy(run: dict[str, Any] | None) -> str:
    return "-" if run is None else f"{100 * run['accuracy']:.2f}"


@pytest.mark.parametrize(("heading", "folder", "memory"), CONTESTS)
def test_a_contest_s_table_is_that_of_its_runs(heading: str, folder: str, memory: str) -> None:
    rows = _table(ROOT / "benchmarks" / "README.md", heading, "| strategy | rate | seed 0 |")
    for row in rows:
        name = row["strategy"]
        of = "" if name.startswith("joint") else memory
        runs = [_run(folder, f"{name}{of}-s{seed}") for seed in SEEDS]
        assert [row[f"seed {seed}"] for seed in SEEDS] == [_accuracy(run) for run in runs], name
        made = [run for run in runs if run is not None]
        percents = [100 * run["accuracy"] for run in made]
        whole = f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f}" if len(made) == len(SEEDS) else ""
        assert row["mean"] == whole, name
        for run in made:
            assert float(row["rate"]) == pytest.approx(run["config"]["learning_rate"]), name
            assert row["exemplars"] == f"{run['exemplars']:,}", name
            assert row["memory"] == f"{run['memory_bytes'] / 1e6:.2f} MB", name
            assert row["gradient samples"] == f"{run['gradient_samples']:,}", name
    names = {path.name.rpartition(memory)[0] for path in (RESULTS / folder).glob(f"*{memory}-s?.json")}
    assert names <= {row["strategy"] for row in rows}


@pytest.mark.parametrize(
    ("stream", "contests"), [("10", (CONTESTS[0], CONTESTS[5])), ("100", (CONTESTS[2], CONTESTS[7]))]
)
def test_a_rate_is_the_best_of_its_row_on_held_out_images(
    stream: str, contests: tuple[tuple[str, str, str], ...]
) -> None:
    document = ROOT / "benchmarks" / "README.md"
    rates, where = {}, {}
    for heading, folder, memory in contests:
        for row in _table(document, heading, "| strategy | rate | seed 0 |"):
            # A rate in its name is that of the row without it.
            name = row["strategy"].removesuffix(f"+lr={row['rate']}")
            rates[name], where[name] = row["rate"], (f"{folder}/validation", "" if name.startswith("joint") else memory)
    begin = f"Held-out accuracy in per cent on Split CIFAR-{stream} ("
    title = next(line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith(begin))
    for row in _table(document, title, "| strategy | 0.0"):
        name, samples = row.pop("strategy"), row.pop("gradient samples")
        folder, memory = where[name]
        runs = {rate: _run(folder, f"{name}+lr={rate}{memory}-s0") for rate in row}
        assert {rate: row[rate] or "-" for rate in row} == {rate: _accuracy(run) for rate, run in runs.items()}, name
        passed = sorted({run["gradient_samples"] for run in runs.values() if run is not None})
        assert samples == " to ".join(f"{n:,}" for n in dict.fromkeys([passed[0], passed[-1]])), name
        assert rates[name] == max((rate for rate in row if row[rate]), key=lambda rate: float(row[rate])), name


def test_rates_tried_after_the_whole_stream_are_those_of_its_runs() -> None:
    document = ROOT / "benchmarks" / "README.md"
    folder = "contest-split-cifar10/validation"
    for row in _table(document, "#### The learning rates", "| strategy | two fifths, 0.03 |"):
        for column, shown in list(row.items())[1:]:
            share, rate = column.split(", ")
            where = folder if share == "two fifths" else f"{folder}-whole"
            assert shown == _accuracy(_run(where, f"{row['strategy']}+lr={rate}-m1000-s0")), (row, column)


def test_more_seeds_are_those_of_their_runs() -> None:
    rows = _table(
        ROOT / "benchmarks" / "README.md",
        "Two more seeds at a rate of 0.1, the bytes of 1,000 images:",
        "| strategy | seed 3 | seed 4 |",
    )
    first = "contest-split-cifar10"
    for row in rows:
        name = row["strategy"]
        more = [_run(f"{first}/more-seeds", f"{name}-m1000-s{seed}") for seed in (3, 4)]
        assert [row["seed 3"], row["seed 4"]] == [_accuracy(run) for run in more], name
        others = [
            _run(first, f"{name}-m1000-s{seed}")
            or _run(f"{first}/rate-0.1", f"{name.removesuffix('+lr=0.1')}-m1000-s{seed}")
            for seed in SEEDS
        ]
        percents = [100 * run["accuracy"] for run in [*others, *more] if run is not None]
        whole = f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f}" if len(percents) == 5 else ""
        assert row["mean of five"] == whole, name


@pytest.mark.parametrize(
    ("first", "folders"),
    [
        (
            "| strategy | what it is | seed 0 |",
            ("contest-split-cifar10/ablation", "contest-split-cifar10/dropped-at-once"),
        ),
        (
            "| strategy | what it is | held out |",
            ("contest-split-cifar10/levers", "contest-split-cifar10/dropped-at-once/validation"),
        ),
    ],
)
def test_what_helped_is_that_of_its_runs(first: str, folders: tuple[str, str]) -> None:
    rows = _table(ROOT / "benchmarks" / "README.md", "#### What helped and what did not", first)
    for row in rows:
        file = row["strategy"].replace(":", "-")
        for column, seed in (("held out", 0), *((f"seed {seed}", seed) for seed in SEEDS)):
            if column in row:
                runs = [_run(folder, f"{file}-m1000-s{seed}") for folder in folders]
                run = next((run for run in runs if run is not None), None)
                assert row[column] == _accuracy(run), (file, column)
                for name, shown in (("exemplars", "exemplars"), ("gradient_samples", "gradient samples")):
                    assert run is None or shown not in row or row[shown] == f"{run[name]:,}", (file, column)
    made = {path.name.removesuffix("-m1000-s0.json") for path in (RESULTS / folders[0]).glob("*-m1000-s0.json")}
    assert made <= {row["strategy"].replace(":", "-") for row in rows}


def test_what_was_screened_with_200_is_that_of_its_runs() -> None:
    folder = "contest-split-cifar10/levers-200"
    rows = _table(
        ROOT / "benchmarks" / "README.md", "#### The bytes of 200 images", "| strategy | what it is | held out |"
    )
    for row in rows:
        run = _run(folder, f"{row['strategy']}-m200-s0")
        assert row["held out"] == _accuracy(run), row
        assert run is None or row["exemplars"] == f"{run['exemplars']:,}", row
    made = {path.name.removesuffix("-m200-s0.json") for path in (RESULTS / folder).glob("*-m200-s0.json")}
    assert made == {row["strategy"] for row in rows if row["held out"] != "-"}


@pytest.mark.parametrize(
    "first", ["| Split CIFAR-10, bytes of 1,000", "| Split CIFAR-10, bytes of 200", "| Split CIFAR-100,"]
)
def test_the_readme_has_these_figures_too(first: str) -> None:
    def rounded(row: dict[str, str]) -> list[str]:
        seeds = [row[f"seed {seed}"] for seed in SEEDS]
        return [
            *("-" if cell == "-" else str(Decimal(cell).quantize(Decimal("0.1"), ROUND_HALF_UP)) for cell in seeds),
            row["mean"],
        ]

    document = ROOT / "benchmarks" / "README.md"
    measured = [_table(document, heading, "| strategy | rate | seed 0 |") for heading, _, _ in CONTESTS]
    known = [rounded(row) for rows in measured for row in rows]
    for row in _table(ROOT / "README.md", "## How it compares", first):
        assert rounded(row) in known, row


def test_the_digits_row_is_that_of_its_runs() -> None:
    row = _table(ROOT / "benchmarks" / "README.md", "## Split digits, class-incremental", "| | seed 0 |")[0]
    assert [row[f"seed {seed}"] for seed in SEEDS] == [
        _accuracy(_run("split-digits", f"impostor-seed{seed}")) for seed in SEEDS
    ]


def test_the_runs_of_one_machine_are_those_shown() -> None:
    rows = _table(ROOT / "benchmarks" / "README.md", "#### The machines", "| strategy | seed 0 |")
    for row in rows:
        runs = [_run("contest-split-cifar10/one-machine", f"{row['strategy']}-m1000-s{seed}") for seed in SEEDS]
        assert [row[f"seed {seed}"] for seed in SEEDS] == [_accuracy(run) for run in runs], row
        percents = [100 * run["accuracy"] for run in runs if run is not None]
        whole = f"{statistics.mean(percents):.1f} ± {statistics.stdev(percents):.1f}" if len(percents) == 3 else ""
        assert row["mean"] == whole
