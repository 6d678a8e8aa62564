"""What a headed model does with data: memorize, refresh, explain, train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from nnheads.attach import attach_head
from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError
from nnheads.preprocessing import Preprocessing


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def samples(n: int = 40) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 4
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1)) + 6 * F.one_hot(y, 8), y


def batches(x: Tensor, y: Tensor, size: int = 16) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), torch.arange(len(y)).split(size), strict=True))


def test_memorize_then_predict_and_explain() -> None:
    x, y = samples()
    headed = attach_head(mlp(), "knn", k=3).eval()
    headed.memorize(batches(x, y))
    assert (headed(x).argmax(1) == y).float().mean() > 0.9
    found = headed.train().explain(x[:5], k=2)
    assert headed.training
    assert found.ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.ids.shape == (5, 2)
    with pytest.raises(ConfigError, match="k must be"):
        headed.explain(x, k=0)


def test_a_head_without_memory_memorizes_nothing_and_cannot_explain() -> None:
    headed = attach_head(mlp(), "dense")
    assert headed.memorize(iter(())) is headed
    with pytest.raises(ConfigError, match=r"'dense' stores no samples.*knn"):
        headed.explain(samples()[0])


def test_refresh_replaces_the_rows_and_leaves_each_module_in_its_mode() -> None:
    x, y = samples()
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    headed = attach_head(model, "knn").train()
    model[1].eval()  # frozen
    headed.memorize(batches(x, y))
    with torch.no_grad():
        model[0].weight.mul_(2)
    headed.refresh(batches(x, y))
    assert len(headed.head.memory) == len(x)
    assert (headed.training, model[1].training, model[2].training) == (True, False, True)
    assert headed.explain(x).distances[:, 0].max() < 1e-3  # embedded without dropout, by the new weights


def test_positions_are_ids_only_where_the_order_is_known() -> None:
    x, y = samples()
    data = TensorDataset(x, y)
    headed = attach_head(mlp(), "knn")
    headed.memorize(DataLoader(data, batch_size=7))
    assert headed.explain(x[:8]).ids[:, 0].tolist() == list(range(8))
    for loader in (
        DataLoader(data, batch_size=7, shuffle=True),
        DataLoader(data, batch_size=7, sampler=SubsetRandomSampler(range(40))),
    ):
        with pytest.raises(DataError, match="with_ids"):
            headed.memorize(loader)
    assert len(headed.head.memory) == 40


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "a batch must be"),
        ((torch.zeros(2, 8), torch.zeros(2).long(), torch.zeros(2)), "integers"),
        ((torch.zeros(2, 8), torch.zeros(2).long(), torch.zeros(2).long()), "not their task"),
        ((torch.zeros(8), torch.tensor(1), torch.tensor(0)), "single samples, not batches"),
    ],
)
def test_batches_that_memorize_cannot_read(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        attach_head(mlp(), "knn").memorize([batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_prepared_before_they_are_stored(dtype: torch.dtype) -> None:
    preprocessing = Preprocessing((2, 4), 1, (0.4,), (0.2,))
    images = torch.randint(0, 256, (40, 1, 2, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(40) % 4
    headed = attach_head(mlp().to(dtype), "knn", preprocessing=preprocessing)
    headed.memorize(DataLoader(ImageSet(images, y), batch_size=7))
    embedded = headed.features(preprocessing(images).to(dtype))
    assert torch.allclose(headed.head.memory.keys[:40].to(dtype), embedded, atol=1e-6)
    headed.refresh(DataLoader(ImageSet(images, y), batch_size=7))
    assert len(headed.head.memory) == 40
    new = headed.add(images[:2], [0, 1])
    assert torch.equal(headed.explain(preprocessing(images[:2]).to(dtype), k=2).ids.max(1).values, new)
    headed.preprocessing = None
    for call in (lambda: headed.memorize([(images, y)]), lambda: headed.add(images, y)):
        with pytest.raises(ConfigError, match="how uint8 images are prepared"):
            call()


@pytest.mark.parametrize("head", ["dense", "nngk", "impostor"])
def test_the_plain_training_loop(head: str) -> None:
    x, y = samples()
    ids = torch.arange(len(y))
    headed = attach_head(mlp(), head).train().memorize(batches(x, y))
    optimizer = torch.optim.SGD(headed.parameters(), 0.1)
    losses = []
    for _ in range(8):
        loss = nn.CrossEntropyLoss()(headed(x, ids=ids), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        headed.refresh(batches(x, y))
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert headed.loss(x, y, ids=ids).ndim == 0
