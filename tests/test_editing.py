"""Samples learned and unlearned without training: on a model, on a saved model, and from the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import nnheads
from nnheads import editing, list_heads
from nnheads.benchmarks.comparison import head_variant
from nnheads.benchmarks.datasets import ImageData, load_dataset
from nnheads.benchmarks.forget_cost import measure
from nnheads.errors import CheckpointError, ConfigError, DataError, ShapeError
from nnheads.heads import MemoryHead, build_head, head_class
from nnheads.thumbnails import Thumbnails

MEMORY_HEADS = [name for name in list_heads() if head_class(name).uses_memory]
VARIANTS = [*MEMORY_HEADS, "impostor+bytes_per_center=16", "knn+bytes_per_center=16"]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def eights(digits: ImageData) -> nnheads.HeadedModel:
    """A model that never saw a nine."""
    known = digits.train.subset(digits.train.labels < 9)
    torch.manual_seed(1)  # the same model whichever test asks for it first
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 10, 1), "nngk", k=8)
    nnheads.fit(model, known, epochs=5, optimizer="adamw", lr=3e-3, device="cpu", progress=False)
    model.class_names = tuple("012345678")
    return model


def _with_head(model: nnheads.HeadedModel, digits: ImageData, name: str, folder: Path) -> nnheads.HeadedModel:
    """The same backbone with another head, which holds the same samples; with thumbnails."""
    again = nnheads.load(nnheads.save(model, folder / "shared"))
    known = digits.train.subset(torch.isin(digits.train.ids, model.head.memory.ids[: len(model.head.memory)]))
    head, options = head_variant(name)
    nnheads.attach_head(again, head, num_classes=9, k=8, **options)
    nnheads.fit(again, known, epochs=0, device="cpu", progress=False)
    assert isinstance(again.head, MemoryHead)
    again.class_names = tuple("012345678")
    again.thumbnails = Thumbnails.of_images(known, again.head.memory.ids)
    return again


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_class_is_learned_and_forgotten_at_once(
    name: str, digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path
) -> None:
    model = _with_head(eights, digits, name, tmp_path)
    head = model.head
    assert isinstance(head, MemoryHead)
    nines = (digits.train.labels == 9).nonzero().squeeze(1)[:80]
    new = digits.test.images[digits.test.labels == 9]
    old = digits.test.images[digits.test.labels < 9]
    with torch.no_grad():
        before = model(model.preprocessing(old))
        deciding = model.explain(model.preprocessing(old))
        ids = model.add(digits.train.images[nines], ["nine"] * 80)
        assert model.class_names == (*"012345678", "nine")
        found = model(model.preprocessing(new)).argmax(1)
        assert float((found == 9).float().mean()) > 0.5
        assert all(int(i) in model.thumbnails for i in ids)
        given = {int(i): head.memory.values_at(head.memory.rows_of(i)) for i in head.memory.ids[: len(head.memory)]}
        model.drop(ids)
        after = model(model.preprocessing(old))
        assert (model(model.preprocessing(new)).argmax(1) != 9).all()
    # what is left answers as if the nines had never been there, and no label moved
    assert torch.equal(after.argmax(1), before.argmax(1))
    again = model.explain(model.preprocessing(old))
    assert torch.equal(again.ids, deciding.ids)
    torch.testing.assert_close(again.weights, deciding.weights)
    for i in head.memory.ids[: len(head.memory)]:
        assert torch.equal(head.memory.values_at(head.memory.rows_of(i)), given[int(i)])
    assert not any(int(i) in model.thumbnails for i in ids)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_of_a_forgotten_sample_is_left_in_the_saved_head(
    name: str, digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path
) -> None:
    model = _with_head(eights, digits, name, tmp_path)
    head = model.head
    assert isinstance(head, MemoryHead)
    secret = int(head.memory.ids[3])
    # a sample unlike any other, with a soft label, so that each of its numbers can be looked for
    z = torch.linspace(-3.7, 4.1, head.in_features)[None] * 1.2345
    soft = torch.tensor([[0.123, 0.877 - 0.0456, 0.0456] + [0.0] * 6])
    head.add(z, soft, torch.tensor([secret]))
    drawn = torch.randint(0, 256, (1, *digits.train.images.shape[1:]), generator=torch.Generator().manual_seed(0))
    model.thumbnails.add(drawn.byte(), torch.tensor([secret]))
    held = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    row = int(head.memory.rows_of(torch.tensor(secret)))
    count = len(head.memory)
    traces = [model.thumbnails.get(secret), *(soft[0, i : i + 1].numpy().tobytes() for i in range(3))]
    traces += [
        tensor[row].contiguous().numpy().tobytes()
        for tensor in held.values()
        if tensor.dim() == 2 and len(tensor) == count and bool(tensor[row].any())
    ]
    folder = nnheads.save(model, tmp_path / "model")
    everything = b"".join(_bytes(folder).values())
    assert all(trace in everything for trace in traces)
    assert len(traces) > 4
    left = editing.forget(folder, [secret])
    assert left == count - 1
    everything = b"".join(_bytes(folder).values())
    assert not any(trace in everything for trace in traces)
    again = nnheads.load(folder)
    assert isinstance(again.head, MemoryHead)
    assert secret not in again.head.memory.ids.tolist()
    x = model.preprocessing(digits.test.images[:50])
    assert secret not in again.explain(x, k=left).ids
    model.drop([secret])
    assert torch.equal(again(x), model(x))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_labels_and_ids_may_be_lists(digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path) -> None:
    model = nnheads.load(nnheads.save(eights, tmp_path / "model"))
    assert model.add(digits.train.images[:2], [0, 9], ids=[7001, 7002]).tolist() == [7001, 7002]
    rows = model.head.memory.rows_of(torch.tensor([7001, 7002]))
    assert model.head.memory.labels[rows].tolist() == [0, 9]
    with pytest.raises(DataError, match="all by name or all by number, not as int"):
        model.add(digits.train.images[:2], ["zero", 1])


def test_adding_nothing_adds_nothing(digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path) -> None:
    folder = nnheads.save(eights, tmp_path / "model")
    assert editing.add(folder, [], []).shape == (0,)
    after = nnheads.load(folder)
    assert len(after.head.memory) == len(eights.head.memory)
    assert after.class_names == eights.class_names
    with pytest.raises(ShapeError, match="labels"):
        editing.add(folder, [], ["new"])
    after.class_names = None
    assert after.add(digits.train.images[:0], []).shape == (0,)
    assert after.class_names is None


def test_mistakes_change_nothing(digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path) -> None:
    folder = nnheads.save(eights, tmp_path / "model")
    before = _bytes(folder)
    model = nnheads.load(folder)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if torch.isfinite(tensor).all()}
    z = torch.zeros(2, model.head.in_features)
    held = int(model.head.memory.ids[0])
    images = digits.train.images[:2]
    for call, error, words in (
        (lambda: model.drop([held, 987654]), ShapeError, "no sample with id 987654"),
        (lambda: model.drop([held + 0.5]), ShapeError, "whole numbers, not torch.float32"),
        (lambda: model.head.drop([True]), ShapeError, "whole numbers, not torch.bool"),
        (lambda: model.drop(["zero"]), ShapeError, "whole numbers, not list"),
        (lambda: model.add(images, "nine"), DataError, "one a sample"),
        (lambda: model.head.add(z[:, 1:], torch.tensor([1, 2])), ShapeError, "embeddings must be"),
        (lambda: model.head.add(z * float("nan"), torch.tensor([1, 2])), ShapeError, "NaN"),
        (lambda: model.add(images, torch.tensor([1])), ShapeError, "labels"),
        (lambda: model.add(images, torch.tensor([1, -2])), ShapeError, "negative|outside|0 or more"),
        (lambda: model.add(images[:, :, 1:], ["new", "new"]), ShapeError, "images must be uint8"),
        (lambda: model.add(images.float() * float("nan"), ["new", "new"]), ShapeError, "NaN"),
        (lambda: editing.forget(folder, [held, 987654]), ShapeError, "no sample with id 987654"),
        (lambda: editing.add(folder, [tmp_path / "none.png"], ["a"]), DataError, "no such image"),
        (lambda: editing.forget(tmp_path / "nowhere", [1]), CheckpointError, "no such folder"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert model.class_names == tuple("012345678")
    assert _bytes(folder) == before
    with pytest.raises(ConfigError, match="stores no samples to drop"):
        nnheads.attach_head(nnheads.build_backbone("convnet", 3, 1), "dense").drop([1])


def test_samples_are_forgotten_by_the_ids_that_adding_them_gave(
    digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path
) -> None:
    path = nnheads.save(eights, tmp_path / "model", thumbnails=digits.train)
    before = len(nnheads.load(path).thumbnails)
    with pytest.raises(DataError, match="made of an ImageSet"):
        nnheads.save(eights, tmp_path / "other", thumbnails=digits.train.images)
    new = editing.add(path, digits.train.images[:3], digits.train.labels[:3])
    assert len(nnheads.load(path).thumbnails) == before + 3
    editing.forget(path, new)
    left = nnheads.load(path)
    assert len(left.thumbnails) == before
    assert not any(i in left.thumbnails for i in new.tolist())
    editing.forget(path, int(left.head.memory.ids[0]))
    assert len(nnheads.load(path).thumbnails) == before - 1


def test_one_sample_is_forgotten_by_its_number(digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path) -> None:
    model = nnheads.load(nnheads.save(eights, tmp_path / "model", thumbnails=digits.train))
    first, second = model.head.memory.ids[:2].tolist()
    model.drop(first)
    model.head.drop([second])
    assert not {first, second} & set(model.head.memory.ids[: len(model.head.memory)].tolist())
    assert first not in model.thumbnails


@pytest.mark.parametrize("damage", ["newer", "older", "truncated", "flipped", "thumbnails", "config"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_left_alone(
    damage: str, digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path
) -> None:
    folder = nnheads.save(eights, tmp_path / "model", thumbnails=digits.train)
    meta = json.loads((folder / "head.json").read_text())
    held = int(eights.head.memory.ids[0])
    if damage in ("newer", "older"):
        meta["format_version"] = 99 if damage == "newer" else 0
    elif damage == "config":
        meta["head"]["config"]["k"] = "many"
    else:
        name = {"truncated": "head", "flipped": "backbone", "thumbnails": "thumbnails"}[damage]
        file = folder / f"{name}.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 255
        file.write_bytes(data[:-3] if damage == "truncated" else data)
    (folder / "head.json").write_text(json.dumps(meta))
    before = _bytes(folder)
    words = {"newer": "format 99.*upgrade", "older": "format 0", "truncated": "bytes where", "config": "'many'"}
    for change in (
        lambda: editing.forget(folder, [held]),
        lambda: editing.add(folder, digits.train.images[:1], ["0"]),
    ):
        with pytest.raises(CheckpointError, match=words.get(damage, "changed after it was written")):
            change()
        assert _bytes(folder) == before
        assert os.listdir(tmp_path) == ["model"]


def test_a_killed_command_leaves_the_old_model(digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path) -> None:
    folder = nnheads.save(eights, tmp_path / "model")
    before = _bytes(folder)
    held = int(eights.head.memory.ids[0])
    code = (
        "import os, signal, sys, nnheads.editing as e\n"
        "e.write_text = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"e.forget(sys.argv[1], [{held}])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert _bytes(folder) == before
    # killed between its last two steps: the new model is there, and the old one beside it goes with the next change
    shutil.copytree(folder, tmp_path / ".model.old")
    assert editing.forget(folder, [held]) == len(eights.head.memory) - 1
    assert not (tmp_path / ".model.old").exists()


def test_a_gated_head_with_a_projector_of_the_users_own_forgets(tmp_path: Path) -> None:
    def projector() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.LazyLinear(4))

    model = nnheads.attach_head(nnheads.build_backbone("convnet", 3, 1), "biased", at="bn1", projector=projector())
    x = torch.rand(12, 1, 8, 8)
    ids = model.eval().add(x, torch.arange(12) % 3)
    folder = nnheads.save(model, tmp_path / "model")
    assert editing.forget(folder, ids[:2].tolist()) == 10
    model.drop(ids[:2])
    again = nnheads.load(folder, projector=torch.nn.Sequential(*model.head.projector))
    assert torch.equal(again(x), model(x))


def test_changes_made_at_the_same_time_are_all_kept(eights: nnheads.HeadedModel, tmp_path: Path) -> None:
    folder = nnheads.save(eights, tmp_path / "model")
    ids: list[int] = eights.head.memory.ids[:6].tolist()
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda i: editing.forget(folder, [i]), ids))
    left = nnheads.load(folder).head.memory
    assert not set(ids) & set(left.ids.tolist())
    assert len(left) == len(eights.head.memory) - 6


# ---- from the command line ---------------------------------------------------------------------------------------


def test_add_predict_and_forget_on_a_checkpoint(
    digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnheads.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    def image(pixels: Tensor, name: str) -> Path:
        Image.fromarray(pixels[0].numpy()).save(tmp_path / name)
        return tmp_path / name

    folder = nnheads.save(eights, tmp_path / "my run" / "model")
    nines = digits.train.images[digits.train.labels == 9]
    files = [image(nines[i], f"nine{i}.png") for i in range(20)]
    query = image(digits.test.images[digits.test.labels == 9][0], "query.png")
    assert "9:" not in run("predict", folder, query)[1]
    first = int(eights.head.memory.ids.max()) + 1
    code, out, _ = run("add", folder.parent, *files, "--label", "nine")
    assert code == 0
    assert f"added 20 images of 'nine' to {folder}, ids {first} to {first + 19}" in out
    assert f"undo with: nnheads forget '{folder.parent}' {first} {first + 1}" in out
    assert "query.png: nine" in run("predict", folder, query)[1]
    assert len(nnheads.load(folder).thumbnails or ()) == 20
    before = _bytes(folder)
    code, out, err = run("forget", folder, first, 424242)
    assert (code, out) == (2, "")
    assert "no sample with id 424242" in err
    assert err.count("\n") == 1
    assert _bytes(folder) == before
    code, out, _ = run("forget", folder, *range(first, first + 20), "--json")
    assert json.loads(out)["forgotten"] == list(range(first, first + 20))
    assert "query.png: nine" not in run("predict", folder, query)[1]
    code, _, err = run("add", folder, tmp_path / "gone.png", "--label", "nine")
    assert code == 2
    assert "no such image" in err
    code, _, err = run("forget", folder, "seven")
    assert code == 2
    assert "valid integer" in err


def test_what_forgetting_costs() -> None:
    with pytest.raises(ConfigError, match="no memory to forget from"):
        measure(["dense"], centers=100, width=8, dropped=1, rounds=1, device="cpu")
    found = measure(centers=20_000, width=64, dropped=400, rounds=3, device="cpu")
    assert set(found["heads"]) == set(MEMORY_HEADS)
    for name, times in found["heads"].items():
        assert 0 < times["drop_seconds"] <= times["both_seconds"] <= times["both_seconds_largest"], name
        assert times["both_seconds"] < 0.2, name  # the bar for 1,000 of 50,000 of 512 numbers


@pytest.mark.parametrize("name", MEMORY_HEADS)
def test_what_was_forgotten_decides_nothing_any_more(name: str) -> None:
    """Answers are those of a head that never stored the samples, of which the index knew."""
    y = torch.arange(600) % 6
    z = 0.5 * torch.randn(600, 8, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(6, 8)[y]
    head, other = (build_head(name, 8, 6).eval() for _ in range(2))
    assert isinstance(head, MemoryHead)
    assert isinstance(other, MemoryHead)
    other.load_state_dict(head.state_dict())
    gone = torch.arange(0, 600, 6)  # a whole class
    head.add(z, y)
    before = head(z)  # the index is built
    assert bool((before[gone].argmax(1) == 0).all()) or name == "biased"
    head.drop(gone)
    kept = y != 0
    other.add(z[kept], y[kept], torch.arange(600)[kept])
    for each in (head, other):
        each.refreshed()
    torch.testing.assert_close(head(z), other(z), atol=1e-5, rtol=1e-4)
    assert not torch.isin(head.neighbors(z, k=20).ids, gone).any()
    assert head(z[gone]).exp()[:, 0].max() < 0.2


def test_the_id_of_a_forgotten_sample_is_not_given_again(
    digits: ImageData, eights: nnheads.HeadedModel, tmp_path: Path
) -> None:
    folder = nnheads.save(eights, tmp_path / "model")
    (first,) = editing.add(folder, digits.train.images[:1], ["one"]).tolist()
    editing.forget(folder, [first])
    (second,) = editing.add(folder, digits.train.images[:1], ["one"]).tolist()
    assert second == first + 1
    # nor where the model is loaded and saved by hand, or copied
    model = nnheads.load(folder)
    model.drop([second])
    again = nnheads.load(nnheads.save(model, tmp_path / "other"))
    assert again.add(digits.train.images[:2], torch.tensor([1, 1])).tolist() == [second + 1, second + 2]
    assert isinstance(model.head, MemoryHead)
    twin = build_head(model.head.name, model.head.in_features, model.head.num_classes)
    state = model.head.state_dict()
    twin.load_state_dict(state)
    assert isinstance(twin, MemoryHead)
    assert twin.add(torch.zeros(1, twin.in_features), torch.tensor([1])).tolist() == [second + 1]
    # files from before there was a counter load as they did
    old = build_head(model.head.name, model.head.in_features, model.head.num_classes)
    old.load_state_dict({name: part for name, part in state.items() if not name.endswith("next_id")})
    assert isinstance(old, MemoryHead)
    assert len(old.memory) == len(model.head.memory)
    assert old.add(torch.zeros(1, old.in_features), torch.tensor([1])).tolist() == [
        int(model.head.memory.ids.max()) + 1
    ]


def test_a_label_far_beyond_the_classes_is_a_mistake() -> None:
    head = build_head("nngk", 4, 3)
    with pytest.raises(ShapeError, match="label 10000000 is far beyond the 3 classes"):
        head.add(torch.zeros(1, 4), torch.tensor([10**7]))
    with pytest.raises(ShapeError, match="labels must be a tensor, got list"):
        head.add(torch.zeros(1, 4), [1])
    assert head.num_classes == 3
    assert len(head.memory) == 0
