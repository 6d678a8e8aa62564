"""Algorithm 1 of the review as an Avalanche plugin. Importing this module imports Avalanche."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nnheads.centers import Redistribution
from nnheads.data import BatchLoader, ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.headed import HeadedModel
from nnheads.strategies.averaged import averaged_copy
from nnheads.strategies.budget import center_bytes, centers_within
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.center_data import (
    check_trains_by_batches,
    evaluation_batches,
    headed_with_centers,
    kernel_head,
    positions_of,
    prepared,
    record_of,
    with_batch_ids,
    with_prepared_images,
)
from nnheads.strategies.center_exchange import classes_of, drop_down_to, drop_in_turn, exchange_centers
from nnheads.strategies.center_rules import CenterEvent, CenterRules
from nnheads.strategies.items import check_classes_are_apart
from nnheads.strategies.refill import EMBED_BATCH, embed_batches, refill, set_soft_labels, soft_labels
from nnheads.strategies.replay import ReplayStrategy


@final
class CenterPlugin(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is not typed
    """Centers that follow a stream of experiences D_e (review, Algorithm 1).

    ``n_t`` epochs are trained; then, with the weights frozen, the n_d best predicted centers go, the n_a worst
    predicted samples of D_e become centers and at each change labels are redistributed by influence; ``n_f`` epochs of
    fine-tuning follow. ``train_epochs`` of the strategy must be ``n_t + n_f``. Where training is stopped before n_t
    epochs, as Avalanche's EarlyStopping does, centers are exchanged then.

    Two things the algorithm leaves open. Samples come in before they are chosen, a random share by class, because a new
    class cannot be learned without centers: as they pass by where the strategy is a `ReplayStrategy`, else before the
    first epoch. And so that they have room, the old classes shrink to their share of the budget before a new class is
    trained. The budget holds at every moment.

    Works with any Avalanche strategy whose model is a `HeadedModel` with a head that votes with Gaussian kernels
    (impostor, nngk) and whose items are ``(x, y, id)``, or ``(x, y, id, t)`` with a task label, ``x`` an input of the
    model or a raw uint8 image: plain ones, Replay, EWC, SI, LwF, GEM and the like, but not ER-ACE, DER and GDumb. Where
    the strategy calls the model with the batch and no ids, the plugin hands it those of the batch. From the first
    training on, the model itself prepares raw images by the preprocessing it has, in evaluation and for other plugins
    too.

    Args:
        n_t: epochs before the update.
        n_f: epochs after it.
        budget: centers that there may be.
        budget_bytes: the same in bytes, counting what each center may take: key, label, id and soft label, and its
            image where images are kept.
        keep_images: keep the centers' images, so that all centers are embedded anew before an update and at the end of
            an experience. Otherwise only those of D_e are, and the others stay where the backbone left them.
        buffer: the images, where a strategy keeps them; its budget counts then.
        n_a, n_d, choose, drop, redistribute, ridge, rounds, balanced: see `CenterRules`. With ``n_a`` only classes
            without centers come in before they are chosen.
        seed: of what is random.

    Attributes:
        history: every change of the centers.

    Raises:
        ConfigError: settings that cannot work; some are known only when an experience begins.
    """

    def __init__(
        self,
        *,
        n_t: int = 1,
        n_f: int = 0,
        budget: int | None = None,
        budget_bytes: int | None = None,
        keep_images: bool = False,
        buffer: ExemplarBuffer | None = None,
        n_a: int | None = None,
        n_d: int | None = None,
        choose: str = "worst",
        drop: Literal["best", "random"] = "best",
        redistribute: Redistribution = "influence",
        ridge: float = 1.0,
        rounds: int = 1,
        balanced: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if n_t < 1 or n_f < 0:
            raise ConfigError(f"n_t must be 1 or more and n_f 0 or more, not {n_t} and {n_f}")
        if sum(given is not None for given in (budget, budget_bytes, buffer)) != 1:
            raise ConfigError("the center plugin needs one of budget (centers), budget_bytes and buffer")
        for name, value in (("budget", budget), ("budget_bytes", budget_bytes)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        self.rules = CenterRules(n_a, n_d, choose, drop, redistribute, ridge, rounds, balanced)
        self.n_t = n_t
        self.n_f = n_f
        self.budget = budget
        self.budget_bytes = budget_bytes
        self.keep_images = keep_images if buffer is None else buffer.keeps_images
        self.seed = seed
        self.history: list[CenterEvent] = []
        #: Whether samples come in before the first epoch; None: unless the strategy takes them as they pass by.
        self.intake_first: bool | None = None
        self._buffer = buffer
        self._hook: RemovableHandle | None = None
        self._prepares: HeadedModel | None = None  # the model that prepares raw images
        self._epochs = 0

    @property
    def buffer(self) -> ExemplarBuffer:
        """The record of the centers: ids, labels and, where they are kept, images."""
        if self._buffer is None:
            raise ConfigError("the center plugin has no centers before its strategy has trained")
        return self._buffer

    # ---- what Avalanche calls ------------------------------------------------------------------------------------

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Check what can be checked before anything is trained."""
        if not len(strategy.experience.dataset):
            raise DataError(f"experience {strategy.experience.current_experience} of the stream has no samples")
        if strategy.train_epochs != self.n_t + self.n_f:
            raise ConfigError(
                f"train_epochs must be n_t + n_f = {self.n_t} + {self.n_f}, not {strategy.train_epochs}: the centers "
                "are updated after n_t epochs"
            )
        check_trains_by_batches(strategy)
        check_classes_are_apart(strategy.experience)
        if isinstance(strategy, ReplayStrategy) and self._buffer is not strategy.buffer:
            raise ConfigError("ReplayStrategy keeps the exemplars itself: give the plugin buffer=strategy.buffer")
        model = headed_with_centers(strategy.model)
        if not isinstance(strategy, ReplayStrategy) and self._prepares is not model:
            # For good: EWC looks at images after the plugin's last word, LwF in a copy, and evaluation between.
            model.register_forward_pre_hook(with_prepared_images)
            self._prepares = model

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Make room for new classes, and let samples come in where the strategy does not do so itself."""
        self._epochs = 0
        model = headed_with_centers(strategy.model)
        if not isinstance(strategy, ReplayStrategy):
            self._hook = model.register_forward_pre_hook(
                lambda module, args, given: with_batch_ids(strategy, module, args, given),
                prepend=True,  # it knows the batch by the images that are not prepared yet
                with_kwargs=True,
            )
        data = self._data(strategy)
        if self._buffer is None:
            self._buffer = self._new_buffer(model, data)
        fresh = sorted(set(data.labels.tolist()) - set(self.buffer.classes_seen))
        classes = len(self.buffer.classes_seen) + len(fresh)
        if self.buffer.budget < classes:
            raise ConfigError(
                f"a budget of {self.buffer.budget} centers is smaller than the {classes} classes seen: give at least "
                "one center a class"
            )
        if fresh and len(self.buffer):
            self._make_room(strategy, self.buffer.budget // classes)
        known = None
        if self.rules.n_a is not None:
            known = frozenset(data.labels.tolist()) - frozenset(self.buffer.labels.tolist())
        first = self.intake_first
        if isinstance(strategy, ReplayStrategy):
            strategy.intake = known
            if not first:
                return
        self._take_in(strategy, data, known)

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """After n_t epochs, choose the centers."""
        # Counted here: whether Avalanche's clock has ticked by now depends on the order of its plugins.
        self._epochs += 1
        if self._epochs == self.n_t:
            self.update(strategy)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Embed the centers as the weights are now, choose them if training was stopped before that, and note how many
        there are."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        model = headed_with_centers(strategy.model)
        stopped = self._epochs < self.n_t  # as EarlyStopping does it
        if stopped:
            self.update(strategy)
        if not isinstance(strategy, ReplayStrategy):
            self._refresh(strategy, model, self._embed(strategy, model))
        elif stopped:
            strategy.fill(model)
        self._note(strategy, "end", torch.zeros(0).long(), torch.zeros(0).long(), 0.0)

    # ---- the algorithm -------------------------------------------------------------------------------------------

    def update(self, strategy: Any) -> None:
        """Exchange centers; the weights are not touched."""
        if not self.rules.exchanges:
            return
        model = headed_with_centers(strategy.model)
        # The average that is to answer chooses the centers; the weights that are trained are not touched.
        average = strategy.average if isinstance(strategy, ReplayStrategy) else None
        work = model if average is None else averaged_copy(model, average)
        z, y, ids = self._embed(strategy, work)
        self._refresh(strategy, work, (z, y, ids))
        head = kernel_head(work)
        before, labels = head.memory.ids[: len(head.memory)].clone(), head.memory.labels[: len(head.memory)].clone()
        done = exchange_centers(head, z, y, ids, self.rules, self.buffer.budget, self.seed)
        data = self._data(strategy)
        self.buffer.exchange(done.dropped.cpu(), data, done.added.cpu(), _experience_number(strategy))
        if average is not None:
            own = kernel_head(model)
            own.drop(done.dropped)
            strategy.fill(model)
            set_soft_labels(own, *soft_labels(head))
        if isinstance(strategy, ReplayStrategy):
            strategy.intake = frozenset()  # the choice is made: nothing comes in while fine-tuning
        dropped = labels[torch.isin(before, done.dropped)]
        self._note(strategy, "update", dropped, y[done.added], done.label_mass)

    def _make_room(self, strategy: Any, quota: int) -> None:
        """Shrink the classes known to their share of the budget."""
        model = headed_with_centers(strategy.model)
        head = kernel_head(model)
        ranks = self.buffer.ranks[positions_of(self.buffer.ids, head.memory.ids[: len(head.memory)].cpu())]
        label_of = dict(zip(self.buffer.ids.tolist(), self.buffer.labels.tolist(), strict=True))
        done = drop_down_to(head, quota, self.rules, ranks.to(head.memory.ids.device))
        gone = done.dropped.cpu()
        self.buffer.exchange(gone, record_of(gone[:0], gone[:0]), gone[:0])
        dropped = torch.tensor([label_of[i] for i in gone.tolist()], dtype=torch.int64)
        self._note(strategy, "room", dropped, gone[:0], done.label_mass)

    def _take_in(self, strategy: Any, data: ImageSet, classes: frozenset[int] | None) -> None:
        """A random share of D_e become centers."""
        rows = torch.arange(len(data))
        if classes is not None:
            rows = torch.isin(data.labels, torch.tensor(sorted(classes))).nonzero().flatten()
        if not len(rows):
            return
        model = headed_with_centers(strategy.model)
        head = kernel_head(model)
        z, y, ids = self._embed(strategy, model)
        change = self.buffer.offer(data, rows, _experience_number(strategy))
        if len(change.left):
            drop_in_turn(head, change.left.to(ids.device), self.rules)
        at = rows[change.entered].to(ids.device)
        head.add(z[at], y[at], ids[at])
        head.refreshed()

    def _refresh(self, strategy: Any, model: HeadedModel, embedded: tuple[Tensor, Tensor, Tensor]) -> None:
        """Embed the centers anew, as far as there is anything to embed."""
        head = kernel_head(model)
        if isinstance(strategy, ReplayStrategy) and self.buffer.keeps_images:
            strategy.fill(model)
        elif self.buffer.keeps_images:
            assert model.preprocessing is not None
            refill(model, self.buffer.exemplars(), model.preprocessing, strategy.device, "float32")
        else:
            z, _, ids = embedded
            rows = head.memory.rows_of(ids)
            head.memory.write(rows[rows >= 0], head.keys_of(z[rows >= 0]))
            head.refreshed()

    def _note(self, strategy: Any, moment: str, dropped: Tensor, added: Tensor, label_mass: float) -> None:
        held = classes_of(self.buffer.labels)
        experience = int(strategy.experience.current_experience)
        self.history.append(CenterEvent(experience, moment, classes_of(dropped), classes_of(added), label_mass, held))

    # ---- data ----------------------------------------------------------------------------------------------------

    def _new_buffer(self, model: HeadedModel, data: ImageSet) -> ExemplarBuffer:
        if self.keep_images and (data.images.dim() != 4 or not data.images.numel() or model.preprocessing is None):
            raise ConfigError(
                "keep_images embeds them anew: it needs raw uint8 images in the benchmark and "
                "attach_head(preprocessing=)"
            )
        shape = (data.images.shape[1], data.images.shape[2], data.images.shape[3]) if self.keep_images else None
        budget = self.budget
        if budget is None:
            assert self.budget_bytes is not None
            image = ExemplarBuffer(1, shape).row_bytes
            soft = self.rules.redistribute != "none"
            budget = centers_within(self.budget_bytes, kernel_head(model), image, soft)
            if not budget:
                each = image + center_bytes(kernel_head(model), soft, 1)
                raise ConfigError(
                    f"a budget of {self.budget_bytes} bytes does not hold a single center of {each} bytes"
                )
        return ExemplarBuffer(budget, shape, seed=self.seed)

    def _data(self, strategy: Any) -> ImageSet:
        """D_e: labels, ids and, where images are kept, images."""
        if isinstance(strategy, ReplayStrategy):
            return strategy.experience_data
        parts = list(evaluation_batches(strategy))
        ids, labels = (torch.cat([part[i] for part in parts]) for i in (2, 1))
        if len(ids.unique()) < len(ids):
            raise DataError("the ids of an experience's samples repeat: items must be (x, y, id) with an id of its own")
        if self.keep_images and parts[0][0].dtype == torch.uint8:
            return ImageSet(torch.cat([part[0] for part in parts]), labels, ids)
        return record_of(labels, ids)

    def _embed(self, strategy: Any, model: HeadedModel) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, labels and ids of D_e, without augmentation and in the order of `_data`."""
        if isinstance(strategy, ReplayStrategy):
            loader = BatchLoader(
                strategy.experience_data,
                strategy.preprocessing,
                EMBED_BATCH,
                device=strategy.device,
                channels_last=strategy.channels_last,
            )
            return embed_batches(model, loader, strategy.device, strategy.precision)
        batches = ((prepared(model, x), y, ids) for x, y, ids in evaluation_batches(strategy))
        return embed_batches(model, batches, strategy.device, "float32")


def _experience_number(strategy: Any) -> int:
    """Of the experience that is learned, as the buffer counts."""
    return int(strategy.experience_number if isinstance(strategy, ReplayStrategy) else strategy.clock.train_exp_counter)
