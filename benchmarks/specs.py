"""The streams by name, with the settings a run takes by default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, final

from nnheads.errors import ConfigError, unknown_name

NEW_INSTANCES = "new-instances:"

KERNEL_HEADS: tuple[tuple[str, Any], ...] = (("auxiliary", 0.95), ("centers", "tied"), ("whiten", 0.3), ("k", 128))


@final
@dataclass(frozen=True)
class StreamSpec:
    """A stream by name, and the settings a run takes where the user gives none.

    Attributes:
        name: what ``nnheads run`` takes.
        dataset: see `nnheads.benchmarks.datasets.load_dataset`.
        experiences: how many.
        backbone: see `nnheads.backbones`.
        augment: see `nnheads.data.get_augmentation`.
        batch_size: new samples a step.
        memory: exemplars kept.
        epochs: passes over each experience.
        learning_rate: of plain SGD.
        description: one line.
        kind: ``classes``: every experience brings classes of its own; ``instances``: every experience has all
            classes.
        classes: only the data set's first so many classes are used; 0 for all.
        first_classes: so many classes make the first experience; 0 for an equal share.
        first_fixed: whether these are the data set's own first ones, whatever the seed.
        exemplar_bytes: what the strategy ``impostor`` compresses an image to; 0: nothing.
        head_options: options of the heads that vote with Gaussian kernels, as far as they have them, by name. The small
            network for digits learns from the vote alone, and forgets less that way; larger ones learn too slowly by
            it, and follow their samples better with tied centers than with loose ones. Their classes are told apart
            better by Mahalanobis distances and many neighbours, as the noise of a single one grows with whitening.
    """

    name: str
    dataset: str
    experiences: int
    backbone: str
    augment: str
    batch_size: int
    memory: int
    epochs: int
    learning_rate: float
    description: str
    kind: Literal["classes", "instances"] = "classes"
    classes: int = 0
    first_classes: int = 0
    first_fixed: bool = False
    exemplar_bytes: int = 0
    head_options: tuple[tuple[str, Any], ...] = KERNEL_HEADS


def _spec(
    name: str,
    dataset: str,
    experiences: int,
    memory: int,
    description: str,
    *,
    backbone: str = "slim_resnet18",
    augment: str = "crop-flip",
    epochs: int = 1,
    learning_rate: float = 0.1,
    classes: int = 0,
    first_classes: int = 0,
    first_fixed: bool = False,
    head_options: tuple[tuple[str, Any], ...] = KERNEL_HEADS,
) -> StreamSpec:
    return StreamSpec(
        name,
        dataset,
        experiences,
        backbone,
        augment,
        32,
        memory,
        epochs,
        learning_rate,
        description,
        classes=classes,
        first_classes=first_classes,
        first_fixed=first_fixed,
        exemplar_bytes=384 if dataset.startswith("cifar") else 0,
        head_options=head_options,
    )


_SPECS = (
    _spec(
        "split-digits",
        "digits",
        5,
        200,
        "scikit-learn's bundled 8x8 digits, 5 x 2 classes; no download",
        backbone="convnet",
        augment="crop",
        epochs=5,
        learning_rate=0.05,
        head_options=(("auxiliary", 0.0),),
    ),
    _spec(
        "split-mnist",
        "mnist",
        5,
        500,
        "MNIST, 5 x 2 classes",
        backbone="convnet",
        augment="crop",
        learning_rate=0.05,
    ),
    _spec(
        "split-fmnist",
        "fmnist",
        5,
        500,
        "Fashion-MNIST, 5 x 2 classes",
        backbone="convnet",
        learning_rate=0.05,
    ),
    _spec("split-cifar10", "cifar10", 5, 1000, "CIFAR-10, 5 x 2 classes"),
    _spec("split-cifar100", "cifar100", 10, 2000, "CIFAR-100, 10 x 10 classes"),
    _spec("split-cifar100-20x5", "cifar100", 20, 2000, "CIFAR-100, 20 x 5 classes"),
    _spec(
        "split-cifar110",
        "cifar110",
        6,
        2000,
        "CIFAR-10, then five experiences of ten CIFAR-100 classes (Zenke et al. 2017)",
        classes=60,
        first_classes=10,
        first_fixed=True,
    ),
    _spec(
        "split-cifar110-11x10",
        "cifar110",
        11,
        2000,
        "CIFAR-10, then all of CIFAR-100, ten classes at a time",
        classes=110,
        first_classes=10,
        first_fixed=True,
    ),
    _spec(
        "core50",
        "core50",
        9,
        2000,
        "CORe50, New Classes: ten of 50 objects, then five at a time (Lomonaco and Maltoni 2017)",
        first_classes=10,
    ),
)
STREAMS: dict[str, StreamSpec] = {spec.name: spec for spec in _SPECS}


def list_streams() -> list[StreamSpec]:
    """The streams with a name of their own; `stream_spec` also takes ``images:DIR`` and
    ``new-instances:STREAM``."""
    return list(STREAMS.values())


def stream_spec(name: str) -> StreamSpec:
    """What is known of a stream before its data are read.

    Args:
        name: one of `list_streams`; ``images:DIR``, any folder of class folders, whose experiences are five
            or half the number of classes, whichever is less, but at least two, and whose backbone is
            ``convnet`` for images below 32 pixels (both settled by `make_stream`); or
            ``new-instances:STREAM``, the same data in five experiences that all have all classes.

    Raises:
        UnknownNameError: if there is no such stream.
    """
    if name.startswith(NEW_INSTANCES):
        base = stream_spec(name.removeprefix(NEW_INSTANCES))
        if base.kind == "instances":
            raise ConfigError(f"{name}: {base.name} is itself a stream of new instances; name a split- stream")
        text = f"new instances of known classes: {base.description.split(',')[0]}, 5 experiences"
        return replace(base, name=name, kind="instances", experiences=5, first_classes=0, description=text)
    if name.startswith("images:"):
        return _spec(name, name, 5, 1000, "a folder of class folders, split by class")
    if name not in STREAMS:
        raise unknown_name("stream", name, [*STREAMS, "images:DIR", f"{NEW_INSTANCES}STREAM"])
    return STREAMS[name]
