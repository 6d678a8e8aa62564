"""Backbones run by ``torch.compile``: the same answers, plain models afterwards, and mistakes in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import nnheads
from nnheads.attach import attach_head
from nnheads.cli.main import app
from nnheads.compiling import compiling
from nnheads.data import BatchLoader, ImageSet
from nnheads.errors import ConfigError, UnknownNameError
from nnheads.headed import HeadedModel
from nnheads.training import embed, evaluate, fit


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def images(count: int = 40) -> ImageSet:
    """Grey images, a bright row a class."""
    y = torch.arange(count) % 4
    found = torch.randint(0, 60, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    found[torch.arange(count), 0, 2 * y] += 180
    return ImageSet(found.to(torch.uint8), y)


def model_for(head: str = "nngk", **options: Any) -> HeadedModel:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return attach_head(nn.Sequential(stem, nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4)), head, k=3, **options)


def trained(compile: bool | str, **options: Any) -> HeadedModel:
    model = model_for()
    fit(model, images(), epochs=2, batch_size=16, lr=0.05, device="cpu", progress=False, compile=compile, **options)
    return model


def test_training_compiled_is_training_and_leaves_a_plain_model(tmp_path: Path) -> None:
    plain = trained(False, precision="float32")
    model = trained("eager", precision="float32", checkpoint=tmp_path / "model")
    assert not any("_orig_mod" in name for name in model.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(embed(model, images())[0], embed(plain, images())[0], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        x = model.preprocessing(images().images)  # type: ignore[misc]
        loaded = nnheads.load(tmp_path / "model", backbone=nnheads.detach_head(model_for()))
        assert torch.equal(loaded(x), model(x))


def test_embeddings_and_answers_are_those_of_the_plain_backbone() -> None:
    model = trained(False)
    z, y, ids = embed(model, images(), batch_size=16, precision="float32")
    again, labels, numbers = embed(model, images(), batch_size=16, precision="float32", compile="aot_eager")
    torch.testing.assert_close(again, z)
    assert torch.equal(labels, y)
    assert torch.equal(numbers, ids)
    answers = [evaluate(model, images(), precision="float32", compile=how).log_probs for how in (False, "aot_eager")]
    torch.testing.assert_close(*answers)


def test_the_backbone_alone_is_compiled_and_only_meanwhile() -> None:
    model, seen = model_for(), list[nn.Module]()
    real = torch.compile

    def spy(module: nn.Module, **given: Any) -> Any:
        run = real(module, **given)

        def counted(x: Tensor) -> Any:
            seen.append(module)
            return run(x)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", spy)
        with compiling(model, "eager"):
            model.eval().features(torch.randn(2, 1, 8, 8))
        model.features(torch.randn(2, 1, 8, 8))
        with pytest.raises(RuntimeError, match="on purpose"), compiling(model, "eager"):
            raise RuntimeError("on purpose")
        model.features(torch.randn(2, 1, 8, 8))
    assert seen == [model.backbone]


def test_mistakes_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for()
    with pytest.raises(UnknownNameError, match="did you mean 'inductor'"):
        embed(model, images(), compile="inducto")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler .*: install g\+\+") as caught:
        fit(model, images(), epochs=1, progress=False, compile=True)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="none is on PATH"):
        fit(model, images(), epochs=1, progress=False, compile=True)


def test_a_failing_backend_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise ValueError("no such instruction\non this machine")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **given: real(module, backend=broken))
    model = model_for(preprocessing=trained(False).preprocessing)
    with pytest.raises(
        ConfigError, match=r"torch\.compile failed .*no such instruction.*: leave compile out"
    ) as caught:
        embed(model, images(), compile="eager")
    assert "\n" not in str(caught.value)
    assert len(embed(model, images())[0]) == 40


def test_a_backbone_cut_in_two_is_refused() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = attach_head(network, "biased", at="1", example=torch.randn(2, 8))
    with pytest.raises(ConfigError, match="cut in two"), compiling(model, True):
        pass


def test_embeddings_are_ordinary_tensors_and_a_refresh_leaves_ordinary_centers() -> None:
    model = trained(False)
    z, y, _ = embed(model, images())
    assert not z.is_inference()
    nn.functional.cross_entropy(nn.Linear(8, 4)(z), y).backward()
    preprocessing = model.preprocessing
    assert preprocessing is not None
    model.refresh(BatchLoader(images(), preprocessing, 16))
    assert not any(tensor.is_inference() for tensor in [*model.buffers(), *model.parameters()])
    model.train().loss(preprocessing(images().images), images().labels, images().ids).backward()


def test_putting_a_head_on_a_model_loads_no_compiler() -> None:
    code = (
        "import sys, torch, nnheads; from torch import nn; "
        "model = nnheads.attach_head(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), 'knn'); "
        "model.memorize([(torch.randn(8, 4), torch.arange(8) % 2)]); model.eval()(torch.randn(1, 4)); "
        "print(int('torch._dynamo' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]  # it takes a second


@pytest.mark.slow
def test_inductor_compiles_for_real(tmp_path: Path) -> None:
    plain, model = trained(False, precision="float32"), trained(True, precision="float32")
    torch.testing.assert_close(embed(model, images())[0], embed(plain, images())[0], rtol=1e-2, atol=1e-3)
    arguments = ["compare", "--heads", "knn", "--epochs", "1", "--compile", "--out", str(tmp_path), "--no-plots"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


@pytest.mark.gpu
def test_a_pass_on_a_gpu_is_that_on_the_cpu() -> None:
    model = trained(False)
    here = embed(model, images(), device="cpu", precision="float32")
    there = embed(model, images(), device="cuda", precision="float32")
    torch.testing.assert_close(there[0], here[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(there[1], here[1])
    assert torch.equal(there[2], here[2])
