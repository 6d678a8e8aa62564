"""Training: what a user gives, what comes back, and what happens when it is cut short."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from nnheads.attach import attach_head
from nnheads.averaging import WeightAverage
from nnheads.data import BatchLoader, ImageSet, Preprocessing, with_ids
from nnheads.devices import autocast_for, cpu_bfloat16, multiplies_bfloat16, resolve_device, resolve_precision
from nnheads.errors import CheckpointError, ConfigError, DataError, ShapeError
from nnheads.headed import HeadedModel
from nnheads.heads import ImpostorHead, MemoryHead, list_heads
from nnheads.io import load, save
from nnheads.loaders import preprocessing_of
from nnheads.thumbnails import to_webp
from nnheads.training import Progress, embed, evaluate, fit

COUNT = 96


def blobs(count: int = COUNT, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around one center a class, far enough apart to be learned in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    return 2 * torch.eye(8)[y] + 0.2 * torch.randn(count, 8, generator=generator), y


def points() -> TensorDataset:
    return TensorDataset(*blobs())


def image_set(count: int = COUNT) -> ImageSet:
    """Grey images, a bright row a class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
    images[torch.arange(count), 0, 2 * y] += 180
    return ImageSet(images.to(torch.uint8), y, class_names=("a", "b", "c", "d"))


def model_for(head: str = "nngk", classes: int = 4, **options: Any) -> HeadedModel:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))
    return attach_head(network, head, **options)


def image_model(head: str = "nngk", **options: Any) -> HeadedModel:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return attach_head(nn.Sequential(stem, nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 4)), head, **options)


def quick(model: HeadedModel, data: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.05, "device": "cpu", "progress": False}
    return fit(model, data, **{**settings, "precision": "float32", **options})


def stored(model: HeadedModel) -> int:
    assert isinstance(model.head, MemoryHead)
    return len(model.head.memory)


# ---- it learns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", list_heads())
def test_every_head_learns_and_is_ready_to_answer(head: str) -> None:
    model = model_for(head, **({"k": 5} if "k" in model_for(head).head.config() else {}))
    history = quick(model, points(), epochs=4)
    assert not any(module.training for module in model.modules())
    assert [set(epoch) for epoch in history.epochs] == [{"loss", "seconds", "samples"}] * 4
    assert all(math.isfinite(epoch["loss"]) for epoch in history.epochs)
    assert history.gradient_samples == 4 * COUNT
    assert 0 <= history.refresh_seconds < history.seconds
    # The kernel neuron's sum is not normalized: its logits stay small where kernels are.
    least = 0.8 if head == "kernel" else 0.95
    assert evaluate(model, TensorDataset(*blobs(seed=1)), device="cpu").accuracy > least


@pytest.mark.parametrize("centers", ["tied", "fixed"])
def test_impostor_centers(centers: str) -> None:
    model = model_for("impostor", centers=centers, k=5)
    quick(model, points(), epochs=3)
    assert stored(model) == COUNT
    assert evaluate(model, points(), device="cpu", leave_one_out=True).accuracy > 0.9


def test_tied_centers_are_the_embeddings_at_the_end() -> None:
    model = model_for("nngk")
    quick(model, points())
    z, y, ids = embed(model, points(), device="cpu", precision="float32")
    assert isinstance(model.head, MemoryHead)
    rows = model.head.memory.rows_of(ids)
    torch.testing.assert_close(model.head.memory.keys[rows], z)
    assert torch.equal(model.head.memory.labels[rows], y)


def test_fixed_centers_are_the_embeddings_before_training() -> None:
    model = model_for("impostor", centers="fixed")
    z, _, ids = embed(model, points(), device="cpu", precision="float32")
    quick(model, points())
    assert isinstance(model.head, ImpostorHead)
    torch.testing.assert_close(model.head.memory.keys[model.head.memory.rows_of(ids)], z)


def test_no_epochs_only_fill_the_memory() -> None:
    model = model_for("knn")
    before = [p.clone() for p in model.parameters()]
    assert quick(model, points(), epochs=0).gradient_samples == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert stored(model) == COUNT


def test_new_classes_of_an_image_set_widen_the_head() -> None:
    model = image_model("nngk", num_classes=2)
    quick(model, image_set())
    assert model.head.num_classes == 4
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_training_goes_on_with_soft_labels_kept() -> None:
    model = model_for("nngk")
    quick(model, points())
    assert isinstance(model.head, MemoryHead)
    model.head.memory.relabel(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    quick(model, points(), epochs=1)
    assert stored(model) == COUNT
    assert model.head.memory.values_at(model.head.memory.rows_of(torch.tensor([0])))[0, 1] == 0.5


# ---- what data may be --------------------------------------------------------------------------------------------


class Pairs(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = blobs()
        return x[index], int(y[index])


def stack(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


@pytest.mark.parametrize(
    "data",
    [
        points(),
        with_ids(points()),
        DataLoader(points(), 16, shuffle=True),
        DataLoader(with_ids(points()), 16, shuffle=True),
        DataLoader(Pairs(), 16, shuffle=True, collate_fn=stack),
        DataLoader(Pairs(), 16, shuffle=True, num_workers=1, collate_fn=stack),
        DataLoader(points(), 16, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
        [(*blobs(), torch.arange(COUNT))],
    ],
    ids=["data set", "with ids", "loader", "loader with ids", "collate", "workers", "sampler", "list"],
)
def test_whatever_holds_samples_fills_the_memory_under_their_positions(data: Any) -> None:
    model = model_for("nngk")
    quick(model, data, epochs=1)
    assert isinstance(model.head, MemoryHead)
    held = model.head.memory
    assert sorted(held.ids[: len(held)].tolist()) == list(range(COUNT))
    assert torch.equal(held.labels[held.rows_of(torch.arange(COUNT))], blobs()[1])


def half(positions: range) -> list[DataLoader[Any]]:
    """Loaders over one data set that draw some of its samples."""
    drawn = SubsetRandomSampler(positions)
    batches: Sampler[list[int]] = BatchSampler(drawn, 16, drop_last=False)
    return [
        DataLoader(points(), 16, sampler=drawn),
        DataLoader(points(), batch_sampler=batches),
        DataLoader(points(), 16, sampler=list(positions)),
    ]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["sampler", "batch sampler", "list"])
def test_two_samplers_over_one_data_set_are_two_sets(kind: int) -> None:
    model = model_for("knn", k=1)
    training, held_out = half(range(60))[kind], half(range(60, COUNT))[kind]
    assert quick(model, training).gradient_samples == 120
    assert isinstance(model.head, MemoryHead)
    assert sorted(model.head.memory.ids[:60].tolist()) == list(range(60))
    assert stored(model) == 60
    assert embed(model, held_out, device="cpu")[2].tolist() == list(range(60, COUNT))
    assert embed(model, DataLoader(points(), 16), device="cpu")[2].tolist() == list(range(COUNT))


def test_learned_centers_of_a_frozen_backbone_stay_learned() -> None:
    model = model_for("kernel", track=False)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    model.backbone.eval()
    quick(model, points(), epochs=0)
    assert isinstance(model.head, MemoryHead)
    stored_at = model.head.memory.keys[:COUNT].clone()
    quick(model, points(), epochs=3)
    alphas, moved = model.head.memory.column("alpha")[:COUNT], model.head.memory.keys[:COUNT] - stored_at
    assert len(alphas.unique()) > 10  # not put back to 0 and 1
    assert moved.norm(dim=1).gt(0).any()


def test_image_sets_bring_what_a_model_has_to_know() -> None:
    model = image_model()
    quick(model, image_set(), epochs=6, augment="crop")
    assert model.class_names == ("a", "b", "c", "d")
    assert model.preprocessing == preprocessing_of(image_set())
    assert evaluate(model, image_set(), device="cpu", leave_one_out=True).accuracy > 0.9


def test_preprocessing_of_gives_mean_and_deviation() -> None:
    images = torch.randint(0, 256, (20, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = preprocessing_of(ImageSet(images, torch.zeros(20, dtype=torch.long)))
    assert (found.size, found.channels) == ((4, 5), 3)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(found.mean), scaled.mean((0, 2, 3)).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(found.std), scaled.std((0, 2, 3), correction=0).float(), atol=1e-4, rtol=0)


def test_a_batch_loader_and_a_loader_of_uint8_images() -> None:
    preprocessing = Preprocessing((8, 8), 1, (0.2,), (0.3,))
    for data in (BatchLoader(image_set(), preprocessing, 16, shuffle=True), DataLoader(image_set(), 16, shuffle=True)):
        model = image_model(preprocessing=preprocessing)
        quick(model, data)
        assert stored(model) == COUNT
        assert evaluate(model, data, device="cpu").accuracy > 0.5


def test_a_loader_that_cannot_have_ids() -> None:
    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(points())

    loader = DataLoader(Stream(), 16)
    assert quick(model_for("dense"), loader, schedule="constant").gradient_samples == 2 * COUNT
    with pytest.raises(DataError, match="needs their ids"):
        quick(model_for("nngk"), loader, schedule="constant")


def test_task_labels_are_not_taken_for_ids() -> None:
    x, y = blobs()
    with pytest.raises(DataError, match="not their task"):
        quick(model_for("nngk"), [(x, y, torch.zeros(COUNT, dtype=torch.long))])


def test_a_last_batch_of_one_sample_does_not_stop_batch_norm() -> None:
    model = image_model("impostor")
    quick(model, image_set(33))
    assert stored(model) == 33


# ---- the same seed, the same weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["impostor", "nca"])
def test_seeds(head: str) -> None:
    models = []
    for seed in (3, 3, 4):
        model = image_model(head)
        torch.rand(len(models))  # the caller's generator plays no part
        quick(model, image_set(), augment="crop", seed=seed)
        models.append(model.state_dict())
    first, same, other = models
    for name, tensor in first.items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(tensor, same[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first["backbone.1.weight"], other["backbone.1.weight"])


def test_the_callers_random_numbers_go_on() -> None:
    model = model_for("nngk")
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    quick(model, points())
    assert torch.equal(torch.rand(2), expected)


# ---- refreshes and averages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "options", "refresh", "passes"),
    [
        ("nngk", {}, "auto", 1),
        ("nngk", {"track": False}, "auto", 3),
        ("nngk", {}, 2, 3),
        ("nngk", {}, 0, 2),
        ("impostor", {}, "auto", 1),
        ("kernel", {}, "auto", 1),
        ("knn", {}, "auto", 1),
        ("dense", {}, "auto", 0),
    ],
)
def test_passes_over_the_data_for_the_memory(
    head: str, options: dict[str, Any], refresh: Any, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("refresh", "memorize"):
        original = vars(HeadedModel)[name]
        monkeypatch.setattr(
            HeadedModel,
            name,
            lambda self, loader, original=original, **how: calls.append(1) or original(self, loader, **how),
        )
    model = model_for(head, **options)
    quick(model, points(), epochs=6, refresh=refresh)
    assert len(calls) == passes


def test_the_average_is_the_recurrence_and_integers_are_copied() -> None:
    model = model_for("dense")
    model.backbone.register_buffer("index", torch.tensor([5, 7]))
    average = WeightAverage(model, 0.5)
    weight = model.backbone.get_parameter("0.weight")
    expected = torch.zeros_like(weight)
    for step in range(8):
        with torch.no_grad():
            weight.fill_(float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * step
    average.apply()
    torch.testing.assert_close(weight.detach(), expected)
    assert model.backbone.get_buffer("index").tolist() == [5, 7]


@pytest.mark.parametrize("head", ["dense", "impostor", "nngk"])
def test_the_averaged_model_is_what_is_left(head: str) -> None:
    plain, averaged = model_for(head), model_for(head)
    quick(plain, points())
    quick(averaged, points(), ema=0.9)
    assert not torch.equal(plain.backbone.get_parameter("0.weight"), averaged.backbone.get_parameter("0.weight"))
    assert evaluate(averaged, TensorDataset(*blobs(seed=1)), device="cpu").accuracy > 0.9
    if isinstance(averaged.head, MemoryHead):
        z, _, ids = embed(averaged, points(), device="cpu", precision="float32")
        torch.testing.assert_close(averaged.head.memory.keys[averaged.head.memory.rows_of(ids)], z)


def test_frozen_layers_keep_their_weights_and_statistics() -> None:
    model = model_for("dense")
    model.backbone.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    quick(model, points())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        quick(model, points())


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", list_heads())
def test_ctrl_c_leaves_a_model_that_loads_and_answers(head: str, tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)

    model, handler = image_model(head), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="saved to"):
        quick(model, image_set(), epochs=50, progress=press, checkpoint=tmp_path / "model", ema=0.9)
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    network = nn.Sequential(stem, nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 4))
    loaded = load(tmp_path / "model", network)
    answers = evaluate(loaded, image_set(), device="cpu")
    assert answers.accuracy > 0.3
    assert not model.training
    if isinstance(loaded.head, MemoryHead):
        assert len(loaded.head.memory) == COUNT


def test_training_outside_the_main_thread() -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(quick(model_for("dense"), points())))
    thread.start()
    thread.join()
    assert results[0].gradient_samples == 2 * COUNT


def test_the_checkpoint_at_the_end(tmp_path: Path) -> None:
    model = image_model("nngk")
    quick(model, image_set(), checkpoint=tmp_path / "model")
    loaded = load(tmp_path / "model", _plain_network())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(x), model(x))


def _plain_network() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return nn.Sequential(stem, nn.Linear(512, 16), nn.ReLU(), nn.Linear(16, 4))


# ---- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["dense", "nngk", "nca"])
def test_divergence_is_one_clear_error(head: str) -> None:
    with pytest.raises(
        ConfigError, match=r"diverged in epoch \d+, step \d+: .*; give a lower lr than 1e\+20"
    ) as caught:
        quick(model_for(head), points(), lr=1e20, schedule="constant")
    assert "\n" not in str(caught.value)


def test_nan_in_the_input_is_named_as_such() -> None:
    x, y = blobs()
    x[3, 0] = math.nan
    with pytest.raises(DataError, match="the input holds NaN"):
        quick(model_for("nngk"), TensorDataset(x, y))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"epochs": -1}, "epochs"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more"),
        ({"lr": 0}, "lr"),
        ({"lr": "0.1"}, "lr must be a number"),
        ({"weight_decay": math.nan}, "weight_decay must be a number"),
        ({"refresh": True}, "refresh"),
        ({"optimizer": "adam"}, "sgd, adamw"),
        ({"schedule": "cosine"}, "onecycle, constant"),
        ({"refresh": "often"}, "refresh"),
        ({"ema": 1.0}, "ema"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"device": "tpu"}, "unknown device"),
        ({"precision": "float8"}, "unknown precision"),
        ({"augment": "rotate"}, "augmentation"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        quick(model_for("dense"), points(), **options)


def test_what_is_no_headed_model_or_no_batch() -> None:
    for call in (fit, evaluate, embed):
        with pytest.raises(ConfigError, match=f"{call.__name__} takes what attach_head returns, not Sequential"):
            call(_plain_network(), image_set())  # type: ignore[operator]
    for data in (points(), image_set()):
        with pytest.raises(ConfigError, match="batch size must be at least 1"):
            evaluate(image_model("dense"), data, batch_size=0, device="cpu")


def test_what_cannot_be_augmented_is_told() -> None:
    with pytest.raises(ConfigError, match=r"augment= is for uint8 images, not torch\.float32"):
        quick(model_for("dense"), points(), augment="crop")


def test_labels_outside_the_classes() -> None:
    x, y = blobs()
    with pytest.raises(ShapeError, match="label 9 is outside the head's classes 0 to 3"):
        quick(model_for("nngk"), TensorDataset(x, torch.where(y == 3, 9, y)))


@pytest.mark.parametrize("head", ["dense", "knn", "nca", "nngk"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_dtype_are_the_same_labels(head: str, dtype: torch.dtype) -> None:
    x, y = blobs()
    long, other = (quick(model_for(head), TensorDataset(x, labels)) for labels in (y, y.to(dtype)))
    assert [epoch["loss"] for epoch in long.epochs] == [epoch["loss"] for epoch in other.epochs]
    model = model_for(head).eval()
    with torch.no_grad():
        assert float(model.loss(x, y.to(dtype))) == float(model.loss(x, y))


def test_samples_that_are_no_pairs_of_an_input_and_a_number_are_told() -> None:
    x, y = blobs()
    named: Any = [(sample, "abcd"[label]) for sample, label in zip(x, y.tolist(), strict=True)]
    as_dict: Any = [{"image": sample, "label": label} for sample, label in zip(x, y, strict=True)]
    for items, message in ((named, "labels must be numbers, not str"), (as_dict, r"yields dict, not \(x, y\)")):
        for use in (quick, lambda model, data: evaluate(model, data, device="cpu")):
            with pytest.raises(DataError, match=message):
                use(model_for("nngk"), Items(items))


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if self.items[index] is None:
            raise OSError("the disk is gone")
        return self.items[index]


def test_a_first_epoch_that_fails_leaves_compression_on() -> None:
    x, y = blobs(200)
    items: list[Any] = list(zip(x, y, strict=True))
    items[150] = None
    model = model_for("nngk", bytes_per_center=4)
    with pytest.raises(OSError, match="the disk is gone"):
        quick(model, Items(items), batch_size=16)
    assert isinstance(model.head, MemoryHead)
    before = len(model.head.memory)
    model.add(*blobs(2000, seed=1))
    keys = 4 * model.head.memory.dim * (before + 2000)
    assert model.head.bytes < keys, "keys are kept as they come"


def test_pictures_are_those_of_the_images_trained_on_last(tmp_path: Path) -> None:
    known = image_set()
    model = image_model("knn")
    fit(model, known, epochs=0, progress=False)
    model = load(save(model, tmp_path / "model", thumbnails=known), _plain_network())
    assert model.thumbnails is not None
    before = model.thumbnails.get(5)
    others = ImageSet(255 - known.images[:10], known.labels[:10], ids=known.ids[:10], class_names=known.class_names)
    fit(model, others, epochs=0, progress=False)
    assert model.thumbnails.get(5) == to_webp(others.images[5]) != before
    assert model.thumbnails.get(50) == to_webp(known.images[50])
    model.memorize([(model.preprocessing(known.images[:4]), known.labels[:4], known.ids[:4])])
    assert [i in model.thumbnails for i in range(6)] == [False] * 4 + [True] * 2


def test_no_samples() -> None:
    empty = TensorDataset(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
    for data in (DataLoader(empty, 4), image_set(0)):
        with pytest.raises(DataError, match="empty"):
            quick(model_for("dense"), data)
    with pytest.raises(DataError, match="empty"):
        evaluate(model_for("dense"), DataLoader(empty, 4), device="cpu")


def test_uint8_images_without_preprocessing() -> None:
    with pytest.raises(ConfigError, match="no preprocessing"):
        evaluate(image_model("dense"), image_set(), device="cpu")


# ---- evaluate, embed, devices ------------------------------------------------------------------------------------


def test_evaluation_measures_by_hand() -> None:
    model = model_for("dense")
    x, y = blobs(40)
    found = evaluate(model, DataLoader(TensorDataset(x, y), 7, shuffle=True), device="cpu", precision="float32")
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(found.log_probs, expected)
    assert torch.equal(found.labels, y)
    right = expected.argmax(1) == y
    assert found.accuracy == pytest.approx(float(right.double().mean()))
    assert found.log_loss == pytest.approx(float(-expected[torch.arange(40), y].double().mean()), rel=1e-5)
    confidence, gap = expected.exp().amax(1), 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap += float(inside.double().mean()) * abs(
                float(right[inside].double().mean()) - float(confidence[inside].double().mean())
            )
    assert found.ece == pytest.approx(gap, abs=1e-4)


def test_evaluating_classes_the_head_does_not_know() -> None:
    x, y = blobs()
    found = evaluate(model_for("dense"), TensorDataset(x, torch.where(y == 3, 9, y)), device="cpu")
    assert found.log_loss == math.inf
    assert found.accuracy < 1
    assert 0 <= found.ece <= 1


def test_evaluate_keeps_modes_and_leaves_samples_out_only_when_asked() -> None:
    model = model_for("knn", k=1)
    x, _ = blobs()
    data = TensorDataset(x, torch.randint(0, 4, (COUNT,), generator=torch.Generator().manual_seed(0)))
    quick(model, data, epochs=0)
    model.train()
    model.backbone[1].eval()
    assert evaluate(model, data, device="cpu").accuracy == 1
    assert evaluate(model, data, device="cpu", leave_one_out=True).accuracy < 0.6
    assert model.training
    assert not model.backbone[1].training


def test_embeddings_of_a_float64_model() -> None:
    z, _, ids = embed(model_for("dense").double(), points(), device="cpu")
    assert z.dtype == torch.float64
    assert torch.equal(ids, torch.arange(COUNT))


def test_devices_and_precision() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not on this machine"):
            resolve_device("cuda")
    cpu = torch.device("cpu")
    assert resolve_precision(cpu, "float32") == torch.float32
    a = torch.randn(4, 4)
    with autocast_for(cpu, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast_for(cpu, "float32"):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(("amx", "avx512"), [(True, True), (False, True), (False, False)])
def test_the_precision_of_a_processor(amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    cpu_bfloat16.cache_clear()
    try:
        multiplies = amx or avx512
        assert resolve_precision(torch.device("cpu")) == (torch.bfloat16 if multiplies else torch.float32)
        assert resolve_precision(torch.device("cpu"), "float32") == torch.float32
        assert multiplies_bfloat16(torch.device("cpu")) is multiplies
    finally:
        cpu_bfloat16.cache_clear()


def test_mixed_precision_trains_and_leaves_float32_weights_in_plain_order() -> None:
    model = image_model("nngk")
    quick(model, image_set(), epochs=6, precision="bfloat16")
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    assert evaluate(model, image_set(), device="cpu", precision="bfloat16").accuracy > 0.9


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Progress] = []
    quick(model_for("dense"), points(), progress=seen.append)
    assert [(p.epoch, p.step) for p in seen] == [(e, s) for e in range(2) for s in range(1, 7)]
    assert all(p.steps == 6 and math.isfinite(p.loss) and p.samples_per_second > 0 for p in seen)
    assert capsys.readouterr().err == ""
    quick(model_for("dense"), points(), progress=True)  # no terminal here
    assert capsys.readouterr().err.count("epoch ") == 2


@pytest.mark.gpu
@pytest.mark.parametrize("head", list_heads())
def test_on_a_gpu(head: str) -> None:
    model = image_model(head)
    fit(model, image_set(), epochs=6, batch_size=16, lr=0.05, augment="crop", device="cuda", progress=False, ema=0.9)
    assert model.device.type == "cuda"
    assert evaluate(model, image_set()).accuracy > 0.8


def test_one_class_has_a_calibration_error() -> None:
    x, _ = blobs(20)
    model = attach_head(model_for("dense"), "knn", num_classes=1)
    model.add(x, torch.zeros(20, dtype=torch.long))
    found = evaluate(model, TensorDataset(x, torch.zeros(20, dtype=torch.long)), device="cpu")
    assert found.ece == pytest.approx(0, abs=1e-6)


def test_a_sampler_over_an_array_of_positions_is_that_part() -> None:
    half = np.random.default_rng(0).permutation(COUNT)[:40]
    loader = DataLoader(points(), 16, sampler=SubsetRandomSampler(half))
    model = model_for("knn")
    quick(model, loader)
    assert sorted(model.head.memory.ids[: stored(model)].tolist()) == sorted(half.tolist())
    assert len(evaluate(model, loader, device="cpu").labels) == 40


@pytest.mark.parametrize("head", ["dense", "nngk"])
def test_a_column_of_labels_is_labels(head: str) -> None:
    x, y = blobs()
    plain, column = model_for(head), model_for(head)
    quick(plain, TensorDataset(x, y), epochs=1)
    quick(column, TensorDataset(x, y[:, None]), epochs=1)
    expected = evaluate(plain, TensorDataset(x, y), device="cpu")
    found = evaluate(column, TensorDataset(x, y[:, None]), device="cpu")
    assert torch.equal(found.log_probs, expected.log_probs)
    assert found.accuracy == expected.accuracy
    with pytest.raises(ShapeError, match=r"labels of shape \(96, 1\) must be \(96,\): give y\.squeeze\(1\)"):
        plain.loss(x, y[:, None])


def test_what_is_no_class_cannot_be_evaluated() -> None:
    x, y = blobs()
    model = model_for("dense")
    with pytest.raises(DataError, match=r"labels must be whole numbers .* \(96, 4\); of soft labels take y\.argmax"):
        evaluate(model, TensorDataset(x, torch.eye(4)[y]), device="cpu")
    with pytest.raises(DataError, match="label -1 is no class"):
        evaluate(model, TensorDataset(x, y - 1), device="cpu")


def test_classes_are_named_alike_in_images_and_model() -> None:
    model, images = image_model("knn"), image_set()
    quick(model, images)
    turned = ImageSet(images.images, 3 - images.labels, class_names=("d", "c", "b", "a"))
    for use in (quick, evaluate, embed):
        with pytest.raises(DataError, match=r"class 0 is 'd' in the images and 'a' in the model: .*relabeled"):
            use(model, turned) if use is quick else use(model, turned, device="cpu")
    same = turned.relabeled(model.class_names or ())
    assert torch.equal(same.labels, images.labels)
    assert evaluate(model, same, device="cpu").accuracy == evaluate(model, images, device="cpu").accuracy
    with pytest.raises(DataError, match="there is no class d among the 3 given"):
        turned.relabeled(("a", "b", "c"))
    numbered = ImageSet(images.images, images.labels)  # no names to compare
    assert evaluate(model, numbered, device="cpu").accuracy == evaluate(model, images, device="cpu").accuracy


def test_new_classes_of_an_image_set_bring_their_names() -> None:
    model, images = image_model("knn"), image_set()
    few = images.subset(images.labels < 2)
    quick(model, ImageSet(few.images, few.labels, class_names=("a", "b")))
    assert model.class_names == ("a", "b")
    quick(model, images)
    assert model.class_names == ("a", "b", "c", "d")


def test_ids_that_name_several_samples_are_told() -> None:
    images = image_set()
    both = ConcatDataset([images, ImageSet(images.images, (images.labels + 1) % 4)])
    model = image_model("nngk", preprocessing=preprocessing_of(images))
    with pytest.raises(DataError, match=r"id \d+ comes with several labels: .*nnheads\.with_ids"):
        quick(model, both)
    tasks = [(x, y, y // 2) for x, y in points()]
    with pytest.raises(DataError, match="comes with several labels"):
        quick(model_for("knn"), DataLoader(tasks, 16, shuffle=True))  # type: ignore[arg-type]
    quick(model_for("dense"), DataLoader(tasks, 16, shuffle=True))  # type: ignore[arg-type]


def test_samples_judged_without_themselves_need_ids() -> None:
    x, y = blobs()
    batches = [(x[:48], y[:48]), (x[48:], y[48:])]
    model = model_for("knn", k=1)
    model.eval().memorize(batches)
    with pytest.raises(DataError, match="needs their ids"):
        evaluate(model, batches, device="cpu", leave_one_out=True)
    with_own = [(a, b, torch.arange(48) + 48 * n) for n, (a, b) in enumerate(batches)]
    alone = evaluate(model, with_own, device="cpu", leave_one_out=True)
    assert alone.accuracy == evaluate(model, TensorDataset(x, y), device="cpu", leave_one_out=True).accuracy


def test_a_checkpoint_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder, reason in ((tmp_path, "something that is not a saved model"), (tmp_path / "notes.txt" / "x", "cannot")):
        steps: list[Progress] = []
        with pytest.raises(CheckpointError, match=reason):
            quick(model_for("dense"), points(), checkpoint=folder, progress=steps.append)
        assert not steps
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_augmentation_of_a_batch_loader_is_its_own() -> None:
    images = image_set()
    with pytest.raises(ConfigError, match=r"augment='crop' .*give it to the BatchLoader"):
        quick(image_model("dense"), BatchLoader(images, preprocessing_of(images), 16), augment="crop")


def test_numbers_of_numpy_are_numbers() -> None:
    losses = [
        quick(model_for("nngk", track=False), points(), epochs=6, refresh=refresh).epochs[-1]["loss"]
        for refresh in (2, np.int64(2), "auto")
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_list_of_samples_is_told_for_what_it_is() -> None:
    samples = list(points())
    for use in (lambda m: quick(m, samples), lambda m: evaluate(m, samples, device="cpu")):
        with pytest.raises(DataError, match="list yields single samples, not batches"):
            use(model_for("dense"))


def test_a_data_set_of_batches() -> None:
    x, y = blobs()

    class Ready(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
            if not 0 <= at < 6:
                raise IndexError
            return x[16 * at : 16 * at + 16], y[16 * at : 16 * at + 16]

    loader = DataLoader(Ready(), batch_size=None)
    model = model_for("dense")
    quick(model, loader)
    found = evaluate(model, loader, device="cpu")
    assert torch.equal(found.labels, y)
    assert found.accuracy == evaluate(model, points(), device="cpu").accuracy
