"""Compressed centers: what is kept and saved, when codebooks are trained, and what still works."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nnheads
from nnheads.code_index import CodeIndex
from nnheads.errors import ConfigError
from nnheads.functional import neighbor_distances
from nnheads.heads import MemoryHead, build_head
from nnheads.heads.compressed import compressed_head
from nnheads.quantize import ProductQuantizer
from nnheads.strategies.budget import centers_within

faiss = pytest.importorskip("faiss")


def samples(n: int = 600, width: int = 32, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    means = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    return means[y] + torch.randn(n, width, generator=generator), y, torch.arange(n)


def filled(name: str = "impostor", n: int = 600, width: int = 32, **options: object) -> MemoryHead:
    head = build_head(name, width, 4, **{"bytes_per_center": 8, **options})
    assert isinstance(head, MemoryHead)
    z, y, ids = samples(n, width)
    head.begin_refresh()
    head.memorize(z, y, ids=ids)
    head.refreshed()
    return head.eval()


def quantizer_of(head: MemoryHead) -> ProductQuantizer:
    assert head.memory.coder is not None
    assert head.memory.coder.quantizer is not None
    return head.memory.coder.quantizer


# ---- what is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["knn", "nngk", "impostor"])
def test_what_is_saved_holds_codes_and_no_center(name: str, tmp_path: Path) -> None:
    model = nnheads.attach_head(nn.Sequential(nn.Linear(32, 4)), name, bytes_per_center=8)
    z, y, ids = samples()
    model.head.memorize(z, y, ids=ids)  # no refresh: centers come as they come
    nnheads.save(model, tmp_path / "model")
    saved = (tmp_path / "model" / "head.safetensors").read_bytes()
    for row in z:
        for part in (row, row.half(), row.double()):
            assert part.numpy().tobytes() not in saved
    codes = model.head.memory.codes[:600]
    assert codes.shape == (600, 8)
    assert codes.numpy().tobytes() in saved
    again = nnheads.load(tmp_path / "model", backbone=nn.Sequential(nn.Linear(32, 4)))
    assert torch.equal(again.head(z), model.eval().head(z))


def test_saved_in_the_middle_of_a_refresh_there_is_no_center_either() -> None:
    head = filled()
    z, y, ids = samples(seed=1)
    head.begin_refresh(replace=True)
    head.memorize(z, y, ids=ids)
    assert head.state_dict()["memory.keys"].numel() == 0


def test_the_papers_size() -> None:
    """5,994 centers of 512 numbers at 16 bytes (Lebedev et al. 2018): all that the head saves."""
    head = filled(n=5994, width=512, bytes_per_center=16, rotation="pca")
    assert head.state_dict()["memory.codes"].numel() == 95_904
    everything = sum(t.numel() * t.element_size() for t in head.state_dict().values())
    assert everything <= 700_000
    assert everything == head.memory.bytes + sum(
        t.numel() * t.element_size() for name, t in head.state_dict().items() if not name.startswith("memory.")
    )


def test_few_centers_get_small_codebooks_and_fewer_none_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        few = filled(n=100)
        filled(n=7)
    assert quantizer_of(few).bits == 4
    assert few.memory.codes.shape == (100, 8)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "100 centers are too few for codebooks of 256 words: of 16 for now",
        "7 centers are too few to compress: kept as they are until there are 16",
    ]


def test_memory_counts_codes_and_codebooks() -> None:
    head = filled()
    books = sum(t.numel() * t.element_size() for t in quantizer_of(head).state().values())
    assert head.memory.bytes == 600 * (8 + 3 * 8) + books + 2 * 8 + 8  # the next id


@pytest.mark.parametrize("options", [{}, {"rotation": "none"}, {"code_bits": 4, "rotation": "opq"}])
@pytest.mark.parametrize("budget", [2_500, 9_000, 60_000])
def test_as_many_centers_fit_as_a_budget_is_said_to_hold(budget: int, options: dict[str, object]) -> None:
    head = build_head("impostor", 32, 4, bytes_per_center=8, **options)
    fitting = centers_within(budget, head)
    assert fitting > 4
    held = filled(n=fitting, **options).memory.bytes
    assert held <= budget
    assert held > 0.8 * budget or fitting == 255  # one more, and codebooks would be larger


# ---- when codebooks are trained -----------------------------------------------------------------------------------


def test_a_refresh_encodes_with_the_codebooks_there_are() -> None:
    head = filled()
    books, codes = quantizer_of(head), head.memory.codes.clone()
    z, y, ids = samples(seed=1)
    head.begin_refresh(replace=True)
    head.memorize(z, y, ids=ids)
    head.refreshed()
    assert quantizer_of(head) is books
    assert not torch.equal(head.memory.codes, codes)


def test_a_refresh_trains_codebooks_that_do_not_fit_any_more() -> None:
    head = filled()
    z, y, ids = samples(seed=1)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    head.begin_refresh(replace=True)
    head.memorize(3 * z @ turn + 7, y, ids=ids)
    head.refreshed()
    lost = (head.memory.keys_at(torch.arange(600)) - (3 * z @ turn + 7)).square().mean() / (3 * z @ turn).var()
    assert lost < 0.5


def test_centers_that_come_one_by_one_are_as_good_as_those_that_come_at_once() -> None:
    z, y, ids = samples()
    grown = build_head("impostor", 32, 4, bytes_per_center=8)
    assert isinstance(grown, MemoryHead)
    for part in torch.arange(600).split(30):
        grown.memorize(z[part], y[part], ids=ids[part])
        assert grown.memory.coded
    at_once = filled()
    errors = [(head.memory.all_keys() - z).square().mean() for head in (grown, at_once)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("follow", [True, False])
def test_codebooks_follow_embeddings_that_move_while_training(follow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not follow:
        monkeypatch.setattr("nnheads.coding.Coder.due", lambda self, held: False)
    head = filled(centers="tied").train()
    z, y, ids = samples()
    for step in range(12):
        moved = z * (1 + step / 2)
        for part in torch.randperm(600, generator=torch.Generator().manual_seed(step)).split(200):
            head.loss(moved[part], y[part], ids=ids[part])
    lost = (head.memory.all_keys() - moved).square().sum() / (moved - moved.mean(0)).square().sum()
    assert (lost < 0.1) == follow, lost


def test_a_copy_remembers_no_row_as_it_came() -> None:
    head = filled(centers="tied")
    z, y, ids = samples()
    head.train().loss(z, y, ids=ids)
    assert head.memory.coder is not None
    assert len(head.memory.coder.recent()[0]) == 600
    head.drop(ids[:100])
    assert len(head.memory.coder.recent()[0]) == 500
    twin = copy.deepcopy(head).memory.coder
    assert twin is not None
    assert not len(twin.recent()[0])


# ---- what they do -------------------------------------------------------------------------------------------------


def test_loose_compressed_centers_follow_their_samples() -> None:
    head = filled(bytes_per_center=16).train()
    z, y, ids = samples()
    target = z + 1
    before = (head.memory.all_keys() - target).square().mean()
    for _ in range(8):
        leaf = target.clone().requires_grad_()
        head.loss(leaf, y, ids=ids).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert bool(leaf.grad.any())
    assert (head.memory.all_keys() - target).square().mean() < 0.5 * before
    head.eval().loss(z, y, ids=ids)
    with torch.no_grad():
        codes = head.memory.codes.clone()
        head.train().loss(z, y, ids=ids)
    assert torch.equal(head.memory.codes, codes)


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
@pytest.mark.parametrize("rotation", ["none", "pca:16", "opq:16"])
def test_the_nearest_codes_are_found(metric: str, rotation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnheads.code_index._CHUNK_NUMBERS", 32 * 100)  # in several parts
    keys, _, _ = samples()
    quantizer = ProductQuantizer.fit(keys, 16, rotation=rotation)
    assert quantizer is not None
    codes = quantizer.encode(keys)
    index = CodeIndex(metric)  # type: ignore[arg-type]
    index.build(codes, quantizer)
    decoded = quantizer.decode(codes)
    for queries in (samples(50, seed=3)[0], samples(2, seed=3)[0]):
        everywhere = decoded.expand(len(queries), -1, -1)
        distances = neighbor_distances(queries, everywhere, metric)  # type: ignore[arg-type]
        wanted = distances.sort(dim=1).values[:, :7]
        found = distances.gather(1, index.search(queries, 7))
        assert torch.allclose(found, wanted, atol=1e-3)
    assert index.search(queries, 605)[:, 600:].eq(-1).all()


@pytest.mark.parametrize("rotation", ["none", "pca:31"])  # 31 parts: half of a byte is empty
def test_scanned_codes_are_the_nearest_and_changes_are_seen(rotation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, _, _ = samples(20_000, classes=50)
    quantizer = ProductQuantizer.fit(keys[:2000], 16, bits=4, rotation=rotation)
    assert quantizer is not None
    codes = quantizer.encode(keys)
    fast, exact = CodeIndex(), CodeIndex()
    queries = samples(200, classes=50, seed=3)[0]

    def recall(held: Tensor, k: int, asked: Tensor) -> float:
        fast.build(held, quantizer)
        exact.build(held, quantizer)
        with monkeypatch.context() as patch:
            patch.setattr("nnheads.code_index.can_scan", lambda *_: False)
            wanted = exact.search(asked, k)
        found = fast.search(asked, k)
        assert fast._scan is not None
        decoded = quantizer.decode(held)
        near, limit = (neighbor_distances(asked, decoded[rows], "l2") for rows in (found, wanted))
        return float((near <= limit[:, -1:] * (1 + 1e-5)).float().mean())  # rows of equal codes are as good

    assert recall(codes, 1, queries) >= 0.99
    assert recall(codes, 32, queries) >= 0.99
    assert recall(codes, 100, queries[:3]) >= 0.99
    codes[:5000] = codes[5000:10_000].clone()  # in place, as a memory that tracks its samples does
    codes[7000:] = 0
    assert recall(codes, 32, queries) >= 0.99
    fast.build(codes, quantizer)
    codes[7000:] = quantizer.encode(keys[:13_000])  # and with no build after it
    assert set(fast.search(keys[:3], 1).flatten().tolist()) & set(range(7000, 7003))
    assert recall(codes[:15_000], 10, queries) >= 0.99


def test_a_head_answers_as_well_by_scanned_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    head = filled("knn", n=20_000, code_bits=4, bytes_per_center=16)
    z = samples(256, seed=5)[0]
    scanned = head(z)
    head.drop(torch.arange(0, 2000, 2))
    dropped = head(z)
    monkeypatch.setattr("nnheads.code_index.can_scan", lambda *_: False)
    assert (dropped - head(z)).abs().max() < 1e-4
    assert (scanned - filled("knn", n=20_000, code_bits=4, bytes_per_center=16)(z)).abs().max() < 1e-4


def test_a_head_with_codes_takes_the_centers_of_one_without() -> None:
    z, y, ids = samples()
    raw = build_head("impostor", 32, 4)
    raw.memorize(z, y, ids=ids)
    head = build_head("impostor", 32, 4, bytes_per_center=16)
    head.load_state_dict(raw.state_dict())
    assert isinstance(head, MemoryHead)
    assert head.memory.coded
    agree = (head.eval()(z).argmax(1) == raw.eval()(z).argmax(1)).float().mean()
    assert agree > 0.97


def test_compressed_centers_are_compressed_otherwise() -> None:
    head = filled("impostor", bytes_per_center=16)
    for how in ({"bytes_per_center": 4}, {"bytes_per_center": 8, "rotation": "none", "code_bits": 4}):
        twin = compressed_head(head, **how)
        assert twin.memory.codes.shape[1] == how["bytes_per_center"]
        assert {name: twin.config()[name] for name in how} == how
        error = (twin.memory.all_keys() - head.memory.all_keys()).norm() / head.memory.all_keys().norm()
        assert 0 < error < 0.6
    assert torch.equal(compressed_head(head, 16).memory.codes, head.memory.codes)
    raw = compressed_head(head, 0)
    assert not raw.memory.coded
    assert torch.equal(raw.memory.keys, head.memory.all_keys())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bytes_per_center": 3}, "bytes_per_center must be 4 to 64, or 0 for none, got 3"),
        ({"bytes_per_center": 2.5}, "bytes_per_center must be a whole number"),
        ({"bytes_per_center": 8, "code_bits": 6}, "code_bits must be 8 or 4, got 6"),
        ({"bytes_per_center": 8, "rotation": "opk"}, "unknown rotation 'opk'"),
        ({"bytes_per_center": 8, "rotation": "pca:64"}, "DIM must be 1 to 32"),
        ({"rotation": "opq"}, "give bytes_per_center"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=f"head 'impostor': .*{says}"):
        build_head("impostor", 32, 4, **options)
    assert filled(bytes_per_center=0).memory.coder is None


def test_engines_of_raw_centers_are_refused_for_compressed_ones() -> None:
    for engine in ("faiss", "hnsw", "pq"):
        with pytest.raises(ConfigError, match=f"engine '{engine}' searches raw centers.*leave out engine or bytes"):
            build_head("impostor", 32, 4, bytes_per_center=16, engine=engine)
    z, y = torch.randn(4200, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4200) % 4
    found = {}
    for engine in ("auto", "torch"):
        head = build_head("knn", 32, 4, k=5, bytes_per_center=16, code_bits=4, engine=engine).eval()
        assert isinstance(head, MemoryHead)
        head.add(z, y)
        found[engine] = head.neighbors(z[:40]).distances
        assert isinstance(head._index, CodeIndex)
        assert head._index.scan == (engine == "auto")
    torch.testing.assert_close(found["auto"], found["torch"])
    raw = build_head("knn", 32, 4, engine="hnsw")
    assert isinstance(raw, MemoryHead)
    raw.add(z, y)
    twin = compressed_head(raw)
    assert (twin.engine, twin.memory.coded, len(twin.memory)) == ("auto", True, 4200)


def test_a_head_without_codes_takes_those_of_one_with_them() -> None:
    coded, raw = build_head("nngk", 16, 3, bytes_per_center=8), build_head("nngk", 16, 3)
    assert isinstance(coded, MemoryHead)
    assert isinstance(raw, MemoryHead)
    coded.add(torch.randn(400, 16), torch.arange(400) % 3)
    raw.add(torch.randn(20, 16), torch.arange(20) % 3)
    raw.load_state_dict(coded.state_dict())
    assert torch.equal(raw.memory.keys_at(torch.arange(400)), coded.memory.keys_at(torch.arange(400)))
    queries = torch.randn(50, 16)
    torch.testing.assert_close(raw.eval()(queries), coded.eval()(queries), atol=1e-4, rtol=1e-4)
    raw.drop([0])
