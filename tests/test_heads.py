"""Every registered head, and the options that change its course, under the contract suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nnheads.errors import ConfigError, ShapeError, UnknownNameError
from nnheads.heads import Head, MemoryHead, build_head, list_heads, register_head, registry
from nnheads.index import APPROXIMATE, ENGINES
from nnheads.testing import check_head, head_checks

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in list_heads()},
    "dense-hidden": ("dense", {"hidden": [12, 8], "activation": "tanh"}),
    "dense-nobias": ("dense", {"bias": False}),
    "knn-1": ("knn", {"k": 1}),
    "knn-l1": ("knn", {"k": 5, "metric": "l1"}),
    "knn-cosine": ("knn", {"k": 5, "metric": "cosine"}),
    "knn-pca": ("knn", {"k": 5, "pca": 4}),
    "knn-pca-normalized": ("knn", {"k": 5, "pca": 4, "normalize": True}),
    "knn-distance": ("knn", {"k": 5, "vote": "distance"}),
    "knn-gaussian": ("knn", {"k": 5, "vote": "gaussian"}),
    "nca-log": ("nca", {"objective": "log", "distance": "sqeuclidean", "k": 4}),
    "nca-subset": ("nca", {"per_class": 8, "normalize": True, "vote": "gaussian", "sigma": 0.5}),
    "nca-few": ("nca", {"per_class": 3}),
    "nngk-normalized": ("nngk", {"k": 6, "normalize": True, "sigma": "learned"}),
    "nngk-plain": ("nngk", {"k": 6, "weights": False, "track": False}),
    "impostor-tied": ("impostor", {"k": 6, "centers": "tied"}),
    "nngk-whitened": ("nngk", {"k": 6, "whiten": 0.3}),
    "nngk-whitened-all": ("nngk", {"whiten": 0.3}),
    "impostor-whitened": ("impostor", {"k": 6, "centers": "tied", "whiten": 0.1}),
    "impostor-whitened-codes": ("impostor", {"k": 6, "centers": "tied", "whiten": 1.0, "bytes_per_center": 16}),
    "impostor-fixed": ("impostor", {"k": 6, "centers": "fixed", "normalize": True}),
    "impostor-learned": ("impostor", {"k": 6, "sigma": "learned", "floor": 1e-4}),
    "impostor-sigma": ("impostor", {"sigma": 0.2}),
    "kernel-all": ("kernel", {"k": None}),
    "kernel-learned": ("kernel", {"k": 6, "sigma": "learned", "alpha": 0.5}),
    "knn-codes": ("knn", {"k": 5, "bytes_per_center": 8}),
    "knn-codes-l1": ("knn", {"k": 5, "metric": "l1", "vote": "gaussian", "bytes_per_center": 8, "rotation": "none"}),
    "knn-codes-cosine": ("knn", {"k": 5, "metric": "cosine", "bytes_per_center": 8, "code_bits": 4}),
    "knn-codes-pca": ("knn", {"k": 5, "pca": 8, "bytes_per_center": 8}),
    "nngk-codes": ("nngk", {"k": 5, "bytes_per_center": 8}),
    "nngk-codes-opq": ("nngk", {"k": 6, "normalize": True, "bytes_per_center": 16, "rotation": "opq"}),
    "impostor-codes": ("impostor", {"k": 6, "bytes_per_center": 8}),
    "impostor-codes-tied": ("impostor", {"k": 8, "centers": "tied", "bytes_per_center": 8, "rotation": "pca:12"}),
    "impostor-codes-fixed": ("impostor", {"centers": "fixed", "sigma": "learned", "bytes_per_center": 8}),
    "biased-few": ("biased", {"k": 5, "per_class": 8, "normalize": True, "holdout": 0.3}),
    "biased-fewer": ("biased", {"per_class": 3}),
    "biased-threshold": ("biased", {"k": 4, "threshold": 0.5, "gate_sigma": 0.3, "per_class": None}),
    "knn-torch": ("knn", {"k": 5, "engine": "torch"}),
    "nngk-faiss": ("nngk", {"k": 6, "engine": "faiss"}),
    **{f"nngk-{engine}": ("nngk", {"k": 6, "engine": engine}) for engine in APPROXIMATE},  # exact for so few centers
}


@pytest.mark.parametrize("check", head_checks())
@pytest.mark.parametrize("variant", VARIANTS)
def test_contract(variant: str, check: str) -> None:
    name, options = VARIANTS[variant]
    if check == "double" and options.get("engine") == "faiss":
        pytest.skip("FAISS searches float32 only, and the index says so")
    head_checks()[check](name, **options)


@pytest.fixture
def broken() -> Iterator[type[Head]]:
    """A head that gets most of the contract wrong."""

    class BrokenHead(Head):
        uses_memory = False
        differentiable = False  # it is
        trains_with = "objective"

        def __init__(self, in_features: int, num_classes: int, *, scale: float = 1.0) -> None:
            super().__init__(in_features, num_classes)
            self.weight = torch.nn.Parameter(torch.randn(in_features, num_classes))

        def config(self) -> dict[str, Any]:
            return {}

        def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
            return z.to(self.weight.dtype) @ self.weight  # not normalized

    register_head("broken")(BrokenHead)
    yield BrokenHead
    del registry._HEADS["broken"]


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("output", "do not sum to one"),
        ("flags", "differentiable is False"),
        ("configuration", r"config\(\) gives"),
        ("unseen_class", "output is"),
    ],
)
@pytest.mark.usefixtures("broken")
def test_checks_catch_a_broken_head(check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says) as caught:
        head_checks()[check]("broken", scale=2.0)
    assert str(caught.value).startswith(f"head 'broken' {{'scale': 2.0}}: {check}: ")


@pytest.mark.usefixtures("broken")
def test_check_head_stops_at_a_broken_head() -> None:
    with pytest.raises(AssertionError):
        check_head("broken")


def test_check_head_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    check_head("dense")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("broken")
def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="already registered by"):

        @register_head("broken")
        class Other(Head):
            pass


def test_unknown_names_are_answered() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown head 'nngkk'; known: .*; did you mean 'nngk'"):
        build_head("nngkk", 4, 2)
    with pytest.raises(ConfigError, match="has no option 'kk'; options: k, "):
        build_head("knn", 4, 2, kk=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("knn", {"k": 0}),
        ("knn", {"k": 2.5}),
        ("knn", {"k": True}),
        ("knn", {"metric": "l3"}),
        ("knn", {"vote": "loud"}),
        ("knn", {"pca": 9}),
        ("knn", {"pca": 0}),
        ("knn", {"smoothing": 0}),
        ("knn", {"vote": "gaussian", "sigma": "learned"}),
        ("nca", {"objective": "other"}),
        ("nca", {"distance": "l1"}),
        ("nca", {"per_class": 0}),
        ("nca", {"k": -1}),
        ("nca", {"k": 0}),
        ("nngk", {"sigma": "wide"}),
        ("nngk", {"sigma": 0}),
        ("nngk", {"sigma": float("nan")}),
        ("nngk", {"floor": 0.0}),
        ("nngk", {"floor": 0.5}),
        ("nngk", {"engine": "annoy"}),
        ("impostor", {"centers": "free"}),
        ("impostor", {"tie": -1}),
        ("impostor", {"center_lr": -1}),
        ("biased", {"per_class": 0}),
        ("biased", {"projector": {"kind": "deep", "dim": 2}}),
        ("biased", {"projector": {"kind": "pooled", "shape": [3], "dim": 8}}),
        ("kernel", {"alpha": 0}),
        ("kernel", {"k": 0}),
        ("dense", {"hidden": [0]}),
        ("dense", {"activation": "sin"}),
    ],
)
def test_impossible_options_are_refused_in_one_line(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_head(name, 8, 3, **options)
    assert "\n" not in str(caught.value)


def test_heads_take_every_engine_and_name_them() -> None:
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(5600, 8, generator=generator), torch.randint(0, 3, (5600,), generator=generator)
    answers = {}
    for engine in (*ENGINES, *APPROXIMATE):
        head = build_head("nngk", 8, 3, k=6, engine=engine).eval()
        assert head.config()["engine"] == engine
        head.memorize(z[:-100], y[:-100])
        answers[engine] = head(z[-100:]).argmax(1)
    for engine, found in answers.items():
        assert (found == answers["torch"]).double().mean() >= (1 if engine in ENGINES else 0.9), engine
    with pytest.raises(UnknownNameError, match="known: auto, faiss, hnsw, ivf, pq, torch; did you mean 'hnsw'"):
        build_head("knn", 8, 3, engine="hnws")


@pytest.mark.parametrize("name", [name for name in list_heads() if build_head(name, 4, 2).uses_memory])
@pytest.mark.parametrize("k", [0, -1])
def test_neighbors_refuses_k_below_one(name: str, k: int) -> None:
    head = build_head(name, 4, 2).eval()
    assert isinstance(head, MemoryHead)
    head.add(torch.randn(6, 4), torch.arange(6) % 2)
    with pytest.raises(ConfigError, match="k must be"):
        head.neighbors(torch.randn(2, 4), k=k)


def test_principal_components_need_samples_enough() -> None:
    y = torch.arange(300) % 3
    z = torch.randn(300, 32) * 0.1 + torch.eye(32)[y] * 3
    head = build_head("knn", 32, 3, pca=2, k=5).eval()
    assert isinstance(head, MemoryHead)
    with pytest.raises(ShapeError, match="1 samples are too few for the axes of pca=2: store 3 or more first"):
        head.add(z[:1], y[:1])
    with pytest.raises(ShapeError):
        head.add(z[:9], y[:9] - 1)
    assert not len(head.memory)
    head.add(z[:200], y[:200])
    assert (head(z[200:]).argmax(1) == y[200:]).float().mean() > 0.95
    head.add(z[200:201], y[200:201])
