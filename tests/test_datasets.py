"""Data sets by name: layouts, errors, the decoded cache, downloads. With NNHEADS_DATA also real CIFAR-10 and MNIST."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nnheads.benchmarks.datasets import DATASETS, from_folder, list_datasets, load_dataset, load_images
from nnheads.data import Preprocessing
from nnheads.errors import ConfigError, DataError, UnknownNameError

REAL = os.environ.get("NNHEADS_DATA")
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's caches, except those on real images, which take long to decode."""
    if request.cls is not TestRealImages:
        monkeypatch.setenv("NNHEADS_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("NNHEADS_DATA", raising=False)
    return tmp_path / "cache"


def make_folder(
    folder: Path, classes: list[str], count: int = 5, size: tuple[int, int] = (8, 8), mode: str = "RGB"
) -> Path:
    """Image ``i`` of class ``c`` has the grey level ``20 c + i``."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            level = 20 * label + i
            Image.new(mode, size, (level,) * len(mode)).save(folder / name / f"{i:03}.png")
    return folder


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


class TestDigits:
    def test_split_is_fixed_and_complete(self) -> None:
        data = load_dataset("digits")
        assert (len(data.train), len(data.test)) == (1438, 359)
        assert data.train.labels.bincount().min() > 130
        assert data.test.labels.bincount().min() > 30
        assert tuple(data.train.images.shape[1:]) == (1, 8, 8)
        assert (data.train.images.min(), data.train.images.max()) == (0, 255)
        assert torch.equal(load_images("digits", train=True).images, data.train.images)

    def test_test_samples_have_no_id(self) -> None:
        data = load_dataset("digits")
        assert (data.test.ids == -1).all()
        assert data.train.ids.tolist() == list(range(1438))

    def test_normalised_to_mean_0_and_std_1(self) -> None:
        data = load_dataset("digits")
        x = data.preprocessing(data.train.images)
        assert abs(float(x.mean())) < 0.01
        assert abs(float(x.std()) - 1) < 0.01


class TestOwnImages:
    def test_train_and_test_folders(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "own" / "train", ["b", "a"], 5)
        make_folder(tmp_path / "own" / "test", ["b", "a"], 2)
        (tmp_path / "own" / "train" / "a" / "notes.txt").write_text("not an image")
        data = load_dataset(f"images:{tmp_path / 'own'}")
        assert data.train.class_names == data.test.class_names == ("a", "b")
        assert data.train.labels.tolist() == [0] * 5 + [1] * 5
        assert data.train.images[:, 0, 0, 0].tolist() == [20, 21, 22, 23, 24, 0, 1, 2, 3, 4]
        assert data.test.labels.tolist() == [0, 0, 1, 1]
        assert data.preprocessing.size == (8, 8)
        x = data.preprocessing(data.train.images)
        assert abs(float(x.mean())) < 1e-4

    def test_class_folders_alone_are_split(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b", "c"], 10)
        data = load_dataset("images:", folder)
        assert data.train.labels.bincount().tolist() == [8, 8, 8]
        assert data.test.labels.bincount().tolist() == [2, 2, 2]
        levels = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0]
        assert len(levels.unique()) == 30
        assert data.train.ids.tolist() == list(range(24))

    @pytest.mark.parametrize(
        ("sizes", "expected"),
        [([(12, 9), (12, 9)], (9, 12)), ([(12, 9), (9, 9)], (64, 64)), ([(100, 100), (100, 100)], (64, 64))],
    )
    def test_size(self, tmp_path: Path, sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
        for name, size in zip("ab", sizes, strict=True):
            make_folder(tmp_path / "own", [name], 4, size)
        data = load_dataset(f"images:{tmp_path / 'own'}")
        assert data.preprocessing.size == expected
        assert tuple(data.test.images.shape[1:]) == (3, *expected)

    def test_grey_images_have_one_channel(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b"], 4, mode="L")
        data = load_dataset(f"images:{folder}")
        assert data.preprocessing.channels == 1
        Image.new("RGB", (8, 8)).save(folder / "a" / "colour.png")
        assert load_dataset(f"images:{folder}").preprocessing.channels == 3

    def test_one_class(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", ["only"])
        with pytest.raises(DataError, match=r"one class only \(only\)") as error:
            load_dataset(f"images:{folder}")
        one_line(error)

    def test_unreadable_image_is_named(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b"])
        (folder / "b" / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
        with pytest.raises(DataError, match=r"b/bad\.jpg") as error:
            load_dataset(f"images:{folder}")
        one_line(error)

    def test_different_classes(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "own" / "train", ["a", "b", "c"])
        make_folder(tmp_path / "own" / "test", ["a", "b", "d"])
        with pytest.raises(DataError, match=r"only in .*train: c; only in .*test: d") as error:
            load_dataset(f"images:{tmp_path / 'own'}")
        one_line(error)

    def test_missing_parts(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="images:DIR"):
            load_dataset("images:")
        with pytest.raises(DataError, match=r"no such folder: .*nowhere"):
            load_dataset(f"images:{tmp_path / 'nowhere'}")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=r"no class folders in .*empty"):
            load_dataset(f"images:{tmp_path / 'empty'}")
        make_folder(tmp_path / "half" / "train", ["a", "b"])
        with pytest.raises(DataError, match=r"no test/<class>"):
            load_dataset(f"images:{tmp_path / 'half'}")
        hollow = make_folder(tmp_path / "hollow", ["a", "b"])
        (hollow / "c").mkdir()
        with pytest.raises(DataError, match=r"no images in .*hollow/c"):
            load_dataset(f"images:{hollow}")
        single = make_folder(tmp_path / "single", ["a", "b"], 1)
        with pytest.raises(DataError, match="single/a has a single image"):
            load_dataset(f"images:{single}")


class TestFromFolder:
    def test_labels_follow_the_model(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "eval", ["cat", "dog"], 2)
        form = Preprocessing((4, 4), 1, (0.0,), (1.0,))
        images = from_folder(folder, form, class_names=("dog", "bird", "cat"))
        assert images.labels.tolist() == [2, 2, 0, 0]
        assert tuple(images.images.shape) == (4, 1, 4, 4)
        assert images.class_names == ("dog", "bird", "cat")
        with pytest.raises(DataError, match="classes that are not known: dog; known: cat, bird"):
            from_folder(folder, form, class_names=("cat", "bird"))

    def test_reports_progress(self, tmp_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []
        folder = make_folder(tmp_path / "own", ["a", "b"], 150)
        from_folder(folder, progress=lambda *call: calls.append(call))
        assert {what.split()[0] for what, _, _ in calls} == {"looking", "decoding"}
        assert [done for what, done, _ in calls if what.startswith("decoding")] == [256, 300]
        assert {total for _, _, total in calls} == {300}


class TestDecodedCache:
    def test_second_load_decodes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b"])
        first = from_folder(folder)

        def refuse(self: Preprocessing, path: object) -> None:
            raise AssertionError("decoded again")

        monkeypatch.setattr(Preprocessing, "open", refuse)
        assert torch.equal(from_folder(folder).images, first.images)

    def test_a_changed_folder_is_read_again(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b"])
        from_folder(folder)
        Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "a" / "000.png")
        os.utime(folder / "a" / "000.png", (2e9, 2e9))
        assert from_folder(folder).images[0, 0, 0, 0] == 200
        (folder / "a" / "001.png").rename(folder / "a" / "009.png")
        assert from_folder(folder).images[:5, 1, 0, 0].tolist() == [0, 2, 3, 4, 1]

    def test_files_that_change_places_are_read_again(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b"])
        Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "b" / "000.png")
        os.utime(folder / "b" / "000.png", (1e9, 1e9))
        assert from_folder(folder).images[0, 0, 0, 0] == 0
        (folder / "a" / "000.png").rename(tmp_path / "aside")
        (folder / "b" / "000.png").rename(folder / "a" / "000.png")  # a label is put right: older than the newest file
        (tmp_path / "aside").rename(folder / "b" / "000.png")
        assert from_folder(folder).images[0, 0, 0, 0] == 200

    def test_a_damaged_cache_is_replaced(self, tmp_path: Path, own_cache: Path) -> None:
        folder = make_folder(tmp_path / "own", ["a", "b"])
        first = from_folder(folder)
        (cached,) = (own_cache / "decoded").iterdir()
        whole = cached.read_bytes()
        for damage in (b"", b"no safetensors file", whole[: len(whole) // 2]):
            cached.write_bytes(damage)
            assert torch.equal(from_folder(folder).images, first.images)
            assert cached.stat().st_size == len(whole)
        assert [file.name for file in cached.parent.iterdir()] == [cached.name]

    def test_a_cache_that_cannot_be_written_is_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("NNHEADS_CACHE", str(tmp_path / "file"))
        assert len(from_folder(make_folder(tmp_path / "own", ["a", "b"]))) == 10


def write_idx(raw: Path, start: str, images: np.ndarray, labels: np.ndarray) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{start}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
    (raw / f"{start}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())


class TestKnownSets:
    def test_class_folders_at_any_level(self, tmp_path: Path) -> None:
        for half in ("train", "test"):
            make_folder(tmp_path / "sets" / "cifar10" / half, CIFAR10_CLASSES, 2, (32, 32))
        for given in (tmp_path / "sets", tmp_path / "sets" / "cifar10"):
            data = load_dataset("cifar10", given)
            assert data.train.class_names == tuple(CIFAR10_CLASSES)
            assert len(data.test) == 20
            assert data.preprocessing == DATASETS["cifar10"].preprocessing

    def test_default_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for half in ("train", "test"):
            make_folder(tmp_path / "sets" / "cifar10" / half, CIFAR10_CLASSES, 1, (32, 32))
        monkeypatch.setenv("NNHEADS_DATA", str(tmp_path / "sets"))
        assert len(load_images("cifar10", train=True)) == 10

    def test_wrong_number_of_classes(self, tmp_path: Path) -> None:
        for half in ("train", "test"):
            make_folder(tmp_path / "cifar10" / half, ["a", "b"], 1)
        with pytest.raises(DataError, match="has 2 classes, but CIFAR10 has 10") as error:
            load_dataset("cifar10", tmp_path)
        one_line(error)

    def test_says_what_to_put_where(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no CIFAR100 in .*cifar-100-python/, or train/<class>") as error:
            load_dataset("cifar100", tmp_path)
        one_line(error)
        with pytest.raises(DataError, match="no such folder"):
            load_dataset("cifar100", tmp_path / "nowhere")

    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'cifar100'"):
            load_dataset("cifar1000")
        assert set(list_datasets()) >= {"digits", "mnist", "fmnist", "cifar10", "cifar100"}

    def test_mnist_files_at_any_level(self, tmp_path: Path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        images = np.arange(20 * 784, dtype=np.uint32).astype(np.uint8).reshape(20, 28, 28)
        labels = (np.arange(20) % 10).astype(np.uint8)
        write_idx(raw, "train", images, labels)
        write_idx(raw, "t10k", images[:10], labels[:10])
        for given in (tmp_path, tmp_path / "MNIST", raw):
            data = load_dataset("mnist", given)
            assert torch.equal(data.train.images[:, 0], torch.from_numpy(images))
            assert data.test.labels.tolist() == list(range(10))
            with pytest.raises(DataError, match="no FashionMNIST"):
                load_dataset("fmnist", given)
        (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 cut")
        with pytest.raises(DataError, match=r"MNIST in .*raw is incomplete or damaged") as error:
            load_dataset("mnist", tmp_path)
        one_line(error)

    def test_cifar_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
        for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            (folder / name).write_bytes(pickle.dumps({"data": pixels[i], "labels": [0, 1, 2, 9]}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10_CLASSES}))
        # torchvision knows the original files by their checksums and refuses others before it unpickles anything
        with pytest.raises(DataError, match=r"CIFAR10 in .* is incomplete or damaged"):
            load_dataset("cifar10", tmp_path)
        monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
        for given in (tmp_path, folder):
            data = load_dataset("cifar10", given)
            assert data.train.images.shape == (20, 3, 32, 32)
            assert data.train.labels[:4].tolist() == [0, 1, 2, 9]
            assert torch.equal(data.test.images.flatten(1), torch.from_numpy(pixels[5]))
            assert data.train.class_names == tuple(CIFAR10_CLASSES)


class TestDownload:
    def test_without_network(self, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
        def offline(root: str, download: bool) -> None:
            Path(root, "cifar-10-python.tar.gz").write_bytes(b"half")
            raise URLError("Name or service not known\nno route")

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
        with pytest.raises(DataError, match=r"--data-dir .*cifar-10-batches-py.*split-digits") as error:
            load_dataset("cifar10")
        one_line(error)
        assert list((own_cache / "data").iterdir()) == []

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
        def interrupted(root: str, download: bool) -> None:
            Path(root, "cifar-10-python.tar.gz").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("cifar10")
        assert list((own_cache / "data").iterdir()) == []

    def test_happens_once(
        self, monkeypatch: pytest.MonkeyPatch, own_cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tries = []

        def fetch(root: str, download: bool) -> None:
            tries.append(root)
            print("Downloading ...")
            images, labels = np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
            for start in ("train", "t10k"):
                write_idx(Path(root) / "MNIST" / "raw", start, images, labels)

        monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
        steps = []
        for _ in range(2):
            load_dataset("mnist", progress=lambda *step: steps.append(step))
        assert len(tries) == 1
        assert steps == [("downloading MNIST", 0, 0)]
        assert sorted(file.name for file in (own_cache / "data").iterdir()) == ["MNIST"]
        assert capsys.readouterr().out == ""

    def test_at_the_same_time_as_another_run(self, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
        def fetch(root: str, download: bool) -> None:
            images, labels = np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
            for folder in (Path(root), own_cache / "data"):  # the other is there first
                for start in ("train", "t10k"):
                    write_idx(folder / "MNIST" / "raw", start, images, labels)

        monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
        assert len(load_dataset("mnist").train) == 10


@pytest.mark.skipif(REAL is None, reason="NNHEADS_DATA is not set to a folder with cifar10/ and MNIST/")
class TestRealImages:
    @pytest.mark.parametrize(
        ("name", "train", "test"),
        [("cifar10", 50_000, 10_000), ("cifar100", 50_000, 10_000), ("mnist", 60_000, 10_000)],
    )
    def test_size_and_moments(self, name: str, train: int, test: int) -> None:
        data = load_dataset(name, REAL)
        assert (len(data.train), len(data.test)) == (train, test)
        assert data.test.labels.unique().tolist() == list(range(data.train.num_classes))
        x = data.preprocessing(data.train.images[::10]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(x.mean(1), torch.zeros(len(x)), atol=0.03, rtol=0)
        torch.testing.assert_close(x.std(1), torch.ones(len(x)), atol=0.03, rtol=0)


def test_a_folder_of_turned_photographs_keeps_their_shape(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (24, 16), (i, 0, 0)).save(folder / f"{i}.jpg", exif=exif)
    data = load_dataset(f"images:{tmp_path}")
    assert tuple(data.train.images.shape[2:]) == (24, 16), "stored lying, shown upright: 24 high, 16 wide"
