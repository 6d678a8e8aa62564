"""What the center plugin needs of a model and of the data that Avalanche gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.headed import HeadedModel
from nnheads.heads.kernel_vote import KernelVoteHead
from nnheads.strategies.items import IDS_WANTED, has_ids
from nnheads.strategies.refill import EMBED_BATCH


def check_trains_by_batches(strategy: Any) -> None:
    """ConfigError for strategies of Avalanche that do not train one model on the batches of a stream with ids."""
    from avalanche.training.plugins import GDumbPlugin
    from avalanche.training.supervised import DER, ER_ACE

    kind = type(strategy).__name__
    if isinstance(strategy, DER | ER_ACE):
        raise ConfigError(f"the center plugin does not work with {kind}, which takes no ids in its batches")
    if any(isinstance(plugin, GDumbPlugin) for plugin in strategy.plugins):
        raise ConfigError(f"the center plugin does not work with {kind}, which trains another model in each experience")


def evaluation_batches(strategy: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches (x, y, ids) of D_e with the transforms of evaluation."""
    dataset = strategy.experience.dataset
    for batch in DataLoader(dataset.eval(), batch_size=EMBED_BATCH):
        if not has_ids(dataset, len(batch)):
            raise DataError(IDS_WANTED)
        yield batch[0], torch.as_tensor(batch[1]), torch.as_tensor(batch[2])


def prepared(model: HeadedModel, x: Tensor) -> Tensor:
    if x.dtype != torch.uint8:
        return x
    if model.preprocessing is None:
        raise ConfigError("raw uint8 images need attach_head(preprocessing=)")
    return model.preprocessing(x)


def with_prepared_images(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Raw images as the backbone takes them, for strategies that call their model with those of a data set."""
    if args and isinstance(model, HeadedModel) and isinstance(args[0], Tensor):
        return prepared(model, args[0]), *args[1:]
    return args


def with_batch_ids(
    strategy: Any, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The ids of the batch for a strategy that calls its model with the images alone; other images have none."""
    batch = strategy.mbatch
    own = model.training and len(args) == 1 and "ids" not in given and args[0] is batch[0]
    if own and has_ids(strategy.experience.dataset, len(batch)):
        given = {**given, "ids": strategy.mbatch[2]}
    return args, given


def record_of(labels: Tensor, ids: Tensor) -> ImageSet:
    """Labels and ids as an image set without images."""
    nothing = torch.zeros(len(ids), 0, 0, 0, dtype=torch.uint8)
    return ImageSet(nothing, labels, ids)


def positions_of(ids: Tensor, wanted: Tensor) -> Tensor:
    """Positions in ``ids`` of the ids wanted, all of which are there."""
    order = ids.argsort()
    return order[torch.searchsorted(ids[order], wanted)]


def headed_with_centers(model: Any) -> HeadedModel:
    if not isinstance(model, HeadedModel):
        raise ConfigError(f"the center plugin needs a model of attach_head, not {type(model).__name__}")
    kernel_head(model)
    return model


def kernel_head(model: HeadedModel) -> KernelVoteHead:
    if not isinstance(model.head, KernelVoteHead):
        raise ConfigError(
            f"Algorithm 1 needs a head that votes with Gaussian kernels (impostor, nngk), not {model.head.name!r}"
        )
    return model.head
