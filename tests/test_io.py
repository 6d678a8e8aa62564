"""What a user relies on when a model is saved, copied about, and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnheads.io as io
import nnheads.storage as storage
from nnheads.attach import attach_head, detach_head
from nnheads.backbones import build_backbone
from nnheads.data import Preprocessing
from nnheads.errors import CheckpointError
from nnheads.headed import HeadedModel
from nnheads.heads import MemoryHead, list_heads
from nnheads.io import load, save

PREPROCESSING = Preprocessing((8, 8), 1, (0.3,), (0.4,))


def images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def digits_model(head: str = "nngk", **options: Any) -> HeadedModel:
    """A model by name whose memory, where it has one, holds 24 samples of 4 classes."""
    torch.manual_seed(0)
    model = attach_head(
        build_backbone("convnet", 4, 1, width=2),
        head,
        preprocessing=PREPROCESSING,
        class_names=["ant", "bee", "cat", "döner"],
        **options,
    ).eval()
    return model.memorize([(images(), torch.arange(24) % 4, torch.arange(24) + 100)])


def own_network(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


def answers(model: HeadedModel, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(images(9, seed=1).to(dtype))
    return found


def assert_same(model: HeadedModel, path: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> HeadedModel:
    before = answers(model, dtype)
    loaded = load(save(model, path), **kwargs)
    assert not loaded.training
    assert loaded.head.name == model.head.name
    assert loaded.head.config() == model.head.config()
    assert torch.equal(answers(loaded, dtype), before)
    assert torch.equal(answers(model, dtype), before)  # saving and answering changed nothing
    return loaded


@pytest.mark.parametrize("head", list_heads())
def test_every_head_answers_the_same_bit_for_bit(head: str, tmp_path: Path) -> None:
    loaded = assert_same(digits_model(head), tmp_path / "model")
    assert loaded.class_names == ("ant", "bee", "cat", "döner")
    assert loaded.preprocessing == PREPROCESSING
    assert loaded.backbone_spec == {"name": "convnet", "num_classes": 4, "in_channels": 1, "width": 2}


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("knn", {"pca": 3, "k": 5, "metric": "cosine"}),
        ("knn", {"vote": "gaussian", "normalize": True}),
        ("nngk", {"sigma": "learned", "k": 3}),
        ("impostor", {"sigma": 0.7, "centers": "tied"}),
        ("kernel", {"k": None}),
        ("dense", {"hidden": [5, 3], "activation": "tanh"}),
    ],
)
def test_options_that_carry_state(head: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(digits_model(head, **options), tmp_path / "model")


@pytest.mark.parametrize("head", list_heads())
def test_a_widened_head(head: str, tmp_path: Path) -> None:
    model = digits_model(head)
    model.head.widen(7)
    model.memorize([(images(6, seed=2), torch.tensor([4, 5, 6, 4, 5, 6]), torch.arange(6))])
    assert_same(model, tmp_path / "model")
    assert load(tmp_path / "model").head.num_classes == 7


@pytest.mark.parametrize("head", list_heads())
def test_float64(head: str, tmp_path: Path) -> None:
    model = digits_model(head).double()
    assert answers(model, torch.float64).dtype == torch.float64
    assert_same(model, tmp_path / "model", torch.float64)


def test_changed_memory_soft_labels_and_sample_weights(tmp_path: Path) -> None:
    model = digits_model("nngk")
    assert isinstance(model.head, MemoryHead)
    model.head.memory.relabel(torch.tensor([103]), torch.tensor([[0.5, 0.25, 0.25, 0.0]]))
    model.head.memory.column("log_weight")[:5] = 0.3
    model.head.drop(torch.tensor([101, 110]))
    loaded = assert_same(model, tmp_path / "model")
    assert isinstance(loaded.head, MemoryHead)
    assert sorted(loaded.head.memory.ids[:22].tolist()) == sorted(set(range(100, 124)) - {101, 110})
    assert int(loaded.head.add(torch.zeros(1, 8), torch.tensor([0]))[0]) == 124  # ids go on, none is given twice


def test_an_empty_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_same(attach_head(build_backbone("convnet", 4, 1, width=2), "impostor").eval(), tmp_path / "model")


def test_a_network_of_the_users_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = attach_head(own_network(), "nngk").eval()
    model.memorize([(images(), torch.arange(24) % 4, torch.arange(24))])
    path = save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="backbone=your_model"):
        load(path)
    other = own_network()
    assert torch.equal(answers(load(path, other)), answers(model))


def test_without_the_backbones_weights(tmp_path: Path) -> None:
    model = digits_model("impostor")
    path = save(model, tmp_path / "model", backbone=False)
    assert not (path / "backbone.safetensors").exists()
    with pytest.raises(CheckpointError, match="without its backbone's weights"):
        load(path)
    before = answers(model)
    assert torch.equal(answers(load(path, detach_head(model))), before)


def test_a_network_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    path = save(attach_head(own_network(6), "dense"), tmp_path / "model")
    for wrong in (own_network(5), nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Identity(), nn.Linear(6, 4))):
        before = {name: tensor.clone() for name, tensor in wrong.state_dict().items()}
        with pytest.raises(CheckpointError, match="does not fit Sequential") as caught:
            load(path, wrong)
        assert "\n" not in str(caught.value)
        after = wrong.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_classifier_comes_back_with_detach(tmp_path: Path) -> None:
    model = digits_model()
    loaded = load(save(model, tmp_path / "model"))
    x = images(3)
    with torch.no_grad():
        assert torch.equal(detach_head(loaded)(x), detach_head(model)(x))


def test_channels_last_weights_keep_their_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = attach_head(build_backbone("convnet", 4, 1, width=16), "dense").eval()
    model.backbone.to(memory_format=torch.channels_last)
    loaded = assert_same(model, tmp_path / "model")
    assert loaded.backbone.get_parameter("conv2.weight").is_contiguous(memory_format=torch.channels_last)


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    path = save(digits_model(), tmp_path / "model")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(path)
    assert torch.equal(torch.rand(3), expected)


# ---- never half written ------------------------------------------------------------------------------------------


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(digits_model("dense"), tmp_path / "model")
    model = digits_model("knn")
    assert_same(model, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write_tensors", "write_text"])
def test_a_failed_save_leaves_the_old_model(
    error: BaseException, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = digits_model("nngk")
    path = save(old, tmp_path / "model")
    original: Callable[..., Any] = getattr(storage, where)

    def broken(file: Path, content: Any) -> None:
        original(file, content)
        raise error

    monkeypatch.setattr(io, where, broken)
    expected: type[BaseException] = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(digits_model("dense"), path)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(answers(load(path)), answers(old))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_leaves_the_old_model(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(digits_model("nngk"), tmp_path / "model")
    rename, calls = Path.rename, []

    def broken(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(digits_model("dense"), path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model"]
    assert load(path).head.name == "nngk"


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    path = save(digits_model("nngk"), tmp_path / "model")
    path.rename(tmp_path / ".model.old")  # what a kill at the worst moment leaves
    assert load(path).head.name == "nngk"
    path.rename(tmp_path / ".model.old")
    save(digits_model("dense"), path)
    assert load(path).head.name == "dense"


@pytest.mark.parametrize("content", ["notes.txt", "head.json"])
def test_what_is_not_a_saved_model_is_not_replaced(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / content).write_text("{}")
    with pytest.raises(CheckpointError, match="not a saved model"):
        save(digits_model("dense"), folder)
    assert (folder / content).read_text() == "{}"
    with pytest.raises(CheckpointError, match="not a saved model"):
        save(digits_model("dense"), folder / content)


def test_a_users_file_beside_the_model_is_not_deleted(tmp_path: Path) -> None:
    path = save(digits_model("dense"), tmp_path / "model")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a saved model"):
        save(digits_model("dense"), path)
    assert (path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert_same(digits_model("dense"), tmp_path / "model")


# ---- what is broken is named -------------------------------------------------------------------------------------


def edit(path: Path, **fields: Any) -> None:
    meta = json.loads((path / "head.json").read_text())
    (path / "head.json").write_text(json.dumps(meta | fields))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (lambda p: truncate(p / "head.safetensors"), "head.safetensors", "bytes where"),
        (lambda p: truncate(p / "backbone.safetensors"), "backbone.safetensors", "bytes where"),
        (lambda p: truncate(p / "head.json"), "head.json", "cannot be read"),
        (lambda p: flip(p / "backbone.safetensors"), "backbone.safetensors", "changed after"),
        (lambda p: (p / "backbone.safetensors").unlink(), "backbone.safetensors", "missing"),
        (lambda p: (p / "head.json").unlink(), "model", "has no head.json"),
        (lambda p: (p / "head.json").write_text("[]"), "head.json", "not written by nnheads.save"),
        (lambda p: edit(p, format_version=99), "head.json", "upgrade nnheads"),
        (lambda p: edit(p, head={"name": "nngk"}), "head.json", "in_features"),
        (lambda p: edit(p, files={}), "head.json", "incomplete"),
        (lambda p: edit(p, layer="nowhere"), "model", "nowhere"),
        (
            lambda p: edit(p, head={"name": "theirs", "in_features": 8, "num_classes": 4, "config": {}}),
            "model",
            "import the module that registers",
        ),
        (lambda p: edit(p, backbone={"name": "timm:resnet18", "checkpoint_path": "x.pth"}), "head.json", "not taken"),
        (lambda p: edit(p, preprocessing={"size": 3}), "head.json", "preprocessing"),
    ],
)
def test_damage_is_one_line_that_names_the_file(
    damage: Callable[[Path], Any], file: str, reason: str, tmp_path: Path
) -> None:
    path = save(digits_model("nngk"), tmp_path / "model")
    damage(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nothing")
    assert os.listdir(tmp_path) == []
