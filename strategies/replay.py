"""Replay of exemplars for any head, on Avalanche's training template.

Importing this module imports Avalanche, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from nnheads import distributed
from nnheads.averaging import WeightAverage
from nnheads.data import (
    Augmentation,
    BatchLoader,
    ImageSet,
    Preprocessing,
    crop_flip,
    get_augmentation,
    leaves_one,
    materialize,
)
from nnheads.devices import Precision, autocast_for, prefers_channels_last
from nnheads.errors import ConfigError, DataError
from nnheads.headed import HeadedModel
from nnheads.heads.base import Head
from nnheads.heads.memory_head import MemoryHead
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.items import IDS_WANTED, check_classes_are_apart, has_ids
from nnheads.strategies.plugins import check_sees_no_outputs, silent_evaluator
from nnheads.strategies.refill import EMBED_BATCH, check_finite, refill
from nnheads.strategies.replay_loader import OfOneTask, ReplayLoader
from nnheads.strategies.views import ContrastiveViews

_CHECKED: Final = 50  # steps of a GPU between two looks at the embeddings


class ReplayStrategy(SupervisedTemplate):  # type: ignore[misc]  # Avalanche is not typed
    """Each step: a batch of new samples and one from a class-balanced `ExemplarBuffer`, trained by the head's own loss.

    New samples are offered to the buffer as they come, and the memory of a head that trains on its centers holds the
    samples of the buffer all the time, so that new classes have centers from their first step and the budget holds for
    centers too. A center enters with the embedding of that step, and centers from before whose samples the buffer does
    not hold leave before the first. After each experience the memory is filled anew with
    exactly the buffer's samples, embedded in evaluation mode.

    Works on any Avalanche benchmark whose items are ``(x, y, id)``, or ``(x, y, id, t)`` with a task label, with raw
    uint8 images; an id stands for one sample of the whole stream, not of an experience. Task labels are not looked at:
    one head has all classes, so equal labels are one class whatever the task.

    Metrics, loggers, ``eval_every`` and Avalanche's plugins that look at weights, losses and metrics work as usual
    (SynapticIntelligence, LRScheduler, EarlyStopping), and so do plugins of your own that need no more. In training
    ``mb_output`` is the embeddings, or with an evaluator that has metrics the head's output without a gradient,
    computed a second time, which changes nothing of what is learned. So plugins that build a loss on it, give the
    model the images of ``adapted_dataset`` or replay (LwF, EWC, MAS, RWalk, GEM, A-GEM, Replay and the like) cannot
    work and are refused.

    Args:
        model: backbone and head; the head has room for all classes, or widens as they come.
        buffer: the exemplars.
        preprocessing: what is done to the images; None for the model's own.
        augment: what is done to a batch of images in training, or its name; see `nnheads.data.get_augmentation`.
        learning_rate: of SGD, constant; 0.1 by default.
        replay_batch: replayed samples a step; None for as many as new ones, 0 for none.
        seed: of order, augmentation and replay.
        precision: see `nnheads.training.autocast_for`.
        views: 2 for a second view of each image in a batch, see `nnheads.strategies.views.ContrastiveViews`, which is a
            gradient sample too; 1 for the batch as it is.
        replay_dropped: whether exemplars that make room for an experience's own are replayed until its end, as
            Avalanche's Replay does, which makes room only then; what is removed from the buffer between experiences is
            not. Their centers leave at once, and what is kept between experiences is the same; during one a copy of
            the exemplars that it began with is held.
        ema: decay of an average of the weights over the steps of an experience, which takes their place at its end, so
            that it answers and the next experience goes on from it: between experiences there is one set of weights.
            None for none.
        train_mb_size, train_epochs, eval_mb_size, device, plugins, evaluator, eval_every: as in Avalanche.

    Attributes:
        intake: classes whose new samples are offered to the buffer; None for all.
        further_loss: of the images and embeddings of a batch; added to the loss.

    Raises:
        ConfigError: settings or plugins that cannot work.
    """

    dataloader: Any
    mbatch: Any

    def __init__(
        self,
        *,
        model: HeadedModel,
        buffer: ExemplarBuffer,
        preprocessing: Preprocessing | None = None,
        augment: Augmentation | str = "none",
        learning_rate: float = 0.1,
        replay_batch: int | None = None,
        seed: int = 0,
        precision: Precision = "auto",
        views: int = 1,
        replay_dropped: bool = True,
        ema: float | None = None,
        train_mb_size: int = 32,
        train_epochs: int = 1,
        eval_mb_size: int = EMBED_BATCH,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: Any = None,
        eval_every: int = -1,
    ) -> None:
        where = torch.device(device)
        self.channels_last = prefers_channels_last(where, precision)
        model.to(where)
        if self.channels_last:
            model.backbone.to(memory_format=torch.channels_last)
        if views not in (1, 2):
            raise ConfigError(f"views must be 1 or 2, not {views!r}")
        if ema is not None and not 0 < ema < 1:
            raise ConfigError(f"ema must be between 0 and 1, not {ema}")
        check_sees_no_outputs(type(self).__name__, plugins or ())
        preprocessing = preprocessing or model.preprocessing
        if preprocessing is None:
            raise ConfigError("the strategy gets raw images: give preprocessing=, here or to attach_head")
        self.ema = ema
        self.average: WeightAverage | None = None
        groups = [{"params": list(model.backbone.parameters())}, *model.head.param_groups(learning_rate)]
        super().__init__(
            model=model,
            optimizer=torch.optim.SGD(groups, lr=learning_rate),
            criterion=nn.NLLLoss(),
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=silent_evaluator() if evaluator is None else evaluator,
            eval_every=eval_every,
        )
        self.preprocessing = preprocessing
        self.augment = get_augmentation(augment) if isinstance(augment, str) else augment
        self.buffer = buffer
        self.replay_batch = train_mb_size if replay_batch is None else replay_batch
        self.seed = seed
        self.precision = precision
        self.replay_dropped = replay_dropped
        self.second_view = ContrastiveViews(preprocessing, self.augment is crop_flip) if views == 2 else None
        self.intake: frozenset[int] | None = None
        self.further_loss: Callable[[Tensor, Tensor], Tensor] | None = None
        self.epochs_done = 0
        #: Of the experience that is learned, as the buffer counts: one that was loaded may hold samples of more
        #: experiences than this strategy has learned.
        self.experience_number = 0
        self.gradient_samples = 0
        self._data: ImageSet | None = None
        self._codes: Tensor | None = None  # its images as the buffer stores them
        self._offered = torch.zeros(0, dtype=torch.bool)  # of its samples, which the buffer was offered
        self._features = torch.zeros(0)

    @property
    def experience_data(self) -> ImageSet:
        """The images of the experience that is being learned."""
        assert self._data is not None, "no experience is being learned"
        return self._data

    @property
    def head(self) -> Head:
        """The head that is trained."""
        head: Head = self.model.head
        return head

    # ---- what Avalanche calls ------------------------------------------------------------------------------------

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Images into memory, batches augmented and normalised as a whole."""
        check_classes_are_apart(self.experience)
        self._data = data = materialize(self.adapted_dataset, self.buffer.class_names)
        identified = has_ids(self.adapted_dataset, len(self.adapted_dataset[0]))
        if not identified or len(data.ids.unique()) < len(data):
            raise DataError(IDS_WANTED)
        # Here, as the optimizer and the averaged weights take up what is new right after it.
        most = int(data.labels.max()) + 1
        if most > self.head.num_classes:
            self.head.widen(most)
        self._offered = torch.zeros(len(data), dtype=torch.bool)
        # Seen as they are beside compressed exemplars, new images would be told from old ones by what compression does
        # to them, and at test every image would look new: one run fell from 56.8 to 49.8 % so, and rose to 61.8 with
        # all images compressed.
        self._codes = self.buffer.encode(data.images) if self.buffer.keeps_images else None
        seen = data if self._codes is None else replace(data, images=self.buffer.decode(self._codes))
        loader = BatchLoader(
            seen,
            self.preprocessing,
            self.train_mb_size,
            shuffle=True,
            drop_last=leaves_one(len(seen), self.train_mb_size),
            augment=self.augment,
            seed=self.seed,
            device=self.device,
            channels_last=self.channels_last,
        )
        loader.set_epoch(self.epochs_done)
        self.experience_number = max(self.clock.train_exp_counter, self.buffer.experiences)
        self.dataloader = ReplayLoader(
            loader, self.buffer, self.replay_batch, self.experience_number, self.augment, self.replay_dropped
        )

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """The same for evaluation by Avalanche."""
        data = materialize(self.adapted_dataset)
        loader = BatchLoader(
            data, self.preprocessing, self.eval_mb_size, device=self.device, channels_last=self.channels_last
        )
        self.dataloader = OfOneTask(loader)

    def check_model_and_optimizer(self, reset_optimizer_state: bool = False, **kwargs: Any) -> None:
        """Parameters that a wider head brought join the optimizer, those they replaced leave it."""
        wanted = list(self.model.parameters())
        alive = {id(p) for p in wanted}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in alive]
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        fresh = [p for p in wanted if id(p) not in known]
        if fresh:
            self.optimizer.add_param_group({"params": fresh})

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Nothing: Avalanche adapts on test experiences too, which would tell the head of classes to come."""
        adapted: nn.Module = self.model if model is None else model
        return adapted

    def training_epoch(self, **kwargs: Any) -> None:
        """One pass over the experience."""
        super().training_epoch(**kwargs)
        self.epochs_done += 1

    def _unpack_minibatch(self) -> None:
        """The batch to the device, with its second views behind it."""
        super()._unpack_minibatch()
        if self.is_training and self.second_view is not None:
            x, *others = self.mbatch
            seen = torch.cat([x, self.second_view(x)])
            if self.channels_last:
                seen = seen.contiguous(memory_format=torch.channels_last)
            # Of the same ids: the loss leaves a sample's own center out for both.
            self.mbatch = [seen, *(torch.cat([part, part]) for part in others)]

    def forward(self) -> Tensor:
        """Embeddings of the batch, and in evaluation or for metrics the head's output."""
        if not self.is_training:
            with autocast_for(self.device, self.precision):
                log_probs: Tensor = self.model(self.mb_x)
            return log_probs
        with autocast_for(self.device, self.precision):
            self._features = distributed.features(self.model, self.mb_x).float()
        # Once they are not finite they stay so: while no centers enter, a GPU need not be waited for at each step.
        clock = self.clock
        if self.device.type == "cpu" or clock.train_exp_epochs == 0 or clock.train_iterations % _CHECKED == 0:
            check_finite(self._features)
        self.gradient_samples += len(self.mb_y)
        self._keep_new()
        if not self.evaluator.metrics:
            return self._features
        with torch.no_grad():
            output: Tensor = self.head(self._features, ids=self.mb_ids)
        return output

    def criterion(self) -> Tensor:
        """The training loss; in evaluation the negative log-likelihood."""
        if not self.is_training:
            # A test stream may have classes that the head has not met: none of them is its answer.
            missing = int(self.mb_y.max()) + 1 - self.mb_output.shape[1]
            return F.nll_loss(F.pad(self.mb_output, (0, max(0, missing)), value=-torch.inf), self.mb_y)
        loss = self.head.loss(self._features, self.mb_y, ids=self.mb_ids)
        if self.further_loss is not None:
            distributed.refuse("a loss of the old network's embeddings")
            loss = loss + self.further_loss(self.mb_x, self._features)
        return loss

    def optimizer_step(self) -> None:
        """A step of the weights, followed by the averaged ones."""
        distributed.sum_gradients(distributed.sharing(self.model).parameters())
        super().optimizer_step()
        if self.average is not None:
            self.average.update()

    def _before_training(self, **kwargs: Any) -> None:
        check_sees_no_outputs(type(self).__name__, self.plugins)  # some may have been added since
        super()._before_training(**kwargs)

    def _before_training_exp(self, **kwargs: Any) -> None:
        if isinstance(self.head, MemoryHead):
            held = self.head.memory.ids[: len(self.head.memory)].cpu()
            self.head.drop(held[~torch.isin(held, self.buffer.ids)].to(self.device))
        super()._before_training_exp(**kwargs)
        if self.ema is not None:
            self.average = WeightAverage(self.model, self.ema)

    def _after_training_exp(self, **kwargs: Any) -> None:
        self._features = torch.zeros(0)
        if self.average is not None:
            self.average.apply()
            self.average = None
        distributed.average_statistics(distributed.sharing(self.model))
        self.fill(self.model)
        super()._after_training_exp(**kwargs)
        self._data = self._codes = None  # plugins may still have looked at them

    @property
    def mb_ids(self) -> Tensor:
        """Ids of the current batch."""
        ids: Tensor = self.mbatch[2]
        return ids

    # ---- centers -------------------------------------------------------------------------------------------------

    def fill(self, model: HeadedModel) -> None:
        """Embed the buffer's samples anew as the centers of a model; without their images the centers stay."""
        if self.buffer.keeps_images:
            exemplars = self.buffer.exemplars()
            refill(model, exemplars, self.preprocessing, self.device, self.precision, self.channels_last)
        elif isinstance(model.head, MemoryHead):
            model.head.refreshed()

    def _keep_new(self) -> None:
        """Offer the new samples of the batch to the buffer; centers follow with the embeddings of this step."""
        data = self.experience_data
        rows = self.dataloader.new_rows
        # In each epoch the same would be held: which samples are is decided by their ids, see `ExemplarBuffer`.
        wanted = (~self._offered[rows]).nonzero().flatten()
        if self.intake is not None:
            classes = torch.tensor(sorted(self.intake), dtype=torch.int64)
            wanted = wanted[torch.isin(data.labels[rows[wanted]], classes)]
        if not len(wanted):
            return
        self._offered[rows[wanted]] = True
        change = self.buffer.offer(data, rows[wanted], self.experience_number, self._codes)
        head = self.head
        if not isinstance(head, MemoryHead) or head.trains_with != "output":
            return
        if len(change.left):
            left = change.left.to(self.device)
            head.drop(left[head.memory.rows_of(left) >= 0])
        if len(change.entered):
            at = wanted[change.entered].to(self.device)
            head.memorize(self._features[at].detach(), self.mb_y[at], ids=self.mb_ids[at])

    # ---- what is kept --------------------------------------------------------------------------------------------

    def memory_parts(self) -> dict[str, int]:
        """Bytes of what is kept between experiences beside one copy of the weights."""
        centers = self.head.bytes if isinstance(self.head, MemoryHead) else 0
        return {"exemplars": self.buffer.bytes, "centers": centers}
