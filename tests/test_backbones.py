from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from nnheads.backbones import backbone_spec, build_backbone, list_backbones
from nnheads.errors import ConfigError, UnknownNameError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small on images this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", list_backbones())
@pytest.mark.parametrize("channels", [1, 3])
def test_own_backbones_take_any_size_and_follow_the_seed(name: str, channels: int) -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(build_backbone(name, 7, channels).eval())
    for size in (8, 28):
        x = torch.randn(2, channels, size, size + 1)
        with torch.no_grad():
            out = made[0](x)
            assert out.shape == (2, 7)
            assert torch.equal(out, made[1](x))


@pytest.mark.parametrize("name", list_backbones())
def test_channels_last_changes_no_result(name: str) -> None:
    model = build_backbone(name).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


def test_slim_resnet18_has_the_published_size() -> None:
    assert sum(p.numel() for p in build_backbone("slim_resnet18", 10).parameters()) == 1_094_750
    assert sum(p.numel() for p in build_backbone("resnet18_cifar", 10).parameters()) == 11_173_962


@pytest.mark.slow
def test_slim_resnet18_is_avalanches() -> None:
    theirs = pytest.importorskip("avalanche.models").SlimResNet18(10, nf=20).eval()
    ours = build_backbone("slim_resnet18", 10).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_options_reach_the_network_and_the_spec_rebuilds_it() -> None:
    model = build_backbone("convnet", 4, 1, width=8)
    spec = backbone_spec(model)
    assert spec == {"name": "convnet", "num_classes": 4, "in_channels": 1, "width": 8}
    again = build_backbone(**json.loads(json.dumps(spec)))
    again.load_state_dict(model.state_dict())
    assert again.linear.in_features == 32


def test_the_origin_of_the_weights_is_not_in_the_spec() -> None:
    model = build_backbone("torchvision:squeezenet1_1", 5, weights=None, dropout=0.1)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert backbone_spec(model) == {
        "name": "torchvision:squeezenet1_1",
        "num_classes": 5,
        "in_channels": 3,
        "dropout": 0.1,
    }
    assert backbone_spec(torch.nn.Linear(2, 2)) is None


def test_timm_takes_other_channels() -> None:
    pytest.importorskip("timm")
    assert build_backbone("timm:test_efficientnet", 5, 1)(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert "timm:resnet18" in list_backbones("timm")


def test_torchvision_names_are_its_classifiers() -> None:
    names = list_backbones("torchvision")
    assert "torchvision:resnet18" in names
    assert not any("fasterrcnn" in name or "fcn" in name for name in names)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slim_resnet19", {}, "did you mean 'slim_resnet18'"),
        ("resnet18", {}, "torchvision:NAME"),
        ("torchvision:", {}, "unknown backbone"),
        ("torchvision:resnet19", {}, "did you mean torchvision:resnet"),
        ("torchvision:zzzz", {}, "list_backbones"),
    ],
)
def test_unknown_names_say_what_is_known(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        build_backbone(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision:resnet18", {"in_channels": 1}, "3 channels, not 1"),
        ("convnet", {"num_classes": 0}, "num_classes must be 1 or more"),
        ("convnet", {"in_channels": 0}, "in_channels must be 1 or more"),
        ("convnet", {"depth": 3}, "depth"),
        ("convnet", {"width": 0}, "width must be 1 or more"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "num_classes"),
    ],
)
def test_options_that_cannot_work(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, **options)
