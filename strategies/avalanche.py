"""Avalanche's own strategies behind the runner's settings. Importing this module imports Avalanche.

They get the same backbone from the same seed, the same optimizer, batches, exemplar budget and augmentation as ours;
what only they know is set to the values named here. A dense classifier has an output for every class of the stream from
the start, and classes not seen yet are not masked at test, as in Avalanche; a classifier by class means or LDA answers
among the classes seen. They compute in float32 as Avalanche does, and in bfloat16 where that is asked for by name.

Where exemplars are to be compressed, the benchmark's training images come as they are after that, new ones too, as our
own strategies see them. Avalanche keeps exemplars as places in the data set: what they would take is counted, not held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, final

import torch
from avalanche.models import SCRModel
from avalanche.training.losses import ICaRLLossPlugin
from avalanche.training.plugins import EWCPlugin, GDumbPlugin, ReplayPlugin, SynapticIntelligencePlugin
from avalanche.training.supervised import DER, ER_ACE, SCR, Cumulative, ICaRL, JointTraining, Naive, StreamingLDA
from torch import Tensor, nn
from torchvision.transforms import v2

from nnheads.attach import attach_head
from nnheads.strategies.avalanche_learner import AvalancheLearner, Features, Kept, Lowered
from nnheads.strategies.avalanche_options import DEROptions, GDumbOptions
from nnheads.strategies.averaged import module_bytes
from nnheads.strategies.learner import Learner, Setup
from nnheads.strategies.plugins import GEM, AveragedWeights, LastSamples, StepReport, silent_evaluator
from nnheads.strategies.views import ContrastiveViews

EWC_LAMBDA: Final = 1.0
SI_LAMBDA: Final = 1.0
GEM_STRENGTH: Final = 0.5
SCR_PROJECTION: Final = 128
EVAL_BATCH: Final = 256


# ---- factories ---------------------------------------------------------------------------------------------------


def naive(setup: Setup) -> Learner:
    """Plain fine-tuning."""
    return AvalancheLearner(setup, Naive(**_common(setup)))


def replay(setup: Setup) -> Learner:
    """Avalanche's Replay: `ReplayPlugin` as its strategy of that name has it, with the batch sizes given."""
    plugin = ReplayPlugin(_exemplars(setup), batch_size=setup.batch_size, batch_size_mem=setup.replay_batch)
    return AvalancheLearner(setup, Naive(**_common(setup, plugin)), lambda: Kept(len(plugin.storage_policy.buffer)))


class _ReplaysWhatThereIs:
    """ER-ACE and DER replay nothing at all while they hold fewer exemplars than a batch of them: here as many as they
    hold."""

    storage_policy: Any
    _held: int | None = None

    @property
    def batch_size_mem(self) -> int:
        """Replayed samples a step."""
        if self._held is None:  # once an experience, as Avalanche puts its buffer together at each look
            self._held = len(self.storage_policy.buffer)
        return min(self._asked, self._held) if self._held else self._asked

    @batch_size_mem.setter
    def batch_size_mem(self, asked: int) -> None:
        self._asked = asked

    def _before_training_exp(self, **kwargs: Any) -> None:
        self._held = None
        super()._before_training_exp(**kwargs)  # type: ignore[misc]  # of the strategy that it is mixed into


@final
class _ErAce(_ReplaysWhatThereIs, ER_ACE):  # type: ignore[misc]  # Avalanche is not typed
    pass


@final
class _Der(_ReplaysWhatThereIs, DER):  # type: ignore[misc]
    pass


def er_ace(setup: Setup) -> Learner:
    """ER-ACE."""
    strategy = _ErAce(mem_size=_exemplars(setup), batch_size_mem=setup.replay_batch, **_common(setup))
    return AvalancheLearner(setup, strategy, lambda: Kept(len(strategy.storage_policy.buffer)))


def der(setup: Setup) -> Learner:
    """DER++; a logit vector is kept with each exemplar."""
    options = DEROptions(**setup.strategy_options)
    logits = 4 * setup.num_classes
    strategy = _Der(
        mem_size=_exemplars(setup, logits),
        batch_size_mem=setup.replay_batch,
        alpha=options.alpha,
        beta=options.beta,
        **_common(setup),
    )

    def kept() -> Kept:
        held = len(strategy.storage_policy.buffer)
        return Kept(held, (("logits", held * logits),))

    return AvalancheLearner(setup, strategy, kept)


def icarl(setup: Setup) -> Learner:
    """ICaRL; its exemplars decide by the nearest class mean.

    Its loss is a mean over the outputs of all classes, where cross-entropy is one number a sample: the learning rate is
    multiplied by the number of classes, so that it means what it means to the others. The authors' 2 for 100 classes is
    0.02 here.
    """
    sizes = [int(n) for n in setup.benchmark.n_classes_per_exp]
    memory = _exemplars(setup)
    features = _features(setup)
    settings = _common(setup, model=features)
    classifier = nn.Linear(features.headed.in_features, setup.num_classes)
    settings["optimizer"].add_param_group({"params": list(classifier.parameters())})
    for group in settings["optimizer"].param_groups:
        group["lr"] *= setup.num_classes
    del settings["model"], settings["criterion"]
    strategy = ICaRL(
        feature_extractor=features,
        classifier=classifier,
        memory_size=memory,
        buffer_transform=_crop_flip(setup),
        fixed_memory=True,
        **settings,
    )
    [plugin] = [p for p in strategy.plugins if type(p).__name__ == "_ICaRLPlugin"]
    # It would make room for as many classes as there are in the stream, whatever their numbers.
    plugin.class_means = {
        label: torch.zeros(features.headed.in_features, device=setup.device) for label in range(setup.num_classes)
    }
    [distillation] = [p for p in strategy.plugins if isinstance(p, ICaRLLossPlugin)]

    def before(experience: int) -> None:
        # Avalanche leaves the network that teaches in training mode: its answers would depend on the batch, most of
        # which are new classes. The module around it decides by its mode what answers, and stays as it is.
        if distillation.old_model is not None:
            distillation.old_model.feature_extractor.eval()
        # It rounds each class's share up, which would exceed the budget: here the shares come out whole.
        seen = sum(sizes[: experience + 1])
        plugin.memory_size = memory // seen * seen

    def kept() -> Kept:  # the teacher is the network itself between experiences
        return Kept(sum(len(x) for x in plugin.x_memory))

    return AvalancheLearner(setup, strategy, kept, own_scores=lambda x: strategy.model(x), before=before)


def gdumb(setup: Setup) -> Learner:
    """GDumb: the passes of an experience go over the exemplars, and begin with the first weights."""
    options = GDumbOptions(**setup.strategy_options)
    memory = _exemplars(setup)
    plugin = GDumbPlugin(memory)
    passes = LastSamples(options.last_samples, len(setup.benchmark.train_stream))
    strategy = Naive(**_common(setup, plugin, passes))  # in this order: after it has chosen what is trained on
    # the first weights are those of a seed
    return AvalancheLearner(setup, strategy, lambda: Kept(len(plugin.storage_policy.buffer)))


def scr(setup: Setup) -> Learner:
    """Supervised contrastive replay, without the review trick, with its authors' views beside the stream's own
    augmentation; its exemplars decide by the nearest class mean."""
    features = _features(setup)
    width = features.headed.in_features
    projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, SCR_PROJECTION))
    settings = _common(setup, model=SCRModel(feature_extractor=features, projection=_Unit(projection)))
    del settings["criterion"]
    strategy = SCR(
        augmentations=ContrastiveViews(setup.preprocessing, flip=setup.augment == "crop-flip"),
        mem_size=_exemplars(setup),
        batch_size_mem=setup.replay_batch,
        **settings,
    )

    def kept() -> Kept:
        return Kept(len(strategy.replay_plugin.storage_policy.buffer), (("projection", module_bytes(projection)),))

    def before(experience: int) -> None:
        # Means are to be those of the exemplars as the network sees them now. Avalanche would average them with the
        # means that networks before it saw.
        strategy.model.eval_classifier.class_means_dict.clear()

    return AvalancheLearner(setup, strategy, kept, own_scores=lambda x: strategy.model(x), before=before)


def slda(setup: Setup) -> Learner:
    """Streaming LDA on the backbone as it is: worth something with a pretrained one only."""
    features = _features(setup).requires_grad_(False)
    settings = _common(setup)
    for name in ("model", "optimizer"):
        del settings[name]
    strategy = StreamingLDA(
        slda_model=features,
        input_size=features.headed.in_features,
        num_classes=setup.num_classes,
        **{**settings, "train_epochs": 1},
    )
    parts = (("class_means", 4 * strategy.muK.numel()), ("covariance", 4 * strategy.Sigma.numel()))
    return AvalancheLearner(
        setup,
        strategy,
        lambda: Kept(0, parts),
        own_scores=lambda x: strategy.predict(strategy.model(x)),
    )


def ewc(setup: Setup) -> Learner:
    """EWC with a penalty for each old experience."""
    plugin = EWCPlugin(EWC_LAMBDA)

    def kept() -> Kept:
        saved = [*plugin.saved_params.values(), *plugin.importances.values()]
        return Kept(0, (("importances", sum(_data_bytes(part.values()) for part in saved)),))

    return AvalancheLearner(setup, Naive(**_common(setup, plugin)), kept)


def gem(setup: Setup) -> Learner:
    """GEM; the budget is shared out evenly over the experiences of the stream."""
    plugin = GEM(max(1, _exemplars(setup) // len(setup.benchmark.train_stream)), GEM_STRENGTH)
    return AvalancheLearner(
        setup,
        Naive(**_common(setup, plugin)),
        lambda: Kept(sum(len(x) for x in plugin.memory_x.values())),
    )


def si(setup: Setup) -> Learner:
    """Synaptic intelligence."""
    plugin = SynapticIntelligencePlugin(SI_LAMBDA)

    def kept() -> Kept:
        saved = [*plugin.ewc_data, plugin.syn_data["cum_trajectory"]]
        return Kept(0, (("importances", sum(_data_bytes(part.values()) for part in saved)),))

    return AvalancheLearner(setup, Naive(**_common(setup, plugin)), kept)


def joint(setup: Setup) -> Learner:
    """All experiences at once, when the first one is asked for."""
    return AvalancheLearner(setup, JointTraining(**_common(setup)), at_once=True)


def cumulative(setup: Setup) -> Learner:
    """Each experience together with all before it: all images seen are kept."""
    strategy = Cumulative(**_common(setup))
    return AvalancheLearner(setup, strategy, lambda: Kept(len(strategy.dataset) if strategy.dataset else 0))


# ---- what they share ---------------------------------------------------------------------------------------------


@final
class _Unit(nn.Module):
    """A projection onto the unit sphere, where the contrastive loss compares."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.normalize(self.projection(z), dim=1)


def _common(setup: Setup, *plugins: Any, model: nn.Module | None = None) -> dict[str, Any]:
    """The keyword arguments that every strategy takes."""
    if model is None:
        # as it is, unless asked for: nobody else's time or numbers are changed unknowingly
        model = setup.backbone if setup.precision == "auto" else Lowered(setup.backbone, setup.precision)
    all_plugins = list(plugins)
    if setup.ema is not None:
        all_plugins.append(AveragedWeights(setup.ema))
    if setup.on_step is not None:
        all_plugins.append(StepReport(setup.on_step))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=setup.learning_rate),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": setup.batch_size,
        "train_epochs": setup.epochs,
        "eval_mb_size": EVAL_BATCH,
        "device": setup.device,
        "plugins": all_plugins,
        "evaluator": silent_evaluator(),
    }


def _features(setup: Setup) -> Features:
    return Features(attach_head(setup.backbone, "dense", num_classes=setup.num_classes), setup.precision)


def _exemplars(setup: Setup, beside: int = 0) -> int:
    """How many may be kept; compressed, as many as fit the bytes of so many images that are not.

    Args:
        setup: the settings.
        beside: bytes kept with each exemplar.
    """
    if setup.exemplar_bytes is None:
        return setup.memory
    return setup.memory * setup.image_bytes // (setup.exemplar_bytes + beside)


def _crop_flip(setup: Setup) -> Callable[[Tensor], Tensor]:
    """The stream's augmentation for an image that is normalised already."""
    steps: list[Callable[[Tensor], Tensor]] = [v2.Identity()]
    height, width = setup.preprocessing.size
    if setup.augment != "none":
        # black, as around new images, which are cropped before: a border of another colour would tell the two apart
        black = [-mean / std for mean, std in zip(setup.preprocessing.mean, setup.preprocessing.std, strict=True)]
        steps.append(v2.RandomCrop([height, width], padding=max(1, height // 8), fill=black))
    if setup.augment == "crop-flip":
        steps.append(v2.RandomHorizontalFlip())
    composed: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return composed


def _data_bytes(params: Iterable[Any]) -> int:
    return sum(p.data.numel() * p.data.element_size() for p in params)
