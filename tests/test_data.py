"""Images in memory: preprocessing, augmentation, batches, ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from nnheads.data import (
    AUGMENTATIONS,
    BatchLoader,
    ImageSet,
    Preprocessing,
    get_augmentation,
    materialize,
    sample_transform,
    stratified_split,
    with_ids,
)
from nnheads.errors import ConfigError, DataError, NNHeadsError, ShapeError, UnknownNameError

PREPROCESSING = Preprocessing((8, 8), 3, (0.1, 0.5, 0.9), (0.2, 0.3, 0.4))


def image_set(count: int = 50, size: int = 8) -> ImageSet:
    """Image ``i`` is ``i`` everywhere and has the label ``i % 5`` and the id ``1000 + i``."""
    values = torch.arange(count, dtype=torch.uint8)
    images = values.view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    return ImageSet(images, torch.arange(count) % 5, torch.arange(count) + 1000, tuple("abcde"))


def value_of(x: Tensor) -> Tensor:
    """Undoes the normalisation of the first pixel."""
    return ((x[:, 0, 0, 0] * 0.2 + 0.1) * 255).round().long()


class TestPreprocessing:
    def test_scales_and_normalises(self) -> None:
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
        expected = (images.double() / 255 - mean) / std
        torch.testing.assert_close(PREPROCESSING(images).double(), expected, atol=1e-5, rtol=1e-5)

    def test_channels_last_changes_only_the_memory_format(self) -> None:
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        x = PREPROCESSING(images, channels_last=True)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, PREPROCESSING(images))

    @pytest.mark.parametrize(
        "images",
        [
            torch.zeros(2, 3, 8, 8),
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(2, 3, 9, 8, dtype=torch.uint8),
        ],
    )
    def test_refuses_other_images(self, images: Tensor) -> None:
        with pytest.raises(ShapeError, match=r"must be uint8 \(B, 3, 8, 8\)"):
            PREPROCESSING(images)

    @pytest.mark.parametrize(
        "arguments",
        [
            ((8, 8), 2, (0.0, 0.0), (1.0, 1.0)),
            ((8, 8), 3, (0.0,), (1.0,)),
            ((8, 8), 1, (0.0,), (0.0,)),
            ((0, 8), 1, (0.0,), (1.0,)),
            (8, 1, (0.0,), (1.0,)),
            ((8, 8), 1, 0.0, (1.0,)),
        ],
    )
    def test_refuses_settings_that_cannot_work(self, arguments: tuple[object, ...]) -> None:
        with pytest.raises(ConfigError, match="preprocessing"):
            Preprocessing(*arguments)  # type: ignore[arg-type]

    def test_takes_lists_as_the_weights_of_torchvision_have_them(self) -> None:
        given = Preprocessing([8, 8], 3, list(PREPROCESSING.mean), list(PREPROCESSING.std))  # type: ignore[arg-type]
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        assert torch.equal(given(images), PREPROCESSING(images))
        assert given == PREPROCESSING
        assert hash(given) == hash(PREPROCESSING)

    def test_survives_json(self) -> None:
        assert Preprocessing.from_dict(PREPROCESSING.to_dict()) == PREPROCESSING
        with pytest.raises(ConfigError, match="needs size, channels, mean and std"):
            Preprocessing.from_dict({"size": [8, 8]})

    def test_opens_any_image_in_its_form(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "same.png")
        Image.new("LA", (30, 17), (77, 255)).save(tmp_path / "other.png")
        same = PREPROCESSING.open(tmp_path / "same.png")
        assert same.dtype == torch.uint8
        assert same[:, 3, 3].tolist() == [10, 20, 30]
        other = PREPROCESSING.open(str(tmp_path / "other.png"))
        assert tuple(other.shape) == (3, 8, 8)
        assert (other == 77).all()
        grey = Preprocessing((8, 4), 1, (0.0,), (1.0,)).open(tmp_path / "same.png")
        assert tuple(grey.shape) == (1, 8, 4)

    def test_names_a_file_that_it_cannot_read(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no image")
        whole = tmp_path / "whole.png"
        Image.effect_noise((64, 64), 50).save(whole)
        (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
        for name in ("text.png", "cut.png", "missing.png"):
            with pytest.raises(DataError, match=name) as caught:
                PREPROCESSING.open(tmp_path / name)
            assert "\n" not in str(caught.value)


class TestImageSet:
    def test_yields_image_label_and_id(self) -> None:
        data = image_set()
        image, label, index = data[7]
        assert (image.unique().item(), label, index) == (7, 2, 1007)
        assert data.targets == data.labels.tolist()
        x, y, ids = next(iter(DataLoader(data, batch_size=4)))
        assert (x.dtype, y.tolist(), ids.tolist()) == (torch.uint8, [0, 1, 2, 3], [1000, 1001, 1002, 1003])

    def test_subset_keeps_ids_and_order(self) -> None:
        part = image_set().subset([9, 3])
        assert part.ids.tolist() == [1009, 1003]
        assert part.images[:, 0, 0, 0].tolist() == [9, 3]
        assert part.class_names == tuple("abcde")
        assert len(image_set().subset([])) == 0

    def test_fills_in_ids_and_class_names(self) -> None:
        data = ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2, 1]))
        assert data.ids.tolist() == [0, 1, 2]
        assert data.class_names == ("0", "1", "2")

    def test_refuses_what_does_not_fit(self) -> None:
        images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2])
        with pytest.raises(ShapeError, match="images must be uint8"):
            ImageSet(images.float(), labels)
        with pytest.raises(ShapeError, match=r"labels must be int64 \(3,\)"):
            ImageSet(images, labels[:2])
        with pytest.raises(ShapeError, match=r"ids must be int64"):
            ImageSet(images, labels, ids=labels.float())
        with pytest.raises(ShapeError, match=r"labels must be 0\.\.1 .* not 0\.\.2"):
            ImageSet(images, labels, class_names=("a", "b"))


class TestBatchLoader:
    def test_gives_every_sample_once_with_its_own_label_and_id(self) -> None:
        loader = BatchLoader(image_set(), PREPROCESSING, 8, shuffle=True)
        seen = []
        sizes = []
        for x, y, ids in loader:
            assert x.dtype == torch.float32
            assert torch.equal(value_of(x), ids - 1000)
            assert torch.equal(y, (ids - 1000) % 5)
            seen += ids.tolist()
            sizes.append(len(x))
        assert sorted(seen) == list(range(1000, 1050))
        assert seen != sorted(seen)
        assert sizes == [8] * 6 + [2]
        assert len(loader) == 7

    def test_drop_last(self) -> None:
        loader = BatchLoader(image_set(), PREPROCESSING, 8, drop_last=True)
        assert [len(x) for x, _, _ in loader] == [8] * 6
        assert len(loader) == 6
        assert len(BatchLoader(image_set(48), PREPROCESSING, 8, drop_last=True)) == 6
        assert list(BatchLoader(image_set(0), PREPROCESSING, 8)) == []

    def test_order_and_augmentation_follow_seed_and_epoch(self) -> None:
        data = ImageSet(torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8), torch.arange(50) % 5)

        def loader(seed: int) -> BatchLoader:
            return BatchLoader(data, PREPROCESSING, 16, shuffle=True, augment=AUGMENTATIONS["crop-flip"], seed=seed)

        def epoch(batches: BatchLoader) -> tuple[Tensor, Tensor]:
            x, _, ids = zip(*batches, strict=True)
            return torch.cat(x), torch.cat(ids)

        first, again = loader(3), loader(3)
        runs = [epoch(first), epoch(first)]
        for x, ids in runs:
            other_x, other_ids = epoch(again)
            assert torch.equal(x, other_x)
            assert torch.equal(ids, other_ids)
        assert not torch.equal(runs[0][1], runs[1][1])
        assert not torch.equal(runs[0][1], epoch(loader(4))[1])
        # a resumed run goes on where the first would have
        resumed = loader(0)
        resumed.load_state_dict(first.state_dict())
        assert torch.equal(epoch(resumed)[0], epoch(first)[0])
        first.set_epoch(0)
        assert torch.equal(epoch(first)[0], runs[0][0])

    def test_without_shuffle_keeps_the_order(self) -> None:
        loader = BatchLoader(image_set(), PREPROCESSING, 16, channels_last=True)
        batches = list(loader)
        assert torch.cat([ids for _, _, ids in batches]).tolist() == list(range(1000, 1050))
        assert batches[0][0].is_contiguous(memory_format=torch.channels_last)

    def test_refuses_an_empty_batch(self) -> None:
        with pytest.raises(ConfigError, match="at least 1, not 0"):
            BatchLoader(image_set(), PREPROCESSING, 0)


class TestAugmentation:
    @pytest.mark.parametrize("name", ["crop", "crop-flip"])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_gives_windows_of_the_padded_image(self, name: str, dtype: torch.dtype) -> None:
        images = torch.randint(1, 255, (200, 3, 16, 16), dtype=torch.uint8).to(dtype)
        result = get_augmentation(name)(images, torch.Generator().manual_seed(0))
        assert result.shape == images.shape
        assert result.dtype == dtype
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        found = set()
        for i, image in enumerate(result):
            matches = [
                (top, left, mirrored)
                for top in range(5)
                for left in range(5)
                for mirrored in (False, True)
                if torch.equal(
                    padded[i, :, top : top + 16, left : left + 16].flip(-1)
                    if mirrored
                    else padded[i, :, top : top + 16, left : left + 16],
                    image,
                )
            ]
            assert len(matches) == 1
            found.add(matches[0])
        assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
        assert {mirrored for _, _, mirrored in found} == ({False, True} if name == "crop-flip" else {False})

    def test_none_changes_nothing(self) -> None:
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        assert torch.equal(get_augmentation("none")(images, torch.Generator()), images)

    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'crop-flip'"):
            get_augmentation("crop-flp")

    def test_sample_transform_agrees_with_the_batch_form(self) -> None:
        image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
        expected = PREPROCESSING(image.unsqueeze(0))[0]
        torch.testing.assert_close(sample_transform(PREPROCESSING)(image), expected, atol=1e-5, rtol=1e-5)
        augmented = sample_transform(PREPROCESSING, "crop-flip")
        results = torch.stack([augmented(image) for _ in range(20)])
        assert tuple(results.shape) == (20, 3, 8, 8)
        assert len(results.unique(dim=0)) > 5
        with pytest.raises(UnknownNameError):
            sample_transform(PREPROCESSING, "flop")


class Listed(Dataset[tuple[object, ...]]):
    def __init__(self, items: list[tuple[object, ...]]) -> None:
        self.items = items
        self.targets = [item[1] for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[object, ...]:
        return self.items[index]


class TestIds:
    def test_with_ids_adds_positions(self) -> None:
        wrapped = with_ids(Listed([("x", 3), ("y", 4)]))
        assert [wrapped[i] for i in range(2)] == [("x", 3, 0), ("y", 4, 1)]
        assert wrapped.targets == [3, 4]  # type: ignore[attr-defined]
        assert with_ids(wrapped) is wrapped
        data = image_set()
        assert with_ids(data) is data
        part = Subset(data, [2, 1])  # its items have ids of their own
        assert with_ids(part) is part

    def test_with_ids_has_no_targets_where_there_are_none(self) -> None:
        wrapped = with_ids(TensorDataset(torch.zeros(2, 1), torch.zeros(2)))
        with pytest.raises(AttributeError, match="TensorDataset has no targets"):
            _ = wrapped.targets  # type: ignore[attr-defined]

    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_materialize_reads_every_form(self, width: int) -> None:
        data = image_set(100)
        items = [(*data[i], i % 3)[:width] for i in range(len(data))]
        loaded = materialize(Listed(items), tuple("abcde"))
        assert torch.equal(loaded.images, data.images)
        assert torch.equal(loaded.labels, data.labels)
        assert torch.equal(loaded.ids, data.ids if width > 2 else torch.arange(len(data)))
        assert loaded.class_names == data.class_names
        if width == 4:
            assert loaded.tasks is not None
            assert loaded.tasks.tolist() == [i % 3 for i in range(len(data))]
            assert loaded.subset([4]).tasks.tolist() == [1]  # type: ignore[union-attr]
        else:
            assert loaded.tasks is None

    def test_materialize_refuses_other_forms(self) -> None:
        with pytest.raises(DataError, match="empty"):
            materialize(Listed([]))
        with pytest.raises(ShapeError, match="not 1 values"):
            materialize(OneColumn())
        with pytest.raises(ShapeError, match="images must be uint8"):
            materialize(Listed([(torch.zeros(3, 8, 8), 0)]))

    def test_materialize_leaves_an_image_set_alone(self) -> None:
        data = image_set()
        assert materialize(data) is data


class OneColumn(Dataset[tuple[Tensor]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (torch.zeros(3, 8, 8, dtype=torch.uint8),)


class TestStratifiedSplit:
    def test_takes_the_same_share_of_every_class(self) -> None:
        labels = torch.cat([torch.full((n,), c) for c, n in enumerate((10, 40, 2))])
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
        rest, held = stratified_split(labels, 0.2)
        assert sorted([*rest.tolist(), *held.tolist()]) == list(range(52))
        assert labels[held].bincount().tolist() == [2, 8, 1]
        again = stratified_split(labels, 0.2)
        assert torch.equal(held, again[1])
        assert not torch.equal(held, stratified_split(labels, 0.2, seed=1)[1])

    @pytest.mark.parametrize(("labels", "fraction"), [([0, 0, 1], 0.5), ([0, 0, 1, 1], 0.0), ([0, 0, 1, 1], 1.0)])
    def test_refuses_what_it_cannot_split(self, labels: list[int], fraction: float) -> None:
        with pytest.raises(NNHeadsError):
            stratified_split(torch.tensor(labels), fraction)


def test_a_subset_by_mask_is_the_subset_by_position() -> None:
    data = ImageSet(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 2, 1]))
    assert data.subset(data.labels == 1).ids.tolist() == [1, 3, 5]
    with pytest.raises(ShapeError, match="mask must be"):
        data.subset(torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_are_scaled_down(suffix: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    expected = torch.arange(256).view(1, 16, 16)
    for channels in (1, 3):
        form = Preprocessing((16, 16), channels, (0.0,) * channels, (1.0,) * channels)
        assert torch.equal(form.open(tmp_path / f"deep.{suffix}").long(), expected.expand(channels, -1, -1))


def test_grey_values_of_an_unknown_range_are_told(tmp_path: Path) -> None:
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 2**20, np.int32)):
        Image.fromarray(values).save(tmp_path / "wide.tif")
        with pytest.raises(DataError, match=r"wide\.tif \(grey values of 32 bits, whose range is not known"):
            Preprocessing((4, 4), 1, (0.0,), (1.0,)).open(tmp_path / "wide.tif")


def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    form = Preprocessing((8, 8), 1, (0.0,), (1.0,))
    assert torch.equal(form.open(tmp_path / "phone.png"), form.open(tmp_path / "upright.png"))
