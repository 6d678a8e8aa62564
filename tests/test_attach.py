from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from nnheads.attach import HeadedModel, attach_head, detach_head
from nnheads.backbones import build_backbone
from nnheads.errors import AttachError, ConfigError, ShapeError, UnknownNameError
from nnheads.heads import build_head
from nnheads.heads.compressed import compressed_head
from nnheads.weights import load_weights


class Nested(nn.Module):
    """A user's model: the classifier deep inside, and no last module."""

    def __init__(self, finish: Any = None) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"out": nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 4))})
        self.norm = nn.BatchNorm1d(6)
        self.finish = finish
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.decoder["out"](self.norm(x))
        return self.finish(out) if self.finish else out


def mlp(*tail: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), *tail)


def samples(n: int = 40) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 4
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1)) + 6 * F.one_hot(y, 8), y


def batches(x: Tensor, y: Tensor, size: int = 16) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), torch.arange(len(y)).split(size), strict=True))


def test_sizes_come_from_the_replaced_layer() -> None:
    headed = attach_head(mlp(), "knn", k=3)
    assert (headed.layer, headed.in_features, headed.head.in_features, headed.head.num_classes) == ("3", 6, 6, 4)
    assert attach_head(mlp(), "knn", num_classes=9).head.num_classes == 9
    assert attach_head(mlp(), "knn", class_names=["a", "b"]).head.num_classes == 2
    assert attach_head(mlp(), build_head("knn", 6, 5)).head.num_classes == 5


def test_features_run_the_backbone_once_and_keep_the_gradient() -> None:
    model = Nested()
    headed = attach_head(model, "dense")
    z = headed.features(torch.randn(5, 6))
    assert model.calls == 1
    z.sum().backward()
    assert model.norm.weight.grad is not None
    assert headed.layer == "decoder.out.1"


def test_detach_gives_back_the_same_model_with_its_trained_backbone() -> None:
    model = mlp()
    classifier, keys, x = model[3], list(model.state_dict()), samples()[0]
    before = model(x)
    headed = attach_head(model, "dense")
    assert not any(p is classifier.weight for p in headed.parameters())
    assert {name.split(".")[0] for name in headed.state_dict()} == {"backbone", "head"}
    assert detach_head(headed) is model
    assert model[3] is classifier
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    with pytest.raises(AttachError, match="detached"):
        headed(x)
    assert attach_head(model, "knn").in_features == 6


def test_the_classifier_follows_the_model_to_another_dtype() -> None:
    headed = attach_head(mlp(), "dense").double()
    assert headed(samples()[0].double()).dtype == torch.float64
    assert detach_head(headed)(samples()[0].double()).dtype == torch.float64


def test_a_shared_classifier_is_replaced_wherever_it_is() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)
            self.alias = self.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(x)  # type: ignore[no-any-return]

    model, x = Shared(), samples()[0]
    headed = attach_head(model, "dense")
    assert torch.equal(headed.features(x), x)
    detach_head(headed)
    assert model.fc is model.alias
    assert isinstance(model.fc, nn.Linear)


def test_attaching_again_swaps_the_head_and_keeps_the_rest() -> None:
    model = mlp()
    classifier = model[3]
    headed = attach_head(model, "dense", num_classes=7, class_names=list("abcdefg"))
    assert attach_head(headed, "knn", k=2) is headed
    assert (headed.head.name, headed.head.num_classes, headed.class_names) == ("knn", 7, tuple("abcdefg"))
    with pytest.raises(AttachError, match="detach_head"):
        attach_head(headed, "knn", layer="1")
    with pytest.raises(AttachError, match="already carries a head"):
        attach_head(headed.backbone, "knn")
    with pytest.raises(AttachError, match="already carries a head"):
        attach_head(nn.Sequential(headed), "knn")
    assert detach_head(headed)[3] is classifier  # type: ignore[index]


def test_a_head_of_other_classes_does_not_take_their_names() -> None:
    names = tuple("abcdefg")
    headed = attach_head(mlp(), "dense", class_names=names)
    assert attach_head(headed, "knn", num_classes=7).class_names == names
    assert attach_head(headed, compressed_head(headed.head, 4)).class_names == names
    assert attach_head(headed, "dense", class_names=["ant", "bee"]).class_names == ("ant", "bee")
    assert attach_head(headed, "dense", num_classes=3).class_names is None
    headed = attach_head(mlp(), "dense", class_names=names)
    assert attach_head(headed, build_head("knn", 6, 3)).class_names is None
    headed = attach_head(mlp(), "dense", num_classes=9)
    headed.class_names = names  # the last two were never named
    assert attach_head(headed, "knn").class_names == names
    assert attach_head(headed, "knn", num_classes=7).class_names == names


@pytest.mark.parametrize(
    "tail",
    [
        nn.LogSoftmax(1),
        nn.Softmax(1),
        nn.Sigmoid(),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), nn.Flatten()),
    ],
)
def test_an_activation_behind_the_classifier_is_passed_over(tail: nn.Module) -> None:
    model, x = mlp(tail), samples()[0]
    expected = model[:3](x)
    for mode in (True, False):
        torch.testing.assert_close(attach_head(mlp(tail), "dense").train(mode).features(x), expected)


def test_so_is_one_written_as_a_function_or_a_temperature() -> None:
    for finish in (lambda out: F.log_softmax(out, dim=1), lambda out: out / 0.07, lambda out: (out, out.exp())):
        assert attach_head(Nested(finish), "dense")(torch.randn(3, 6)).shape == (3, 4)


def test_a_convolution_as_classifier_is_pooled() -> None:
    body = nn.Conv2d(3, 5, 3)
    model = nn.Sequential(body, nn.Conv2d(5, 4, 1), nn.ReLU(inplace=True), nn.AvgPool2d(6), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    headed = attach_head(model, "dense")
    torch.testing.assert_close(headed.features(x), body(x).mean((2, 3)))
    assert headed.layer == "1"


class Tokens(nn.Module):
    """Classifies every token and pools what comes out."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.out = nn.Linear(8, 3)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.out(self.body(x)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        lambda z: z[:, -1],
        lambda z: z[:, 0],
        lambda z: z[torch.arange(len(z)), torch.arange(len(z)) % 5],
        lambda z: z[:, :3].mean(1),
        lambda z: z.amax(1),
        lambda z: z.mean(1),
    ],
    ids=["last", "first", "one each", "mean of some", "max", "mean"],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_that_classifies_tokens_pools_their_embeddings_as_its_answers(
    pool: Callable[[Tensor], Tensor], batch: int, training: bool
) -> None:
    torch.manual_seed(0)
    model, x = Tokens(pool), torch.randn(batch, 5, 6)
    expected = pool(model.body(x))
    headed = attach_head(model, "dense").train(training)
    for _ in range(2):
        torch.testing.assert_close(headed.features(x), expected)
    again = copy.deepcopy(headed)
    torch.testing.assert_close(again.features(x), expected)
    headed.features(x).sum().backward()
    assert model.body[0].weight.grad is not None


@pytest.mark.parametrize("last", [nn.Linear(6, 6), nn.BatchNorm1d(6)])
def test_a_layer_that_is_not_the_classifier_is_noticed(last: nn.Module) -> None:
    headed = attach_head(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), last), "dense", layer="1")
    with pytest.raises(AttachError, match=r"layer '1' is not the classifier.*candidates for layer=: "):
        headed(torch.randn(3, 6))


def test_a_failure_behind_the_wrong_layer_names_the_layer() -> None:
    headed = attach_head(mlp(), "dense", layer="1")
    with pytest.raises(AttachError, match=r"layer '1' is not the classifier.*'3' \(6 -> 4\)"):
        headed(samples()[0])


def test_a_layer_that_forward_never_calls_is_noticed() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)  # type: ignore[no-any-return]

    model, x = Unused(), samples()[0]
    headed = attach_head(model, "dense")
    with pytest.raises(AttachError, match=r"never calls it.*'fc' \(8 -> 4\)"):
        headed(x)
    headed = attach_head(detach_head(headed), "dense", layer="fc")  # the remedy in the message
    assert torch.equal(headed.features(x), x)


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), None, "no classifier to replace.*candidates for layer=: none"),
        (mlp(), "fc", r"no layer 'fc'; candidates for layer=: '3' \(6 -> 4\), '1' \(8 -> 6\)"),
        (mlp(), "2", "is a Tanh"),
        (nn.Linear(3, 2), None, "wrap it"),
        (nn.Sequential(nn.LazyLinear(3)), None, "run the model once"),
        ("resnet18", None, "not str"),
    ],
)
def test_models_that_cannot_carry_a_head(model: Any, layer: str | None, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        attach_head(model, "dense", layer=layer)


def test_a_mistake_leaves_the_model_as_it_was() -> None:
    model = mlp()
    with pytest.raises(UnknownNameError, match="did you mean 'nngk'"):
        attach_head(model, "nngkk")
    with pytest.raises(ConfigError, match="class_names"):
        attach_head(model, "knn", num_classes=4, class_names=["a"])
    with pytest.raises(ConfigError, match="takes 5 features, but the backbone gives 6"):
        attach_head(model, build_head("knn", 5, 4))
    assert isinstance(model[3], nn.Linear)
    with pytest.raises(AttachError, match="not Sequential"):
        detach_head(model)


def test_a_size_the_backbone_is_not_made_for() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 16, 3))
    headed = attach_head(model, "dense")
    assert headed(torch.randn(2, 1, 4, 4)).shape == (2, 3)
    with pytest.raises(ShapeError, match="takes 32 features, got 50"):
        headed(torch.randn(2, 1, 5, 5))


def fitted() -> tuple[HeadedModel, Tensor]:
    x, y = samples()
    headed = attach_head(mlp(), "nngk", k=5).eval()
    return headed.memorize(batches(x, y)), x


def test_copies_and_pickles_work_apart_from_the_original() -> None:
    headed, x = fitted()
    headed.backbone(x)  # leaves a tensor with a graph behind
    expected = headed(x)
    for other in (copy.deepcopy(headed), pickle.loads(pickle.dumps(headed))):
        assert torch.equal(other(x), expected)
        assert isinstance(detach_head(other)[3], nn.Linear)
        assert torch.equal(headed(x), expected)


def test_the_state_loads_into_a_fresh_model() -> None:
    headed, x = fitted()
    fresh = attach_head(nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), "nngk", k=5).eval()
    fresh.load_state_dict(headed.state_dict())
    assert torch.equal(fresh(x), headed(x))


def test_weights_of_a_network_whose_parts_are_named_as_ours(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(3, 4)
            self.classifier = nn.Sequential(nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.classifier(self.backbone(x))
            return out

    trained = Net()
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    headed = attach_head(Net(), "knn")
    load_weights(headed, tmp_path / "net.safetensors")
    assert torch.equal(headed.features(torch.ones(1, 3)), trained.backbone(torch.ones(1, 3)))


def test_autocast_and_inference_mode() -> None:
    headed, x = fitted()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert headed.features(x).shape == (40, 6)
        assert headed(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attach_head(mlp(nn.LogSoftmax(1)), "dense")(x).shape == (40, 4)


def test_compiled_features_are_the_same() -> None:
    headed, x = fitted()
    expected = [headed.features(batch) for batch in (x, x[:7], x + 1)]
    whole = torch.compile(headed.features, backend="eager", fullgraph=True)
    fresh = torch.compile(attach_head(mlp(), "dense").eval().features, backend="eager")  # checks on the way
    for compiled in (whole, fresh):
        for batch, z in zip((x, x[:7], x + 1), expected, strict=True):
            torch.testing.assert_close(compiled(batch), z)


def test_an_empty_batch_is_no_verdict_on_the_classifier() -> None:
    headed = attach_head(mlp(), "dense").eval()
    assert headed(torch.zeros(0, 8)).shape == (0, 4)


def test_a_backbone_by_name_is_remembered() -> None:
    headed = attach_head(build_backbone("convnet", 4, 1), "dense")
    assert headed.backbone_spec == {"name": "convnet", "num_classes": 4, "in_channels": 1}
    assert copy.deepcopy(headed).backbone_spec == headed.backbone_spec
    assert attach_head(mlp(), "dense").backbone_spec is None


def test_a_head_given_keeps_its_classes() -> None:
    head = build_head("knn", 6, 3)
    for wrong in ({"num_classes": 7}, {"class_names": list("abcd")}):
        with pytest.raises(ConfigError, match=r"the head given has 3 classes, not [74]"):
            attach_head(mlp(), head, **wrong)
    assert attach_head(mlp(), head, class_names=["a", "b", "c"]).head.num_classes == 3
