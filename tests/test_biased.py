"""The gated biased network: cutting a backbone in two, conditional compute, the gate, saving, explaining."""

from __future__ import annotations

import copy
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nnheads
from nnheads.analysis import analyze, default_layers, layer_embeddings
from nnheads.classifier_layer import find_classifiers
from nnheads.errors import AttachError, CheckpointError, ConfigError
from nnheads.gating import count_flops, sweep_threshold
from nnheads.headed import HeadedModel
from nnheads.heads import BiasedHead
from nnheads.heads.gate import Verdicts, held_out, per_class_rank
from nnheads.heads.projectors import build_projector
from nnheads.split import Split
from nnheads.training import fit_gate

CLASSES, PER_CLASS = 3, 40


def images(seed: int, per_class: int = PER_CLASS) -> tuple[Tensor, Tensor]:
    """Grey 8x8 images, one bright spot a class; every fifth one is nearly noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(per_class * CLASSES) % CLASSES
    x = 0.3 * torch.randn(len(y), 1, 8, 8, generator=generator)
    strength = torch.where(torch.arange(len(y)) % 5 == 0, 0.4, 2.0)
    for row, (label, bright) in enumerate(zip(y.tolist(), strength.tolist(), strict=True)):
        x[row, 0, 2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += bright
    return x, y


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nnheads.build_backbone("convnet", CLASSES, in_channels=1, width=4)


def data(seed: int = 0) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(*images(seed))


def biased(at: str = "bn1", **options: Any) -> HeadedModel:
    options = {"dim": 8, "k": 5, "per_class": 20, "gate_epochs": 2, "tolerance": 0.03, **options}
    return nnheads.attach_head(network(), "biased", at=at, example=images(9)[0][:2], **options)


def trained(**options: Any) -> HeadedModel:
    model = biased(**options)
    nnheads.fit(
        model,
        data(),
        epochs=4,
        batch_size=24,
        optimizer="adamw",
        lr=0.01,
        device="cpu",
        precision="float32",
        progress=False,
        weight_decay=0,
    )
    return model


@pytest.fixture(scope="module")
def fitted() -> HeadedModel:
    return trained()


def head_of(model: HeadedModel) -> BiasedHead:
    assert isinstance(model.head, BiasedHead)
    return model.head


# ---- cutting -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A network whose forward no fx tracer follows: it decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.top = nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8, CLASSES)
        self.by_value = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.stem(x)
        out = F.relu(out + self.block(out))
        if self.by_value and out.sum() > 0:
            out = out * 2
        logits: Tensor = self.fc(self.top(out).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [
        ("resnet9", "layer1", 16),
        ("resnet9", "residual1", 16),
        ("slim_resnet18", "layer2", 16),
        ("torchvision:squeezenet1_1", "features.5", 64),
        ("torchvision:mobilenet_v3_small", "features.4", 32),
    ],
)
@pytest.mark.parametrize("mode", [True, False])
def test_the_two_parts_compute_what_the_whole_does(name: str, at: str, size: int, mode: bool) -> None:
    model = nnheads.build_backbone(name, 10).train(mode)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    (entry,) = find_classifiers(model)
    entry.install()
    x = torch.randn(3, 3, size, size)
    model(x)
    whole = entry.tap.take()
    first, second = Split(model, at).parts(model)
    second(first(x))
    parts = entry.tap.take()
    assert whole is not None
    assert parts is not None
    assert torch.allclose(whole, parts, atol=1e-6)


def test_the_cut_comes_behind_pooling_and_the_sum_of_a_residual_connection() -> None:
    model = biased_of(Residual(), "block")
    h = model.eval().first_part(torch.randn(2, 1, 8, 8))
    assert bool((h >= 0).all())  # behind the ReLU
    pooled = nnheads.attach_head(nnheads.build_backbone("resnet9", 10), "biased", at="layer1")
    assert pooled.eval().first_part(torch.randn(2, 3, 32, 32)).shape == (2, 64, 16, 16)


def biased_of(model: Any, at: str | None, **options: Any) -> HeadedModel:
    return nnheads.attach_head(model, "biased", at=at, example=torch.randn(2, 1, 8, 8), dim=4, **options)


def test_what_cannot_be_traced_says_so_and_its_parts_work() -> None:
    model = Residual()
    model.by_value = True
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(AttachError, match=r"'block'.*cannot be traced.*attach_head\(\(f1, f2\), 'biased'\)") as caught:
        biased_of(model, "block")
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == before
    f1 = nn.Sequential(model.stem, nn.ReLU())
    f2 = nn.Sequential(model.top, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    headed = biased_of((f1, f2), None, per_class=5)
    x, y = images(0)
    headed.memorize([(x, y, torch.arange(len(y)))])
    assert torch.allclose(headed(x), headed.head(headed.features(x)), atol=1e-5)
    restored = nnheads.detach_head(headed)
    assert restored.get_submodule("f2.3") is model.fc


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("layer9", "no module 'layer9'"),
        ("linear", "is the classifier"),
        ("conv2.0", "no module"),
    ],
)
def test_wrong_places_are_named(at: str, message: str) -> None:
    model = network()
    with pytest.raises(AttachError, match=message):
        nnheads.attach_head(model, "biased", at=at)
    assert isinstance(model.get_submodule("linear"), nn.Linear)


def test_a_place_inside_a_residual_connection_is_refused() -> None:
    with pytest.raises(AttachError, match=r"read again behind it"):
        nnheads.attach_head(nnheads.build_backbone("resnet9", 10), "biased", at="residual1.0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "aux"}, "GoogLeNet"),
        ({"projector": "big"}, "projector must be"),
        ({"projector": nn.Identity()}, r"\(B, dim\)"),
        ({"dim": 0}, "dim must be"),
        ({"threshold": "low"}, "threshold must be"),
        ({"holdout": 1.0}, "holdout must be"),
        ({"tolerance": -1}, "tolerance must be"),
    ],
)
def test_wrong_options_change_nothing(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=message):
        nnheads.attach_head(model, "biased", at="bn1", **options)
    assert isinstance(model.get_submodule("linear"), nn.Linear)


def test_other_heads_are_not_cut() -> None:
    with pytest.raises(ConfigError, match="for the head 'biased'"):
        nnheads.attach_head(network(), "knn", at="bn1")
    with pytest.raises(ConfigError, match="needs a place"):
        nnheads.attach_head(network(), "biased", projector="pooled")


def test_auxiliary_classifiers_become_projectors() -> None:
    google = nnheads.build_backbone("torchvision:googlenet", 4, aux_logits=True)
    model = nnheads.attach_head(google, "biased", projector="aux", example=torch.randn(2, 3, 64, 64))
    head = head_of(model)
    assert (model.at, head.projected, head.in_features) == ("inception4a", 1024, 2048)
    assert isinstance(head.projector, nn.Module)
    own = google.get_submodule("aux1.fc1.weight".rpartition(".")[0])
    assert torch.equal(head.projector.get_submodule("fc1").weight, own.weight)  # type: ignore[arg-type]
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 4)


# ---- conditional compute -----------------------------------------------------------------------------------------


class Counter:
    """How many rows entered a module."""

    def __init__(self, module: nn.Module) -> None:
        self.rows = 0
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        self.rows += len(given[0])


def test_rows_above_the_threshold_never_enter_the_second_part(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted)
    head = head_of(model)
    x, _ = images(3)
    gate = model.gated(x).gate.detach()
    entered, projected = Counter(model.backbone.get_submodule("conv2")), Counter(model.backbone.get_submodule("conv1"))
    for share in (0.0, 0.3, 1.0):
        head.gate.threshold.fill_(float(gate.quantile(1 - share)) if 0 < share < 1 else (math.inf, 0.0)[round(share)])
        entered.rows = projected.rows = 0
        found = model.gated(x)
        assert torch.equal(found.skipped, gate >= head.gate.threshold)
        assert entered.rows == int((~found.skipped).sum())
        assert projected.rows == len(x)
        assert torch.equal(model(x), found.log_probs)
        assert torch.allclose(head(model.features(x)), found.log_probs, atol=1e-5)
    assert int(model.gated(x).skipped.sum()) == len(x)


def test_rows_do_not_depend_on_their_batch(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted)
    x, _ = images(4)
    head_of(model).gate.threshold.fill_(float(model.gated(x).gate.detach().median()))
    whole = model(x)
    assert torch.allclose(torch.cat([model(part) for part in x.split(7)]), whole, atol=1e-5)


def test_what_skips_is_the_regression_and_what_does_not_the_mixture(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted)
    head = head_of(model)
    x, _ = images(5)
    why = model.explain(x)
    z1 = torch.einsum("bk,bkd->bd", why.weights, head.memory.column("z")[why.rows])
    g = model.gated(x).gate
    head.gate.threshold.fill_(0.0)
    expected = head.classifier.layer(z1).log_softmax(-1)
    assert torch.allclose(why.weights.sum(1), torch.ones(len(x)), atol=1e-5)
    assert torch.allclose(model(x), expected, atol=1e-5)
    head.gate.threshold.fill_(math.inf)
    z2 = model.second_part(model.first_part(x))
    mixed = g.unsqueeze(1) * z1 + (1 - g.unsqueeze(1)) * z2
    assert torch.allclose(model(x), head.classifier.layer(mixed).log_softmax(-1), atol=1e-5)


# ---- training ----------------------------------------------------------------------------------------------------


def test_it_learns_and_the_gate_keeps_its_tolerance(fitted: HeadedModel) -> None:
    found = nnheads.sweep_threshold(fitted, data(7), timed_batches=0)
    assert found.network_accuracy > 0.8
    own = next(p for p in found.points if p.threshold == float(head_of(fitted).gate.threshold))
    assert own.accuracy > found.network_accuracy - 0.05
    assert own.skipped > 0.2
    g = fitted.gated(images(7)[0]).gate
    noise = fitted.gated(3 * torch.randn(64, 1, 8, 8)).gate
    assert g.mean().item() > noise.mean().item()


def test_fit_gate_leaves_the_network_as_it_was() -> None:
    plain = nnheads.attach_head(network(), "dense")
    nnheads.fit(plain, data(), epochs=3, batch_size=24, optimizer="adamw", lr=0.01, device="cpu", progress=False)
    x, _ = images(2)
    before = plain(x)
    weights = {name: t.clone() for name, t in plain.backbone.state_dict().items()}
    model = nnheads.attach_head(plain, "biased", at="bn1", example=x[:2], dim=8, k=5, tolerance=0.05)
    assert model is plain
    head = head_of(model)
    z2 = model.eval().second_part(model.first_part(x))
    assert torch.allclose(head.classifier.layer(z2).log_softmax(-1), before, atol=1e-5)
    classifier = head.classifier.layer.weight.clone()
    history = fit_gate(model, data(), epochs=2, batch_size=24, calibration=data(8), device="cpu", progress=False)
    assert len(history.epochs) == 2
    assert history.epochs[1]["loss"] < history.epochs[0]["loss"]
    assert all(torch.equal(t, weights[name]) for name, t in model.backbone.state_dict().items())
    assert torch.equal(head.classifier.layer.weight, classifier)
    assert all(p.requires_grad for p in model.parameters())
    assert math.isfinite(float(head.gate.threshold))
    same = {name: t.clone() for name, t in head.state_dict().items()}
    fit_gate(model, data(), epochs=0, calibration=data(8), device="cpu", progress=False)
    assert all(torch.equal(t, same[name]) for name, t in head.state_dict().items() if name.startswith("projector"))


def test_the_projector_does_not_teach_the_backbone() -> None:
    model = biased().train()
    x, y = images(0)
    z = model.features(x)
    assert z.shape == (len(x), 8 + 16)
    z[:, :8].sum().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.backbone.parameters())
    projector = head_of(model).projector
    assert projector is not None
    assert any(bool(p.grad.any()) for p in projector.parameters() if p.grad is not None)
    model.loss(x, y, ids=torch.arange(len(y))).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_threshold_is_the_lowest_within_the_tolerance() -> None:
    gate = torch.linspace(0.9, 0, 1000)
    network_right = torch.ones(1000, dtype=torch.bool)
    first = torch.ones(1000, dtype=torch.bool)
    first[200:300], first[500:] = False, False
    found = Verdicts(gate, first, network_right, network_right)
    for tolerance, skipped in ((0.0, 200), (0.11, 500), (0.2, 587), (1.0, 1000)):
        head = BiasedHead(4, 2, tolerance=tolerance)
        head.gate.choose({1.0: found})
        assert int((gate >= head.gate.threshold).sum()) == skipped
    head = BiasedHead(4, 2, tolerance=0.0)
    head.gate.choose({2.0: Verdicts(torch.full((1000,), 0.5), first, network_right, network_right)})
    assert float(head.gate.threshold) == math.inf  # all skip or none


def test_samples_held_out_are_the_same_whatever_the_order() -> None:
    ids = torch.arange(10_000).unsqueeze(1)
    out = held_out(ids, len(ids), 0.1)
    assert 0.08 < float(out.float().mean()) < 0.12
    assert torch.equal(held_out(ids.flip(0), len(ids), 0.1).flip(0), out)
    assert not held_out(None, 5, 0.5).any()
    labels = ids.squeeze(1) % 3
    rank = per_class_rank(labels, ids.squeeze(1))
    assert not bool((out & (rank < 100)).any())
    assert [int(((rank < 100) & (labels == c)).sum()) for c in range(3)] == [100] * 3


# ---- memory ------------------------------------------------------------------------------------------------------


def test_centers_are_balanced_and_can_be_dropped_and_added(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted)
    head = head_of(model)
    assert torch.bincount(head.memory.labels[: len(head.memory)]).tolist() == [20] * CLASSES
    ids = head.memory.ids[head.memory.labels == 2].clone()
    vectors = head.memory.column("z")[head.memory.rows_of(ids)].flatten()
    head.drop(ids)
    x, y = images(6)
    assert not bool((model(x).argmax(1) == 2).any())
    for part in head.state_dict().values():
        assert not part.is_floating_point() or not bool(torch.isin(part, vectors[vectors != 0]).any())
    model.memorize([(x, y, torch.arange(len(y)) + 1000)])
    assert bool((model(x).argmax(1) == 2).any())


def test_a_class_that_the_classifier_never_saw_is_answered_at_once(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted)
    x = torch.zeros(12, 1, 8, 8) + 0.3 * torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0, :, 7] += 4
    new = head_of(model).add(model.features(x[:6]), torch.full((6,), CLASSES))
    assert (model(x).argmax(1) == CLASSES).float().mean() > 0.9
    seen, y = images(6)
    assert float((model(seen).argmax(1) == y).float().mean()) > 0.75
    head_of(model).drop(new)
    assert not bool((model(x).argmax(1) == CLASSES).any())


# ---- looked at layer by layer ------------------------------------------------------------------------------------


def test_layers_see_every_sample_whatever_the_gate_lets_skip(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted).eval()
    head_of(model).gate.threshold.fill_(float(model.gated(images(6)[0]).gate.detach().median()))
    x, y = images(6)
    assert 0 < int(model.gated(x).skipped.sum()) < len(x)
    few = torch.utils.data.TensorDataset(x, y)
    found = layer_embeddings(model, few, device="cpu")
    assert list(found) == [*default_layers(model), "output"]
    assert all(len(rows) == len(x) for rows in found.values())
    assert torch.allclose(found["output"], model(x), atol=1e-5)
    assert torch.allclose(found["linear"], model.features(x)[:, 8:], atol=1e-5)
    report = analyze(model, few, few, kinds=("knn",), device="cpu")
    assert report["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


def test_so_do_layers_that_the_cut_goes_through() -> None:
    model = nnheads.attach_head(nnheads.build_backbone("slim_resnet18", 10), "biased", at="layer2.0").eval()
    few = torch.utils.data.TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6))
    found = layer_embeddings(model, few, ["layer2", "layer4.1"], device="cpu")
    assert all(entry.tap.seen is None for entry in model.attached())
    whole = layer_embeddings(model.backbone, few, ["layer2", "layer4.1"], device="cpu")
    for name in ("layer2", "layer4.1"):
        assert torch.allclose(found[name], whole[name], atol=1e-5)


# ---- saving, copying, swapping ------------------------------------------------------------------------------------


def test_saved_and_loaded_it_answers_the_same(fitted: HeadedModel, tmp_path: Path) -> None:
    x, _ = images(6)
    nnheads.save(fitted, tmp_path / "model")
    loaded = nnheads.load(tmp_path / "model")
    assert (loaded.at, loaded.head.config()) == ("bn1", fitted.head.config())
    assert torch.equal(loaded(x), fitted(x))
    assert torch.equal(loaded.gated(x).skipped, fitted.gated(x).skipped)
    assert torch.equal(loaded.explain(x).ids, fitted.explain(x).ids)
    twin = copy.deepcopy(fitted)
    assert torch.equal(twin(x), fitted(x))
    for p in twin.backbone.parameters():
        p.data.zero_()
    assert not torch.equal(twin(x), fitted(x))
    precise = copy.deepcopy(fitted).double()
    assert torch.allclose(precise(x.double()).float(), fitted(x), atol=1e-3)


class Own(nn.Module):
    """A projector of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.layer(h.mean((2, 3)))
        return out


def test_a_projector_of_the_users_own_is_saved_and_given_back(tmp_path: Path) -> None:
    model = nnheads.attach_head(network(), "biased", at="bn1", projector=Own(), k=5).eval()
    assert head_of(model).projected == 6
    x, y = images(0)
    model.memorize([(x, y, torch.arange(len(y)))])
    nnheads.save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="projector=your_module"):
        nnheads.load(tmp_path / "model")
    assert torch.equal(nnheads.load(tmp_path / "model", projector=Own())(x), model(x))


def test_detaching_and_swapping_restore(fitted: HeadedModel) -> None:
    x, _ = images(6)
    plain = network()
    before = plain.eval()(x)
    keys = list(plain.state_dict())
    model = nnheads.attach_head(plain, "biased", at="bn1")
    assert nnheads.attach_head(model, "knn").at is None
    nnheads.attach_head(model, "biased", at="bn2")
    assert nnheads.detach_head(model) is plain
    assert list(plain.state_dict()) == keys
    assert torch.equal(plain(x), before)


def test_without_a_cut_it_is_a_head_like_others() -> None:
    model = nnheads.attach_head(network(), "biased", k=5)
    nnheads.fit(model, data(), epochs=8, batch_size=24, optimizer="adamw", lr=0.01, device="cpu", progress=False)
    assert model.at is None
    assert nnheads.evaluate(model, data(5), device="cpu").accuracy > 0.7
    for call in (fit_gate, sweep_threshold):
        with pytest.raises(ConfigError, match=r"attach_head\(model, 'biased', at=\.\.\.\)"):
            call(model, data(), device="cpu")


# ---- looking -----------------------------------------------------------------------------------------------------


def test_the_sweep_goes_from_nothing_skipped_to_everything(fitted: HeadedModel) -> None:
    model = copy.deepcopy(fitted)
    before = float(head_of(model).gate.threshold)
    found = sweep_threshold(model, data(7), batch_size=32, timed_batches=1, rounds=1, device="cpu")
    assert [p.skipped for p in found.points] == sorted(p.skipped for p in found.points)
    assert (found.points[0].skipped, found.points[-1].skipped) == (0.0, 1.0)
    assert all(p.ms_per_sample is not None and p.ms_per_sample > 0 for p in found.points)
    assert found.network_ms_per_sample is not None
    assert float(head_of(model).gate.threshold) == before
    for point in found.points[::4]:
        head_of(model).gate.threshold.fill_(point.threshold)
        assert nnheads.evaluate(model, data(7), device="cpu").accuracy == pytest.approx(point.accuracy, abs=0.02)


def test_flops_of_the_parts() -> None:
    model = nnheads.attach_head(nnheads.build_backbone("resnet9", 10), "biased", at="layer1")
    found = count_flops(model, torch.randn(2, 3, 32, 32))
    stem = 2 * 32 * 32 * 9 * (3 * 32 + 32 * 64)
    assert found.first == stem
    assert found.second > 3 * found.first
    assert found.projector < 0.1 * (found.first + found.second)


@pytest.mark.parametrize("shape", [(6, 17, 17), (3, 40, 24), (8, 1, 1), (5, 9), (7,)])
def test_the_pooled_projector_answers_alike_in_any_memory_format(shape: tuple[int, ...]) -> None:
    projector = build_projector({"kind": "pooled", "shape": shape, "dim": 5})
    assert projector is not None
    projector.eval()
    h = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    found = projector(h)
    assert found.shape == (4, 5)
    if h.dim() == 4:
        torch.testing.assert_close(projector(h.to(memory_format=torch.channels_last)), found, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(projector(h[2:3]), found[2:3], atol=1e-5, rtol=1e-4)
    assert projector(h[:0]).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_to_another_precision_answers_alike(fitted: HeadedModel, dtype: torch.dtype) -> None:
    x, y = images(5)
    cast = copy.deepcopy(fitted).to(dtype).eval()
    expected = fitted.eval()(x)
    answer = cast(x.to(dtype))
    assert (answer.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    new = cast.add(x[:3].to(dtype), y[:3])
    cast.drop(new)
    torch.testing.assert_close(cast(x.to(dtype)), answer)
    assert cast.explain(x[:2].to(dtype)).probabilities.isfinite().all()


def test_a_threshold_that_is_given_is_not_chosen() -> None:
    model = biased(threshold=0.5)
    with pytest.raises(ConfigError, match="calibration= is to choose the threshold, which the head was given"):
        fit_gate(model, data(), epochs=1, calibration=data(8), device="cpu", progress=False)


def test_a_gate_s_training_that_is_interrupted_leaves_a_checkpoint(tmp_path: Path) -> None:
    def stop(progress: nnheads.training.Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    model = trained(gate_epochs=0)
    with pytest.raises(KeyboardInterrupt):
        fit_gate(model, data(), epochs=2, batch_size=24, device="cpu", progress=stop, checkpoint=tmp_path / "kept")
    again = nnheads.load(tmp_path / "kept", network())
    x = images(5)[0]
    assert torch.equal(again.eval()(x), model.eval()(x))
