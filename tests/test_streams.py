"""Streams: who comes when, with which samples, and the same as an Avalanche benchmark."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nnheads.benchmarks.streams import Stream, list_streams, make_stream, stream_spec
from nnheads.data import get_augmentation, materialize
from nnheads.errors import ConfigError, DataError, UnknownNameError

REAL = os.environ.get("NNHEADS_DATA")


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        monkeypatch.setenv("NNHEADS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits() -> Stream:
    return make_stream("split-digits", seed=3)


@pytest.fixture(scope="module")
def drifting() -> Stream:
    return make_stream("new-instances:split-digits", seed=3)


def make_folder(folder: Path, classes: int, count: int, side: int = 8) -> Path:
    for label in range(classes):
        (folder / f"c{label:03}").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (side, side), (label, i, 0)).save(folder / f"c{label:03}" / f"{i}.png")
    return folder


class TestSpecs:
    def test_every_spec_has_settings_that_exist(self) -> None:
        specs = list_streams()
        assert {"split-digits", "split-cifar10", "split-cifar100", "split-cifar110"} <= {s.name for s in specs}
        for spec in specs:
            assert stream_spec(spec.name) == spec
            get_augmentation(spec.augment)
            assert min(spec.experiences, spec.batch_size, spec.memory, spec.epochs) >= 1
            assert "\n" not in spec.description

    def test_names_with_a_parameter(self) -> None:
        assert stream_spec("images:some/folder").dataset == "images:some/folder"
        spec = stream_spec("new-instances:split-cifar100")
        assert (spec.dataset, spec.experiences, spec.kind) == ("cifar100", 5, "instances")
        assert spec.memory == stream_spec("split-cifar100").memory

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'split-cifar10'"):
            stream_spec("split-cifar1O")
        with pytest.raises(UnknownNameError, match="split-digits"):
            stream_spec("new-instances:digits")
        with pytest.raises(ConfigError, match="itself a stream of new instances"):
            stream_spec("new-instances:new-instances:split-digits")
        with pytest.raises(UnknownNameError, match="known: class, task"):
            make_stream("split-digits", scenario="tsk")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="scenario 'task'"):
            make_stream("new-instances:split-digits", scenario="task")
        with pytest.raises(ConfigError, match="seed"):
            make_stream("split-digits", seed=-1)


class TestSplit:
    def test_every_sample_is_in_the_experience_of_its_class(self, digits: Stream) -> None:
        assert len(digits) == 5
        assert sorted(c for classes in digits.experiences for c in classes) == list(range(10))
        assert [c for classes in digits.experiences for c in classes] == digits.class_order
        for side, count in (("train", 1438), ("test", 359)):
            seen: list[int] = []
            for e, classes in enumerate(digits.experiences):
                rows = digits.train_indices(e) if side == "train" else digits.test_indices(e)
                labels = (digits.train if side == "train" else digits.test).labels[rows]
                assert set(labels.tolist()) == set(classes)
                seen += rows.tolist()
            assert sorted(seen) == list(range(count))

    def test_order_follows_the_seed(self, digits: Stream) -> None:
        assert make_stream("split-digits", seed=3).experiences == digits.experiences
        assert make_stream("split-digits", seed=4).experiences != digits.experiences

    def test_sets_and_masks(self, digits: Stream) -> None:
        part = digits.train_set(2)
        assert part.ids.tolist() == digits.train_indices(2).tolist()
        assert set(digits.test_set(2).targets) == set(digits.experiences[2])
        assert (digits.test_set(2).ids == -1).all()
        assert digits.classes_seen(1) == sorted(digits.class_order[:4])
        assert digits.class_mask(2).nonzero().flatten().tolist() == sorted(digits.experiences[2])

    def test_holdout_never_sees_the_test_images(self, digits: Stream) -> None:
        held = digits.holdout(0.1, seed=1)
        assert len(held.train) + len(held.test) == len(digits.train)
        assert held.test.labels.bincount().tolist() == [round(n / 10) for n in digits.train.labels.bincount().tolist()]
        assert torch.equal(held.train.images, digits.train.images[held.train.ids])
        pictures = {image.numpy().tobytes() for image in digits.train.images}
        assert all(image.numpy().tobytes() in pictures for image in held.test.images)
        assert (held.test.ids == -1).all()
        for e, classes in enumerate(held.experiences):
            assert set(held.train_set(e).targets) == set(classes) == set(held.test_set(e).targets)
        assert torch.equal(digits.holdout(0.1, seed=1).train.ids, held.train.ids)
        assert sum(len(held.train_indices(e)) for e in range(5)) == len(held.train)

    def test_thinned_keeps_classes_and_test_images(self, digits: Stream) -> None:
        thin = digits.thinned(0.4, seed=1)
        assert thin.train.labels.bincount().tolist() == [
            round(0.4 * n) for n in digits.train.labels.bincount().tolist()
        ]
        assert thin.test is digits.test
        for e in range(5):
            assert set(thin.train_set(e).ids.tolist()) < set(digits.train_set(e).ids.tolist())


class TestOwnImages:
    @pytest.mark.parametrize(("classes", "sizes"), [(2, [1, 1]), (7, [3, 2, 2]), (12, [3, 3, 2, 2, 2])])
    def test_experiences_follow_the_number_of_classes(self, tmp_path: Path, classes: int, sizes: list[int]) -> None:
        stream = make_stream(f"images:{make_folder(tmp_path / 'own', classes, 5)}")
        assert [len(group) for group in stream.experiences] == sizes
        assert stream.spec.experiences == len(sizes)
        assert stream.spec.backbone == "convnet"

    def test_new_instances(self, tmp_path: Path) -> None:
        stream = make_stream(f"new-instances:images:{make_folder(tmp_path / 'own', 3, 20, side=32)}")
        assert len(stream) == 5
        assert set(stream.train_set(0).targets) == {0, 1, 2}
        assert stream.spec.backbone == "slim_resnet18"

    def test_too_few_images_for_the_experiences(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "own", 2, 2)
        with pytest.raises(DataError, match=r"experience \d has no training images"):
            make_stream(f"new-instances:images:{folder}")


class TestCifar110:
    def test_cifar10_comes_first_and_labels_go_on(self, tmp_path: Path) -> None:
        for half in ("train", "test"):
            make_folder(tmp_path / "cifar10" / half, 10, 1, 32)
            make_folder(tmp_path / "cifar100" / half, 100, 1, 32)
        stream = make_stream("split-cifar110", data_dir=tmp_path, seed=5)
        assert [len(classes) for classes in stream.experiences] == [10] * 6
        assert sorted(stream.experiences[0]) == list(range(10))
        assert sorted(c for classes in stream.experiences for c in classes) == list(range(60))
        assert stream.num_classes == 60
        assert stream.train.ids.tolist() == list(range(60))
        # the red of an image is its class in its own set
        red = stream.train.images[:, 0, 0, 0].long()
        assert torch.equal(red, torch.where(stream.train.labels < 10, stream.train.labels, stream.train.labels - 10))
        longer = make_stream("split-cifar110-11x10", data_dir=tmp_path)
        assert [len(classes) for classes in longer.experiences] == [10] * 11
        tasks = make_stream("split-cifar110", data_dir=tmp_path, seed=5, scenario="task")
        assert tasks.experiences == stream.experiences
        assert tasks.class_mask(0).nonzero().flatten().tolist() == list(range(10))
        assert [e.task_label for e in tasks.benchmark.test_stream] == list(range(6))

    @pytest.mark.parametrize(("name", "experiences"), [("split-cifar100", 10), ("split-cifar100-20x5", 20)])
    def test_cifar100(self, tmp_path: Path, name: str, experiences: int) -> None:
        for half in ("train", "test"):
            make_folder(tmp_path / half, 100, 2, 32)
        stream = make_stream(name, data_dir=tmp_path, seed=1)
        assert [len(classes) for classes in stream.experiences] == [100 // experiences] * experiences
        assert sorted(c for classes in stream.experiences for c in classes) == list(range(100))
        assert stream.experiences[0] != tuple(range(100 // experiences))


class TestCore50:
    @staticmethod
    def lay_out(root: Path, sessions: range = range(1, 12), objects: range = range(1, 51)) -> Path:
        for session in sessions:
            for number in objects:
                folder = root / f"s{session}" / f"o{number}"
                folder.mkdir(parents=True)
                Image.new("RGB", (32, 32), (number, session, 0)).save(folder / f"C_{session:02}_{number:02}_000.png")
        return root

    def test_ten_classes_then_five_at_a_time(self, tmp_path: Path) -> None:
        self.lay_out(tmp_path / "core50" / "core50_32x32")
        stream = make_stream("core50", data_dir=tmp_path, seed=1)
        assert [len(classes) for classes in stream.experiences] == [10] + [5] * 8
        assert sorted(c for classes in stream.experiences for c in classes) == list(range(50))
        assert sorted(stream.experiences[0]) != list(range(10))
        assert stream.experiences == make_stream("core50", data_dir=tmp_path / "core50", seed=1).experiences
        # red is the object's number, green the session's: labels follow the objects, and the test sessions are apart
        for half, sessions in ((stream.train, {1, 2, 4, 5, 6, 8, 9, 11}), (stream.test, {3, 7, 10})):
            assert torch.equal(half.images[:, 0, 0, 0].long(), half.labels + 1)
            assert set(half.images[:, 1, 0, 0].tolist()) == sessions
        assert stream.class_names[:6] == (
            "plug_adapter1", "plug_adapter2", "plug_adapter3", "plug_adapter4", "plug_adapter5", "mobile_phone1"
        )  # fmt: skip
        assert len(make_stream("new-instances:core50", data_dir=tmp_path)) == 5

    def test_the_large_images_serve_too(self, tmp_path: Path) -> None:
        root = self.lay_out(tmp_path / "core50_128x128", range(1, 4))
        assert make_stream("core50", data_dir=root).train.images.shape == (100, 3, 32, 32)

    def test_what_is_missing_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("NNHEADS_DATA", raising=False)
        with pytest.raises(DataError, match=r"put core50_32x32/ .* into .*--data-dir; .*https://"):
            make_stream("core50")
        with pytest.raises(DataError, match=r"no CORe50 here: put core50_32x32/ \(or core50_128x128/\) with s1/o1"):
            make_stream("core50", data_dir=tmp_path)
        with pytest.raises(DataError, match="no such folder"):
            make_stream("core50", data_dir=tmp_path / "nowhere")
        root = self.lay_out(tmp_path / "core50_32x32", range(1, 3), range(1, 50))
        with pytest.raises(DataError, match=r"no images of object o50 in .*core50_32x32 \(s1, s2\)"):
            make_stream("core50", data_dir=root)
        (root / "s1" / "o50").mkdir()
        Image.new("RGB", (32, 32)).save(root / "s1" / "o50" / "a.png")
        with pytest.raises(DataError, match=r"no test session in .*it should hold s3, s7 and s10"):
            make_stream("core50", data_dir=root)


class TestNewInstances:
    def test_each_sample_once_and_each_class_always(self, drifting: Stream) -> None:
        rows = torch.cat([drifting.train_indices(e) for e in range(5)])
        assert sorted(rows.tolist()) == list(range(len(drifting.train)))
        for e in range(5):
            assert set(drifting.train_set(e).targets) == set(range(10))
            assert len(drifting.test_set(e)) == len(drifting.test)
        assert drifting.shared_test
        assert drifting.classes_seen(0) == list(range(10))

    def test_class_shares_drift_within_the_stated_bounds(self, drifting: Stream) -> None:
        counts = torch.stack([drifting.train_set(e).labels.bincount(minlength=10) for e in range(5)]).float()
        shares = counts / counts.sum(0) * 5
        assert shares.min() > 0.45
        assert shares.max() < 1.55
        assert (shares.max(0).values - shares.min(0).values).min() > 0.5

    def test_drift_follows_the_seed(self, drifting: Stream) -> None:
        again = make_stream("new-instances:split-digits", seed=3)
        other = make_stream("new-instances:split-digits", seed=4)
        assert torch.equal(again.train_indices(1), drifting.train_indices(1))
        assert not torch.equal(other.train_indices(1), drifting.train_indices(1))

    def test_holdout_and_thinning_take_from_every_experience(self, drifting: Stream) -> None:
        for kept, share in ((drifting.holdout(0.2, seed=3), 0.8), (drifting.thinned(0.5, seed=3), 0.5)):
            for e in range(5):
                ids = kept.train_set(e).ids
                assert set(ids.tolist()) < set(drifting.train_indices(e).tolist())
                assert len(ids) / len(drifting.train_indices(e)) == pytest.approx(share, abs=0.1)


class TestAvalanche:
    def test_raw_items_have_ids_before_task_labels(self, digits: Stream) -> None:
        benchmark = digits.benchmark
        assert digits.benchmark is benchmark
        experience = benchmark.train_stream[1]
        row = int(digits.train_indices(1)[0])
        x, y, index, task = experience.dataset[0]
        assert torch.equal(x, digits.train.images[row])
        assert (y, index, task) == (digits.train.targets[row], row, 0)
        loaded = materialize(experience.dataset, digits.class_names)
        assert torch.equal(loaded.images, digits.train_set(1).images)
        assert torch.equal(loaded.ids, digits.train_indices(1))

    def test_experiences_know_their_classes(self, digits: Stream) -> None:
        benchmark = digits.benchmark
        for side in (benchmark.train_stream, benchmark.test_stream):
            assert len(side) == 5
            for e, experience in enumerate(side):
                assert experience.current_experience == e
                assert experience.classes_in_this_experience == sorted(digits.experiences[e])
                assert experience.classes_seen_so_far == digits.classes_seen(e)
                assert experience.task_labels == [0]
        assert benchmark.n_classes_per_exp == [2] * 5
        assert benchmark.classes_order == digits.class_order

    def test_task_scenario_labels_by_experience(self) -> None:
        benchmark = make_stream("split-digits", scenario="task").benchmark
        for side in (benchmark.train_stream, benchmark.test_stream):
            for e, experience in enumerate(side):
                assert experience.task_label == e
                assert experience.dataset[0][-1] == e
                assert set(experience.dataset.targets_task_labels) == {e}

    def test_transformed_items_are_augmented_only_in_training(self, digits: Stream) -> None:
        benchmark = digits.avalanche_benchmark(transformed=True, ids=False)
        dataset = benchmark.train_stream[0].dataset
        x, y, task = dataset[0]
        assert (x.dtype, tuple(x.shape), task) == (torch.float32, (1, 8, 8), 0)
        assert y in digits.experiences[0]
        train = torch.stack([dataset.train()[0][0] for _ in range(20)])
        assert len(train.unique(dim=0)) > 1
        expected = digits.preprocessing(digits.train_set(0).images[:1])[0]
        torch.testing.assert_close(dataset.eval()[0][0], expected, atol=1e-5, rtol=1e-5)
        expected = digits.preprocessing(digits.test_set(0).images[:1])[0]
        torch.testing.assert_close(benchmark.test_stream[0].dataset[0][0], expected, atol=1e-5, rtol=1e-5)

    def test_new_instances(self, drifting: Stream) -> None:
        benchmark = drifting.benchmark
        for e, experience in enumerate(benchmark.train_stream):
            assert experience.classes_in_this_experience == list(range(10))
            assert len(experience.dataset) == len(drifting.train_indices(e))
        assert [len(experience.dataset) for experience in benchmark.test_stream] == [len(drifting.test)] * 5

    @pytest.mark.parametrize("ids", [True, False])
    def test_avalanche_trains_on_it(self, digits: Stream, ids: bool) -> None:
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.logging import TextLogger
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import Replay

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        strategy: Any = Replay(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            criterion=torch.nn.CrossEntropyLoss(),
            mem_size=50,
            train_mb_size=32,
            train_epochs=2,
            evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[TextLogger(io.StringIO())]),
        )
        benchmark = digits.avalanche_benchmark(transformed=True, ids=ids)
        for experience in benchmark.train_stream[:2]:
            strategy.train(experience)
        (accuracy,) = strategy.eval(benchmark.test_stream[1:2]).values()
        assert accuracy > 0.7


@pytest.mark.skipif(REAL is None, reason="NNHEADS_DATA is not set to a folder with cifar10/")
def test_real_split_cifar10() -> None:
    stream = make_stream("split-cifar10", data_dir=REAL)
    assert [len(stream.train_indices(e)) for e in range(5)] == [10_000] * 5
    assert [len(stream.test_indices(e)) for e in range(5)] == [2_000] * 5
    assert len(stream.benchmark.train_stream[4].dataset) == 10_000
