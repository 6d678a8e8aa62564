"""The ``nnheads`` program as a user meets it: in processes of its own, by what it prints and its exit codes.

Starting a process costs seconds of imports, so most commands share one, in which each is run by itself.
"""

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

MISSING = "no-such-folder"

_DRIVER = """
import contextlib, io, json, sys
from nnheads.cli.main import main
answers = []
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue()])
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Answer:
    """What a command left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def _environment(folder: Path) -> dict[str, str]:
    # Two threads on two busy cores wait for each other most of the time: these trainings are faster with one.
    return {**os.environ, "OMP_NUM_THREADS": "1", "NNHEADS_CACHE": str(folder / "cache"), "TERM": "xterm"}


def _run_all(commands: list[list[str]], folder: Path) -> list[Answer]:
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        env=_environment(folder),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout)]


@dataclass(frozen=True)
class World:
    """A folder in which the program was used, and what each use left."""

    folder: Path
    answers: dict[str, Answer]

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One process, one command after the other."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("cli")
    digits = load_digits()
    for i in range(30):
        place = folder / "digits" / "test" / str(digits.target[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * (255 / 16)).round().astype("uint8")).save(place / f"{i}.png")
    for i in range(3):
        place = folder / "letters" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * i).save(place / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "results").mkdir()
    (folder / "results" / "results.json").write_text("{}")
    image = str(next((folder / "digits" / "test" / "0").iterdir()).relative_to(folder))
    run = "runs/split-digits-impostor-001"
    quick = ["--epochs", "1", "--memory", "100"]
    commands = {
        "version": ["--version"],
        "help": [],
        "run json": ["run", "split-digits", *quick, "--option", "k=8", "--seed", "1", "--json"],
        "run": ["run", "split-digits", *quick, "--head", "dense"],
        "run quiet": ["run", "split-digits", *quick, "--head", "impostor", "--quiet"],
        "predict": ["predict", run, image],
        "predict json": ["predict", f"{run}/model", image, image, "--json", "--top", "2"],
        "eval": ["eval", run, "--data-dir", "digits"],
        "eval json": ["eval", run, "--dataset", "digits", "--json"],
        "compare": ["compare", "--heads", "dense,knn,nca", "--epochs", "1", "--seeds", "0,1", "--json"],
        "compare again": ["compare", "--heads", "dense,knn", "--epochs", "1", "--seeds", "0,1", "--resume"],
        "table": ["compare", "--stream", "split-digits", "--strategies", "replay,naive", *STREAM_QUICK],
        "table again": [
            "compare",
            "--stream",
            "split-digits",
            "--strategies",
            "replay,naive",
            *STREAM_QUICK,
            "--resume",
            "--json",
        ],
        "heads on a stream": [
            "compare",
            "--stream",
            "split-digits",
            "--heads",
            "dense,impostor",
            *STREAM_QUICK,
            "--resume",
            "--quiet",
        ],
        **{f"list {what}": ["list", what] for what in ("heads", "strategies", "streams", "backbones", "datasets")},
        "list json": ["list", "heads", "--json"],
        "a rival": ["run", "split-digits", *quick, "--strategy", "icarl", "--share", "0.1", "--out", "rival"],
        "data twice": ["run", "images:letters", "--data-dir", "digits", "--head", "knn", "--epochs", "1", "-q"],
        **{f"mistake {i}": command for i, (command, _) in enumerate(MISTAKES)},
    }
    answers = dict(zip(commands, _run_all(list(commands.values()), folder), strict=True))
    return World(folder, answers)


STREAM_QUICK = ["--epochs", "1", "--memory", "50,100", "--out", "table"]

MISTAKES: list[tuple[list[str], str]] = [
    (["run", "split-digit"], r"unknown stream 'split-digit'.*did you mean 'split-digits'\?"),
    (["run", "split-digits", "--head", "impostr"], r"unknown head 'impostr'.*did you mean 'impostor'\?"),
    (["run", "split-digits", "--strategy", "replai"], r"unknown strategy 'replai'.*did you mean 'replay'\?"),
    (["run", "split-digits", "--backbone", "convne"], r"unknown backbone 'convne'.*convnet"),
    (["run", "split-digits", "--scenario", "domain"], r"scenario must be class or task.*domain"),
    (["run", "split-digits", "--epochs", "0"], r"'--epochs'"),
    (["run", "split-digits", "--memory", "-5"], r"'--memory'"),
    (["run", "split-digits", "--memory", "5"], r"memory of 5 exemplars is smaller than the 10 classes"),
    (["run", "split-digits", "--lr", "0"], r"--lr must be a number above 0, not 0"),
    (["run", "split-digits", "--ema", "1.5"], r"--ema must be between 0 and 1, not 1\.5"),
    (["run", "split-digits", "--option", "k"], r"--option 'k' must have the form key=value"),
    (["run", "split-digits", "--option", "k=0"], r"head 'impostor': k must be"),
    (["run", "split-digits", "--option", "neighbours=3"], r"head 'impostor' has no option 'neighbours'; options: k,"),
    (["run", "split-digits", "--device", "abacus"], r"unknown device 'abacus'"),
    (["run", "split-digits", "--out", "results"], r"--out results holds results\.json already"),
    (["run", "split-digits", "--out", "broken.png"], r"--out broken\.png is a file"),
    (["run", "split-cifar10", "--data-dir", MISSING], rf"no such folder: {MISSING}; it should hold"),
    (["run", "images:letters", "--strategy", "icarl", "--head", "knn"], r"'icarl' brings its own classifier"),
    (["run"], r"Missing argument 'STREAM'; see nnheads run --help"),
    (["run", "split-digits", "--heads", "knn"], r"No such option: --heads"),
    (["rum", "split-digits"], r"No such command 'rum'.*'run'"),
    (["list", "planets"], r"'planets' is not one of 'heads'"),
    (["compare", "--heads", "dense,knnn"], r"unknown head 'knnn'.*did you mean 'knn'\?"),
    (["compare", "--heads", " , "], r"--heads needs at least one name"),
    (["compare", "--dataset", "digit"], r"unknown data set 'digit'.*did you mean 'digits'\?"),
    (["compare", "--dataset", "digits", "--stream", "split-digits"], r"--dataset or --stream, not both"),
    (["compare", "--seeds", "0,x"], r"--seeds must be whole numbers.*'x'"),
    (["compare", "--memory", "10"], r"--memory is for --stream"),
    (["compare", "--strategies", "replay"], r"--strategies is for --stream"),
    (["compare", "--lr", "0.1,0.2"], r"several learning rates are for --stream"),
    (["compare", "--lr", "0.1,fast"], r"--lr must be numbers above 0.*'fast'"),
    (["compare", "--stream", "split-digits", "--memory", "0"], r"--memory must be whole numbers from 1 on.*'0'"),
    (["compare", "--stream", "split-digits", "--memory", "5"], r"memory of 5 exemplars is smaller than the 10"),
    (["compare", "--stream", "split-digits", "--strategies", "repla"], r"unknown strategy.*did you mean 'replay'"),
    (["compare", "--stream", "split-digits", "--strategies", "icarl", "--heads", "knn"], r"brings its own classifier"),
    (["compare", "--stream", "split-digits", "--strategies", "replay+emma=1"], r"unknown setting in .*'emma'"),
    (["compare", "--stream", "split-digits", "--only", "x"], r"--only x: there is no such run; there are replay"),
    (["compare", "--stream", "split-digits", "--lr", "0.1,0.2", "--extend-lr"], r"--extend-lr is for --pick-lr"),
    (["compare", "--stream", "split-digits", "--lr", "0.1,0.2", "--pick-lr"], r"--pick-lr chooses .*--validation 0\.1"),
    (["compare", "--stream", "split-digits", *STREAM_QUICK], r"table holds results already"),
    (["compare", "--stream", "split-digits", *STREAM_QUICK, "--resume", "--epochs", "2"], r"with epochs=1, not 2"),
    (["run", "split-digits", "--resume"], r"--resume needs --checkpoint"),
    (["run", "split-digits", "--checkpoint", "none", "--resume"], r"no checkpoint in none: leave --resume out"),
    (["run", "split-digits", "--checkpoint", "c", "--strategy", "er-ace"], r"cannot be resumed.*replay, impostor"),
    (["run", "split-digits", "--checkpoint", "runs"], r"runs holds something that is not a checkpoint: name another"),
    (["run", "split-digits", "--checkpoint", "/proc/none"], r"--checkpoint /proc/none cannot be written \(.*\): name"),
    (["run", "split-digits", "--checkpoint", "broken.png"], r"--checkpoint broken\.png is a file: name a folder"),
    (
        ["compare", "--stream", "split-digits", "--strategies=slda", "--lr=0.1,0.2", "--pick-lr", "--validation=0.1"],
        r"every strategy has a learning rate of its own or trains no weights",
    ),
    (["run", "split-digits", "--strategy-option", "n_a=1"], r"unknown option .*'replay' 'n_a'; known: replay_dropped"),
    (["run", "split-digits", "--strategy", "impostor", "--strategy-option", "n_b=1"], r"unknown option .*'n_b'"),
    (["run", "split-digits", "--strategy-option", "n_a"], r"'n_a' must have the form key=value"),
    (["run", "split-digits", "--validation", "2"], r"--validation must be between 0 and 1"),
    (["compare", "--heads", "dense", "--epochs", "1", "--out", "runs/compare-001"], r"holds results already.*--resume"),
    (["compare", "--epochs", "2", "--seeds", "0,1", "--resume"], r"was made with epochs 1, not 2"),
    (["predict", MISSING, "broken.png"], rf"{MISSING} is not a saved model \(no such folder\)"),
    (["predict", "runs/split-digits-impostor-001", "broken.png"], r"cannot read image broken\.png"),
    (["predict", "runs/split-digits-impostor-001", "[red]x[/red].png"], r"no such image: \[red\]x\[/red\]\.png"),
    (["eval", "runs/split-digits-impostor-001"], r"eval needs --data-dir"),
    (["eval", "runs/split-digits-impostor-001", "--data-dir", "letters"], r"classes that are not known: a, b"),
]
try:
    import torch

    NO_GPU = not torch.cuda.is_available()
except ImportError:  # pragma: no cover
    NO_GPU = True
if NO_GPU:
    MISTAKES.append((["run", "split-digits", "--device", "cuda"], r"device 'cuda' is not on this machine"))


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(command) for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(world: World, number: int) -> None:
    answer, words = world[f"mistake {number}"], MISTAKES[number][1]
    assert answer.code == 2, answer
    assert answer.out == ""
    lines = answer.err.splitlines()
    assert re.search(rf"^error: .*{words}", lines[-1]), answer.err
    # what was done before the mistake could be seen may be told, but never as a traceback
    assert "Traceback" not in answer.err
    assert sum(line.startswith("error:") for line in lines) == 1


def test_mistakes_leave_nothing_behind(world: World) -> None:
    made = sorted(path.name for path in (world.folder / "runs").iterdir())
    assert made == [
        "compare-001", "split-digits-dense-001", "split-digits-impostor-001", "split-digits-impostor-002"
    ]  # fmt: skip
    assert (world.folder / "results" / "results.json").read_text() == "{}"


def test_version_and_help(world: World) -> None:
    import nnheads

    assert world["version"] == Answer(0, f"nnheads {nnheads.__version__}\n", "")
    assert world["help"].code == 0
    assert "Usage: nnheads" in world["help"].out


def test_run_prints_json_alone_and_writes_the_same(world: World) -> None:
    answer = world["run json"]
    assert answer.code == 0, answer.err
    printed = json.loads(answer.out)
    folder = world.folder / printed.pop("path")
    assert folder == world.folder / "runs/split-digits-impostor-001"
    assert printed == json.loads((folder / "results.json").read_text())
    assert 0.5 < printed["accuracy"] <= 1
    assert (printed["head"], printed["seed"], printed["exemplars"]) == ("impostor", 1, 100)
    assert printed["config"]["head_options"] == {"auxiliary": 0.0, "k": 8}  # the stream's own and the one given
    assert json.loads((folder / "model/head.json").read_text())["head"]["config"]["k"] == 8
    assert "experience 5 of 5" in answer.err


def test_run_prints_a_report_that_names_what_it_made(world: World) -> None:
    answer = world["run"]
    assert answer.code == 0, answer.err
    results = json.loads((world.folder / "runs/split-digits-dense-001/results.json").read_text())
    assert f"final accuracy  {100 * results['accuracy']:.2f} %" in answer.out
    assert f"forgetting      {100 * results['forgetting']:.2f} %" in answer.out
    assert "runs/split-digits-dense-001/model" in answer.out
    rows = [line.split() for line in answer.out.splitlines() if re.match(r" +[1-5] ", line)]
    # after experience i there are i accuracies and their mean
    assert [len(row) for row in rows] == [3, 4, 5, 6, 7]
    assert rows[4][1:6] == [f"{100 * value:.1f}" for value in results["accuracy_matrix"][4]]
    assert re.search(r"^next: nnheads \w+", answer.out, re.MULTILINE)
    assert "\x1b" not in answer.out + answer.err


def test_quiet_prints_one_line(world: World) -> None:
    answer = world["run quiet"]
    assert answer.code == 0
    assert answer.err == ""
    assert re.fullmatch(
        r"accuracy [\d.]+ %, forgetting -?[\d.]+ %, .* s: runs/split-digits-impostor-002/results\.json\n", answer.out
    )


def test_predict_names_classes_and_nearest_training_samples(world: World) -> None:
    text = world["predict"]
    assert text.code == 0, text.err
    assert re.match(r"digits/test/0/\d+\.png: \d [\d.]+ %, \d [\d.]+ %, \d [\d.]+ %\n  nearest training", text.out)
    first, second = json.loads(world["predict json"].out)
    assert first == second
    assert len(first["classes"]) == 2
    assert 0 < first["classes"][1]["probability"] <= first["classes"][0]["probability"] <= 1
    distances = [near["distance"] for near in first["neighbors"]]
    assert distances == sorted(distances)
    assert all(0 <= near["id"] < 1437 for near in first["neighbors"])


def test_eval_measures_what_the_run_measured(world: World) -> None:
    result = json.loads(world["eval json"].out)
    run = json.loads((world.folder / "runs/split-digits-impostor-001/results.json").read_text())
    # a test image whose classes tie may fall either way in another batch
    assert result["accuracy"] == pytest.approx(run["accuracy"], abs=0.01)
    assert sum(row["images"] for row in result["classes"]) == result["images"] == sum(run["test_counts"])
    assert result["log_loss"] > 0
    text = world["eval"]
    assert text.code == 0, text.err
    assert re.search(
        r"^accuracy [\d.]+ %, log-loss [\d.]+, expected calibration error [\d.]+, 30 images$", text.out, re.M
    )


def test_compare_prints_json_and_resumes(world: World) -> None:
    summary = json.loads(world["compare"].out)
    assert [row["head"] for row in summary["rows"]] == ["dense", "knn", "nca"]
    assert summary["path"] == "runs/compare-001"
    again = world["compare again"]
    assert again.code == 0, again.err
    assert again.err == ""  # nothing was trained
    table = [line.split() for line in again.out.splitlines()]
    heading = next(row for row in table if row and row[0] == "head")
    assert " ".join(heading) == (
        "head accuracy % log-loss ECE % ECE scaled % parameters memory train s ms a sample agrees with dense %"
    )
    dense = next(row for row in table if row and row[0] == "dense")
    assert dense[1] == f"{100 * summary['rows'][0]['accuracy']['mean']:.2f}"
    assert dense[-1] == "100.00"


def test_strategies_on_a_stream_side_by_side(world: World) -> None:
    answer = world["table"]
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("memory", "strategy", "replay", "naive")] == [
        *("memory", "strategy", "replay", "naive") * 2
    ]  # fmt: skip
    assert "time ratio: training and evaluation over those of replay" in answer.out
    assert re.search(r"^3 of 3: replay, memory 100, seed 0: accuracy", answer.err, re.MULTILINE)
    made = {path.name for path in (world.folder / "table").iterdir()}
    runs = {"naive-s0", "replay-m50-s0", "replay-m100-s0"}
    runs |= {f"replay+head={head}-m{memory}-s0" for head in ("dense", "impostor") for memory in (50, 100)}
    assert made == {f"{name}.json" for name in runs} | {"summary.json", "curves.png"}
    again = world["table again"]
    assert again.code == 0, again.err
    summary = json.loads(again.out)
    small, large = (row for row in summary["rows"] if row["name"] == "replay")
    assert f"{100 * small['accuracy']['mean']:.2f}" in answer.out
    assert large["memory_bytes"]["mean"] == pytest.approx(2 * small["memory_bytes"]["mean"], rel=0.01)
    assert "of 3:" not in again.err  # nothing was trained
    assert world["heads on a stream"].code == 0, world["heads on a stream"].err


def test_a_run_is_drawn(world: World) -> None:
    for name in ("split-digits-impostor-001", "split-digits-dense-001"):
        assert (world.folder / "runs" / name / "matrix.png").stat().st_size > 10_000
    assert "figure          runs/split-digits-dense-001/matrix.png" in world["run"].out


def test_list_names_everything(world: World) -> None:
    expected = {
        "heads": {"dense", "knn", "nca", "nngk", "impostor", "kernel"},
        "strategies": {"replay"},
        "streams": {"split-digits", "split-cifar10", "images:DIR"},
        "backbones": {"convnet", "slim_resnet18", "timm:NAME"},
        "datasets": {"digits", "mnist", "cifar10", "images:DIR"},
    }
    for what, names in expected.items():
        answer = world[f"list {what}"]
        assert answer.code == 0, answer.err
        lines = answer.out.splitlines()
        assert names <= {line.split()[0] for line in lines[1:]}
        assert all(line.strip() and line == line.rstrip() for line in lines)
    rows: list[dict[str, Any]] = json.loads(world["list json"].out)
    assert {row["name"]: row["memory"] for row in rows}["knn"] is True


def test_a_strategy_that_leaves_no_model_says_so(world: World) -> None:
    answer = world["a rival"]
    assert answer.code == 0, answer.err
    assert "none saved: what icarl decides by is no head" in answer.out
    assert not (world.folder / "rival" / "model").exists()


def test_a_folder_that_counts_for_nothing_is_told(world: World) -> None:
    answer = world["data twice"]
    assert "note: --data-dir is not used: images:letters names its folder itself" in answer.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_a_disk_does_not_take_is_told_in_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "nnheads", "list", "strategies"],
            stdout=full, stderr=subprocess.PIPE, env=_environment(tmp_path), text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the output (No space left on device)\n"


def test_a_table_too_wide_for_a_terminal_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnheads.cli import screen

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    columns = ["strategy", "accuracy %", "what it does"]
    screen.table("", columns, [["impostor", "12345.67", "a b c d e f"]], text=columns[:1], wrapped=columns[2:])
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "12345.67" in shown
    assert "accuracy %" in shown


def test_small_shares_are_told_as_they_are() -> None:
    from nnheads.cli import screen

    told = screen.shares({"share": 0.001, "validation": 0.125})
    assert told == "trained on 0.1 % of the training images; tested on 12.5 % of them, held out"


def test_interrupted_comparison_keeps_what_is_finished(tmp_path: Path) -> None:
    command = [
        "compare",
        "--heads",
        "dense",
        "--epochs",
        "1",
        "--out",
        "kept",
        "--seeds",
        ",".join(map(str, range(200))),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "nnheads", *command],
        cwd=tmp_path, env=_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell has what it runs in the background ignore SIGINT, and what that starts as well
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not (tmp_path / "kept/dense-seed1.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    kept = len(list((tmp_path / "kept").glob("dense-seed*.json")))
    assert 2 <= kept < 200
    assert (
        err.splitlines()[-1]
        == f"interrupted; kept: {kept} of 200 configurations in kept; go on with --resume --out kept"
    )
    assert "Traceback" not in err
    assert out == ""
    assert not list((tmp_path / "kept").glob("*.partial"))


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    main, other = pty.openpty()
    ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in _environment(tmp_path).items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nnheads", "list", "streams"], stdout=other, stderr=other, env=environment
    )
    os.close(other)
    screen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        screen += part
    os.close(main)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    names = {line.split()[0] for line in lines if line.strip()}
    assert {"split-digits", "split-cifar110-11x10", "new-instances:STREAM"} <= names
