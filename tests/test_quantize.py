"""Product quantization: what is saved, how exact it is, and what happens with few points."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from nnheads.errors import CheckpointError, ConfigError, ShapeError
from nnheads.quantize import ProductQuantizer

faiss = pytest.importorskip("faiss")
rotations = pytest.mark.parametrize("rotation", ["none", "pca:16", "opq", "opq:16"])


def embeddings(rows: int = 600, width: int = 32, seed: int = 0) -> Tensor:
    """Correlated, of few clusters and with a mean, as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.05, width)[:, None]
    centers = 2 * torch.randn(10, width, generator=generator)
    labels = torch.randint(10, (rows,), generator=generator)
    return (centers[labels] + torch.randn(rows, width, generator=generator)) @ mixing + 1


def fit(keys: Tensor, *args: int, **options: object) -> ProductQuantizer:
    quantizer = ProductQuantizer.fit(keys, *args, **options)  # type: ignore[arg-type]
    assert quantizer is not None
    return quantizer


def error(quantizer: ProductQuantizer, keys: Tensor) -> float:
    """Squared reconstruction error over the variance."""
    wrong = (quantizer.decode(quantizer.encode(keys)) - keys).square().sum()
    return float(wrong / (keys - keys.mean(0)).square().sum())


@rotations
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("half", [False, True])
def test_saved_and_rebuilt_bit_for_bit(rotation: str, bits: int, half: bool) -> None:
    keys = embeddings()
    quantizer = fit(keys, 4, rotation=rotation, bits=bits, half_codebooks=half)
    codes = quantizer.encode(keys)
    assert codes.dtype == torch.uint8
    assert codes.shape == (600, 4)
    stored = safetensors.torch.load(safetensors.torch.save(quantizer.state()))
    again = ProductQuantizer.from_state(stored)
    assert again.codebooks.dtype == (torch.float16 if half else torch.float32)
    assert torch.equal(again.encode(keys), codes)
    assert torch.equal(again.decode(codes), quantizer.decode(codes))
    assert torch.equal(again.encode(again.decode(codes)), codes)  # a codeword's code is its own
    assert (
        again.bytes_codebook == quantizer.bytes_codebook == sum(t.numel() * t.element_size() for t in stored.values())
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_faiss_codes(bits: int) -> None:
    keys = embeddings()
    quantizer = fit(keys, 8, bits=bits)
    peer = faiss.IndexPQ(32, quantizer.parts, bits)
    faiss.copy_array_to_vector(quantizer.codebooks.numpy().ravel(), peer.pq.centroids)
    peer.is_trained = True
    codes = quantizer.encode(keys)
    np.testing.assert_array_equal(quantizer.decode(codes).numpy(), peer.sa_decode(codes.numpy()))
    assert (peer.sa_encode(keys.numpy()) == codes.numpy()).mean() > 0.999  # near-ties may fall either way


@rotations
def test_more_bytes_are_more_exact(rotation: str) -> None:
    keys = embeddings()
    errors = [error(fit(keys, size, rotation=rotation), keys) for size in (4, 8, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 0.3


def test_principal_directions_dealt_to_the_parts_are_better_than_none() -> None:
    keys = embeddings()
    assert error(fit(keys, 4, rotation="pca"), keys) < 0.8 * error(fit(keys, 4), keys)
    assert fit(keys, 4, rotation="pca").codebooks.shape == (4, 256, 4)  # four dimensions a byte


def test_a_trained_rotation_is_better_than_none() -> None:
    keys = embeddings()
    assert error(fit(keys, 4, rotation="opq"), keys) < 0.9 * error(fit(keys, 4), keys)


def test_half_precision_costs_next_to_nothing() -> None:
    keys = embeddings()
    for rotation in ("none", "opq"):
        whole, half = (fit(keys, 8, rotation=rotation, half_codebooks=flag) for flag in (False, True))
        assert error(half, keys) < 1.02 * error(whole, keys)
        assert half.bytes_codebook < 0.52 * whole.bytes_codebook


def test_values_beyond_half_precision_stay_float32() -> None:
    quantizer = fit(1e5 * embeddings(), 4, half_codebooks=True)
    assert quantizer.codebooks.dtype == torch.float32


@rotations
@pytest.mark.parametrize("bits", [4, 8])
def test_table_distances_are_distances_to_the_decoded(rotation: str, bits: int) -> None:
    keys, queries = embeddings(), embeddings(7, seed=1)
    quantizer = fit(keys, 4, rotation=rotation, bits=bits)
    codes = quantizer.encode(keys)
    exact = torch.cdist(queries.double(), quantizer.decode(codes).double()).square().float()
    close = 1e-6 * float(keys.square().sum(1).max())
    torch.testing.assert_close(quantizer.adc_distances(queries, codes), exact, rtol=1e-4, atol=close)


@rotations
@pytest.mark.parametrize(("width", "size"), [(33, 4), (50, 8), (29, 16), (19, 64)])
def test_any_width(rotation: str, width: int, size: int) -> None:
    keys = embeddings(300, width)
    for bits in (4, 8):
        quantizer = fit(keys, size, rotation=rotation, bits=bits)
        codes = quantizer.encode(keys)
        assert codes.shape[1] == quantizer.bytes_per_row <= size
        assert quantizer.decode(codes).shape == keys.shape
        assert error(quantizer, keys) < 0.35
        again = ProductQuantizer.from_state(quantizer.state())
        assert torch.equal(again.decode(codes), quantizer.decode(codes))
        exact = torch.cdist(keys[:3].double(), quantizer.decode(codes).double()).square().float()
        close = 1e-6 * float(keys.square().sum(1).max())
        torch.testing.assert_close(quantizer.adc_distances(keys[:3], codes), exact, rtol=1e-4, atol=close)


@rotations
def test_the_seed_decides(rotation: str) -> None:
    keys = embeddings()
    one, same, other = (fit(keys, 4, rotation=rotation, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.codebooks, same.codebooks)
    assert torch.equal(one.encode(keys), same.encode(keys))
    assert not torch.equal(one.codebooks, other.codebooks)


def test_few_points_fall_back_and_say_so(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    keys = embeddings()
    with caplog.at_level(logging.WARNING):
        assert fit(keys[:256], 8).bits == 8
        assert not caplog.records
        small = fit(keys[:255], 8)
        assert (small.bits, small.bytes_per_row) == (4, 8)
        assert "need 256 rows, got 255" in caplog.messages[-1]
        assert fit(keys[:16], 8, rotation="opq").bits == 4
        assert "principal directions" in caplog.messages[-1]
        assert ProductQuantizer.fit(keys[:15], 8) is None
        assert "no quantization" in caplog.messages[-1]
        assert ProductQuantizer.fit(keys[:0], 8) is None
        assert ProductQuantizer.fit(keys[:15], 8, bits=4) is None
        assert len(caplog.records) == 6
    assert capfd.readouterr().err == ""  # FAISS prints nothing of its own


def test_degenerate_and_unusual_keys() -> None:
    same = torch.full((300, 16), 3.0)
    for rotation in ("none", "opq", "pca:8"):
        quantizer = fit(same, 4, rotation=rotation)
        torch.testing.assert_close(quantizer.decode(quantizer.encode(same)), same)
    keys = embeddings().double().T.contiguous().T
    quantizer = fit(keys.requires_grad_(), 4)
    codes = quantizer.encode(keys)
    assert quantizer.decode(codes).dtype == torch.float32
    assert quantizer.encode(keys[:0]).shape == (0, 4)
    assert quantizer.decode(codes[:0]).shape == (0, 32)
    assert quantizer.adc_distances(keys[:0], codes).shape == (0, 600)
    assert quantizer.adc_distances(keys[:3], codes[:0]).shape == (3, 0)


def test_size_of_the_papers_centers() -> None:
    """5,994 centers of 512-d at 16 bytes: the codes alone, and with everything else that is saved."""
    keys = torch.randn(5994, 512, generator=torch.Generator().manual_seed(0))
    labels = 5994 * 8
    for options in ({"rotation": "none"}, {"rotation": "pca:64"}):
        quantizer = fit(keys[:300], 16, half_codebooks=True, **options)
        codes = quantizer.encode(keys)
        assert codes.numel() == 95_904
        assert codes.numel() + quantizer.bytes_codebook + labels <= 700_000


def test_mistakes_are_named() -> None:
    keys = embeddings(300)
    for size in (3, 65):
        with pytest.raises(ConfigError, match="4 to 64"):
            ProductQuantizer.fit(keys, size)
    with pytest.raises(ConfigError, match="4 or 8"):
        ProductQuantizer.fit(keys, bits=6)  # type: ignore[arg-type]
    for rotation in ("pq", "none:3", "opq:0", "opq:33", "pca:x"):
        with pytest.raises(ConfigError, match="rotation"):
            ProductQuantizer.fit(keys, rotation=rotation)
    with pytest.raises(ShapeError, match="NaN"):
        ProductQuantizer.fit(torch.full((300, 4), torch.nan))
    with pytest.raises(ShapeError):
        ProductQuantizer.fit(torch.zeros(300))
    quantizer = fit(keys, 4)
    with pytest.raises(ShapeError, match=r"\(N, 32\)"):
        quantizer.encode(keys[:, :31])
    for codes in (torch.zeros(2, 5, dtype=torch.uint8), torch.zeros(2, 4)):
        with pytest.raises(ShapeError, match="uint8"):
            quantizer.decode(codes)
    with pytest.raises(CheckpointError, match="codebooks"):
        ProductQuantizer.from_state({"width": torch.tensor(32)})
    with pytest.raises(CheckpointError, match="fit together"):
        ProductQuantizer.from_state({**quantizer.state(), "width": torch.tensor(33)})


def test_autocast_changes_nothing() -> None:
    keys = embeddings()
    plain = fit(keys, 8, rotation="pca:16")
    with torch.autocast("cpu", torch.bfloat16):
        under = fit(keys, 8, rotation="pca:16")
        codes, decoded = under.encode(keys), under.decode(under.encode(keys))
    assert all(torch.equal(tensor, under.state()[name]) for name, tensor in plain.state().items())
    assert torch.equal(codes, plain.encode(keys))
    assert torch.equal(decoded, plain.decode(codes))
