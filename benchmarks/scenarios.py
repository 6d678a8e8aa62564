"""Our streams as Avalanche benchmarks. Importing Avalanche takes seconds, so it happens inside the
function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor
from torch.utils.data import Dataset

from nnheads.data import ImageSet, sample_transform

if TYPE_CHECKING:
    from nnheads.benchmarks.streams import Stream


@final
class ImagePairs(Dataset[tuple[Tensor, int]]):
    """An image set without its ids: items are ``(uint8 image, label)``."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label, _ = self.images[index]
        return image, label


def build_benchmark(stream: Stream, *, transformed: bool = False, ids: bool = True) -> Any:
    """See `nnheads.benchmarks.streams.Stream.avalanche_benchmark`.

    The experiences share the stream's images: nothing is copied. Beside what Avalanche's task-aware
    class-incremental benchmarks have, ``n_classes``, ``n_classes_per_exp`` and ``classes_order`` are set, and
    each experience's ``benchmark``, which its iCaRL reads.
    """
    from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.scenarios.task_aware import with_task_labels
    from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
    from avalanche.benchmarks.utils.flat_data import ConstantSequence
    from avalanche.benchmarks.utils.transform_groups import TransformGroups

    def whole(images: ImageSet) -> Any:
        transforms = None
        if transformed:
            transforms = TransformGroups(
                {
                    "train": sample_transform(stream.preprocessing, stream.spec.augment),
                    "eval": sample_transform(stream.preprocessing),
                }
            )
        return TaskAwareSupervisedClassificationDataset(
            [images if ids else ImagePairs(images)],
            data_attributes=[DataAttribute(images.targets, "targets"), task_labels(0, len(images))],
            transform_groups=transforms,
        )

    def task_labels(task: int, count: int) -> Any:
        # some strategies join ours with data sets of their own, and only constant labels join with constant labels
        return TaskLabels(ConstantSequence(task, count))

    def cut(data: Any, parts: list[Tensor]) -> list[Any]:
        pieces = [data.subset(part.tolist()) for part in parts]
        if stream.scenario == "class":
            return pieces
        return [
            piece.update_data_attribute("targets_task_labels", task_labels(e, len(piece)))
            for e, piece in enumerate(pieces)
        ]

    count = range(len(stream))
    streams = {
        "train": cut(whole(stream.train), [stream.train_indices(e) for e in count]),
        "test": cut(whole(stream.test).eval(), [stream.test_indices(e) for e in count]),
    }
    scenario = with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))
    scenario.n_classes = stream.num_classes
    scenario.n_classes_per_exp = [len(classes) for classes in stream.experiences]
    scenario.classes_order = list(stream.class_order)
    for side in (scenario.train_stream, scenario.test_stream):
        for experience in side:
            # Avalanche makes sets of these; its metrics and some strategies index them
            experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
            experience.previous_classes = sorted(experience.previous_classes)
            experience.classes_seen_so_far = sorted(experience.classes_seen_so_far)
            experience.future_classes = sorted(experience.future_classes)
            experience.benchmark = scenario
    return scenario
