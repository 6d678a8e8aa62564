"""What is stored can be changed, whether or not the model answered, was copied or was loaded in inference mode."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nnheads import search_costs
from nnheads.attach import attach_head
from nnheads.backbones import build_backbone
from nnheads.explain import without
from nnheads.headed import HeadedModel
from nnheads.heads import MemoryHead, build_head, head_class, list_heads
from nnheads.index import build_index
from nnheads.io import load, save

MEMORIES = [name for name in list_heads() if head_class(name).uses_memory]


def points(count: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def filled(head: str, count: int = 60, **options: object) -> MemoryHead:
    made = build_head(head, 8, 5, **options).eval()
    assert isinstance(made, MemoryHead)
    made.add(points(count), torch.arange(count) % 5)
    return made


def fresh(head: MemoryHead, like: str, **options: object) -> MemoryHead:
    """The same samples in a head that has never been asked."""
    made = build_head(like, 8, 5, **options).eval()
    made.load_state_dict(head.state_dict())
    assert isinstance(made, MemoryHead)
    return made


def change(head: MemoryHead) -> None:
    head.drop([0, 1])
    head.add(points(3, seed=1), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("engine", ["auto", "torch", "ivf", "hnsw", "pq"])
def test_an_index_that_answered_in_inference_mode_follows_changes(engine: str) -> None:
    head = filled("knn", 6000, engine=engine)
    queries = points(20, seed=2)
    with torch.inference_mode():
        head(queries)
    change(head)
    exact = fresh(head, "knn", engine="torch")
    assert (head(queries).argmax(1) == exact(queries).argmax(1)).float().mean() > 0.9


def test_a_bfloat16_copy_made_in_inference_mode_follows_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_costs, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setenv("NNHEADS_SEARCH_COSTS", "default")
    keys, index, exact = points(20_000, 64), build_index("auto"), build_index("torch")
    index.build(keys)
    with torch.inference_mode():
        for _ in range(20):
            index.search(points(128, 64, seed=1), 8)
    assert getattr(index, "_half", None) is not None, "no copy was made, so that there is nothing to test"
    keys[7] = points(1, 64, seed=2)[0]
    index.update(torch.tensor([7]))
    exact.build(keys)
    queries = torch.cat([keys[7:8], points(127, 64, seed=3)])
    assert torch.equal(index.search(queries, 8), exact.search(queries, 8))


@pytest.mark.parametrize("head", MEMORIES)
def test_a_copy_made_in_inference_mode_can_be_changed(head: str) -> None:
    original = filled(head)
    with torch.inference_mode():
        made = copy.deepcopy(original)
        made.drop([5])
    change(made)
    assert len(made.memory) == 60
    assert len(original.memory) == 60
    assert 0 in original.memory.ids
    assert torch.isfinite(made(points(3))).all()


def test_a_state_loaded_in_inference_mode_can_be_changed() -> None:
    head = build_head("nngk", 8, 5)
    with torch.inference_mode():
        head.load_state_dict(filled("nngk").state_dict())
    assert isinstance(head, MemoryHead)
    change(head)
    assert len(head.memory) == 61


def small() -> HeadedModel:
    model = attach_head(build_backbone("convnet", 5, in_channels=1), "knn").eval()
    model.add(torch.rand(20, 1, 8, 8), torch.arange(20) % 5)
    return model


def test_a_model_loaded_in_inference_mode_can_be_changed(tmp_path: Path) -> None:
    save(small(), tmp_path / "model")
    with torch.inference_mode():
        model = load(tmp_path / "model")
    model.drop([0])
    model.add(torch.rand(1, 1, 8, 8), torch.tensor([1]))
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_what_if_in_inference_mode() -> None:
    model = attach_head(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), "nngk").eval()
    x = points(30)
    model.add(x, torch.arange(30) % 5)
    with torch.inference_mode(), without(model, [0, 1]) as changed:
        found = changed.explain(x[:2])
    assert not {0, 1} & set(found.ids.flatten().tolist())
    assert isinstance(model.head, MemoryHead)
    assert len(model.head.memory) == 30


def test_an_add_that_fails_stores_nothing() -> None:
    head = filled("nngk", 10)
    head.memory.labels = _inference(head.memory.labels)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        head.add(points(2), torch.tensor([1, 1]))
    assert len(head.memory) == 10
    assert head.memory.ids[:10].tolist() == list(range(10))


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([tensor, tensor.new_zeros(20)])
