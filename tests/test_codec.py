"""Exemplars compressed into rows of a fixed size, on crops of the photographs that scikit-learn ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from nnheads.benchmarks.compare_streams import compare_streams
from nnheads.benchmarks.config import RunConfig
from nnheads.benchmarks.run_setup import load_stream
from nnheads.benchmarks.runner import run
from nnheads.benchmarks.specs import stream_spec
from nnheads.benchmarks.stream_comparison import StreamComparison
from nnheads.benchmarks.variants import variants
from nnheads.data import BatchLoader, ImageSet, Preprocessing, no_augmentation
from nnheads.errors import ConfigError
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.codec import WebPCodec
from nnheads.strategies.registry import strategy_spec
from nnheads.strategies.replay_loader import ReplayLoader

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """(40, 3, 32, 32) uint8."""
    picture = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[:, ::4, ::4]
    parts = picture.unfold(1, 32, 16).unfold(2, 32, 16)
    return parts.permute(1, 2, 0, 3, 4).reshape(-1, *SHAPE)[:40].contiguous()


def noise_ratio(images: Tensor, decoded: Tensor) -> float:
    """Median peak signal-to-noise ratio in dB."""
    error = (images.double() - decoded.double()).square().mean((1, 2, 3)).clamp_min(1e-3)
    return float((10 * (255**2 / error).log10()).median())


def test_images_come_back_nearly_as_they_were_and_better_from_larger_rows(crops: Tensor) -> None:
    ratios = []
    for row_bytes in (256, 512, 1024):
        codec = WebPCodec(SHAPE, row_bytes)
        rows = codec.encode(crops)
        assert rows.shape == (len(crops), row_bytes)
        assert rows.dtype == torch.uint8
        decoded = codec.decode(rows)
        assert decoded.shape == crops.shape
        assert decoded.dtype == torch.uint8
        ratios.append(noise_ratio(crops, decoded))
    assert ratios[0] > 25
    assert ratios == sorted(ratios)


def test_grey_images(crops: Tensor) -> None:
    grey = crops[:, :1]
    codec = WebPCodec((1, 32, 32), 256)
    assert noise_ratio(grey, codec.decode(codec.encode(grey))) > 25


def test_an_easy_image_takes_a_better_quality_than_a_hard_one_before_it(crops: Tensor) -> None:
    flat = torch.full((1, *SHAPE), 100, dtype=torch.uint8)
    noisy = torch.randint(60, 140, (1, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone, after = WebPCodec(SHAPE, 512), WebPCodec(SHAPE, 512)
    after.encode(noisy)
    assert torch.equal(alone.encode(crops[:1]), after.encode(crops[:1]))
    assert noise_ratio(flat, after.decode(after.encode(flat))) > 40


def test_an_image_that_cannot_fit_is_told_with_a_size_that_would_do() -> None:
    noise = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"does not fit 128 bytes .* give exemplar_bytes above \d+"):
        WebPCodec((3, 64, 64), 128).encode(noise)


@pytest.mark.parametrize(("shape", "row_bytes"), [(SHAPE, 64), (SHAPE, 3072), ((1, 8, 8), 32), ((4, 32, 32), 512)])
def test_sizes_that_make_no_sense_are_refused(shape: tuple[int, int, int], row_bytes: int) -> None:
    with pytest.raises(ConfigError, match="exemplar_bytes"):
        WebPCodec(shape, row_bytes)


def test_a_buffer_of_compressed_images_counts_their_bytes_and_gives_them_back(crops: Tensor) -> None:
    data = ImageSet(crops, torch.arange(len(crops)) % 4, torch.arange(len(crops)), tuple("abcd"))
    raw = ExemplarBuffer(20, SHAPE)
    small = ExemplarBuffer(20, SHAPE, exemplar_bytes=512)
    for buffer in (raw, small):
        buffer.offer(data, torch.arange(len(crops)))
    assert torch.equal(raw.ids, small.ids)
    assert raw.bytes - small.bytes == 20 * (3072 - 512)
    held = small.exemplars()
    assert noise_ratio(crops[held.ids], held.images) > 28
    drawn = small.draw(8, torch.Generator().manual_seed(0))
    assert noise_ratio(crops[drawn.ids], small.images_at(drawn.rows)) > 28
    assert torch.equal(drawn.labels, drawn.ids % 4)
    tensors, values = small.state()
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == small.bytes
    again = ExemplarBuffer(20, SHAPE, exemplar_bytes=512)
    again.load_state(tensors, values)
    assert torch.equal(again.exemplars().images, held.images)


@pytest.mark.parametrize("replay_dropped", [False, True])
@pytest.mark.parametrize("exemplar_bytes", [None, 512])
def test_replayed_images_are_those_of_their_ids_while_exemplars_come_and_go(
    crops: Tensor, exemplar_bytes: int | None, replay_dropped: bool
) -> None:
    preprocessing = Preprocessing((32, 32), 3, (0.0,) * 3, (1.0,) * 3)
    old = ImageSet(crops[:20], torch.arange(20) % 2, torch.arange(20), tuple("abcd"))
    new = ImageSet(crops[20:], 2 + torch.arange(20) % 2, torch.arange(20, 40), tuple("abcd"))
    buffer = ExemplarBuffer(16, SHAPE, exemplar_bytes=exemplar_bytes)
    buffer.offer(old, torch.arange(20), experience=0)
    held = set(buffer.ids.tolist())
    batches = BatchLoader(new, preprocessing, 4, shuffle=True)
    loader = ReplayLoader(batches, buffer, 6, 1, no_augmentation, replay_dropped)
    seen = crops if exemplar_bytes is None else WebPCodec(SHAPE, exemplar_bytes).decode(buffer.encode(crops))
    replayed = set()
    for epoch in range(3):
        for x, y, ids, _ in loader:
            assert torch.equal(ids[:4], new.ids[loader.new_rows])
            assert torch.equal(x[4:], preprocessing(seen[ids[4:]]))
            assert torch.equal(y[4:], ids[4:] % 2)
            assert set(ids[4:].tolist()) <= held
            replayed |= set(ids[4:].tolist())
            buffer.offer(new, loader.new_rows, experience=1)
        if epoch == 0:
            assert len(held & set(buffer.ids.tolist())) == 8  # half has left, and the rows have moved
            replayed.clear()
    assert replayed == (held if replay_dropped else held & set(buffer.ids.tolist()))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A stream of four classes of crops, two experiences."""
    images = tmp_path_factory.mktemp("images")
    for name in ("flower", "china"):
        picture = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)
        crops = picture.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4)
        for side in range(2):
            folder = images / f"{name}{side}"
            folder.mkdir(parents=True)
            for i, crop in enumerate(crops[6 * side : 6 * side + 6, :10].reshape(-1, *SHAPE)):
                Image.fromarray(crop.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return RunConfig(stream=f"images:{images}", strategy="impostor", backbone="convnet", batch_size=16)


@pytest.mark.parametrize("strategy", ["avalanche-replay", "er-ace", "der", "scr", "icarl", "gdumb", "gem"])
def test_avalanches_strategies_keep_more_exemplars_in_the_same_bytes_too(photographs: RunConfig, strategy: str) -> None:
    config = replace(photographs, strategy=strategy, memory=8)
    raw, small = run(config), run(replace(config, exemplar_bytes=384))
    budget = 8 * 3072
    assert raw["exemplars"] == 8
    assert raw["memory_parts"]["exemplars"] == budget
    assert 6 * 8 < small["exemplars"] <= 8 * 8
    assert small["memory_parts"]["exemplars"] == 384 * small["exemplars"]
    kept = small["memory_parts"]["exemplars"] + small["memory_parts"].get("logits", 0)
    assert 0.8 * budget < kept <= budget


def test_a_strategy_that_is_not_ours_sees_images_as_they_would_be_stored(photographs: RunConfig) -> None:
    spec = strategy_spec("avalanche-replay")
    config = replace(photographs, strategy=spec.name)
    raw, _ = load_stream(config, spec, lambda *_: None)
    small, _ = load_stream(replace(config, exemplar_bytes=384), spec, lambda *_: None)
    codec = WebPCodec(SHAPE, 384)
    assert torch.equal(small.train.images, codec.decode(codec.encode(raw.train.images)))
    assert torch.equal(small.test.images, raw.test.images)


def test_a_run_with_compressed_exemplars_stays_within_the_bytes_of_its_memory(
    photographs: RunConfig, tmp_path: Path
) -> None:
    config = photographs
    kept = {}
    for exemplar_bytes in (0, 384):
        found = run(replace(config, memory=20, exemplar_bytes=exemplar_bytes), tmp_path / str(exemplar_bytes))
        kept[exemplar_bytes] = found["exemplars"]
        if exemplar_bytes:
            assert found["memory_bytes"] <= 20 * 3072
            assert found["memory_bytes"] > 0.9 * 20 * 3072
        assert found["config"]["head_options"].get("bytes_per_center") == (16 if exemplar_bytes else None)
    assert kept[0] == 20
    assert kept[384] > 80


def test_a_memory_too_small_for_a_covariance_is_not_whitened_unless_the_user_says_so() -> None:
    def whiten(**settings: object) -> object:
        config = RunConfig(stream="split-cifar10", strategy="impostor", **settings)  # type: ignore[arg-type]
        return config.resolve(stream_spec(config.stream), strategy_spec(config.strategy)).head_options.get("whiten")

    assert whiten() == whiten(memory=100) == 0.3
    assert whiten(memory=99) is None
    assert whiten(memory=20, head_options={"whiten": 1.0}) == 1.0


def test_a_map_that_would_take_the_place_of_many_exemplars_is_left_out_unless_the_user_says_so(
    photographs: RunConfig,
) -> None:
    def whiten(**settings: object) -> object:
        config = replace(photographs, **{"exemplar_bytes": 384, **settings})  # type: ignore[arg-type]
        return load_stream(config, strategy_spec("impostor"), lambda *_: None)[1].head_options.get("whiten")

    # of 160 features the map takes 51,200 bytes, of 512 half a megabyte; 200 images take 614,400
    assert whiten(memory=200, backbone="slim_resnet18") == 0.3
    assert whiten(memory=160, backbone="slim_resnet18") is None
    assert whiten(memory=200, backbone="resnet18_cifar") is None
    assert whiten(memory=2000, backbone="resnet18_cifar") == 0.3
    assert whiten(memory=200, backbone="resnet18_cifar", head_options={"whiten": 0.1}) == 0.1
    assert whiten(memory=200, backbone="resnet18_cifar", exemplar_bytes=0) == 0.3  # exemplars are counted there


def test_a_run_whose_map_was_left_out_is_taken_when_it_is_resumed(photographs: RunConfig, tmp_path: Path) -> None:
    base = replace(photographs, memory=100, exemplar_bytes=384)  # of 128 features it would take 32,768 of 307,200 bytes
    plan = StreamComparison(variants(["impostor"]), memory=(100,), seeds=(0,), base=base)
    compare_streams(plan, tmp_path)
    file = tmp_path / "impostor-m100-s0.json"
    assert "whiten" not in json.loads(file.read_text())["config"]["head_options"]
    made = file.stat().st_mtime_ns
    compare_streams(plan, tmp_path, resume=True)
    assert file.stat().st_mtime_ns == made


def test_centers_are_compressed_beside_exemplars_unless_the_user_says_otherwise() -> None:
    def options(**settings: object) -> object:
        config = RunConfig(**{"stream": "split-cifar10", "strategy": "impostor", **settings})  # type: ignore[arg-type]
        resolved = config.resolve(stream_spec(config.stream), strategy_spec(config.strategy))
        return resolved.head_options.get("bytes_per_center", "raw")

    assert options() == 16
    assert options(head="nngk") == 16
    assert options(exemplar_bytes=0) == "raw"
    assert options(strategy="replay", exemplar_bytes=384) == "raw"
    for own in (32, 0, None):
        assert options(head_options={"bytes_per_center": own}) == own
