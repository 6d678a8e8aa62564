"""Calibrated probabilities and outlier scores, in Python, on a saved model, and in comparisons."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import nnheads
from nnheads import list_heads
from nnheads.benchmarks.compare import CompareConfig, compare
from nnheads.benchmarks.comparison import head_variant
from nnheads.benchmarks.datasets import ImageData, load_dataset, load_foreign
from nnheads.benchmarks.outliers import auroc
from nnheads.calibration import cross_fitted, fit_scaling
from nnheads.cli.main import main
from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError, ShapeError, UnknownNameError
from nnheads.evaluation import Evaluation
from nnheads.heads import MemoryHead
from nnheads.heads.scaling import scaled

VARIANTS = [*list_heads(), "impostor+bytes_per_center=16", "knn+vote=gaussian"]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def backbone(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 10, 1), "dense")
    nnheads.fit(model, digits.train, epochs=2, optimizer="adamw", lr=3e-3, device="cpu", progress=False)
    return nnheads.save(model, tmp_path_factory.mktemp("calibration") / "backbone")


def _model(backbone: Path, digits: ImageData, variant: str) -> nnheads.HeadedModel:
    name, options = head_variant(variant)
    model = nnheads.load(backbone)
    if name != "dense":
        nnheads.attach_head(model, name, **options)
        nnheads.fit(model, digits.train, epochs=0, device="cpu", progress=False)
    return model


def test_the_temperature_is_the_one_the_scores_were_spoilt_with() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert fit_scaling(logits, labels).temperature == pytest.approx(1, abs=0.1)
    assert fit_scaling(3 * logits, labels).temperature == pytest.approx(3, abs=0.3)
    assert fit_scaling((logits / 4).log_softmax(1), labels).temperature == pytest.approx(0.25, abs=0.03)
    assert fit_scaling(3 * logits, labels).uniform_share < 0.02  # there is none in the scores
    found = Evaluation((3 * logits).log_softmax(1), labels, 0.0)
    assert cross_fitted(found).ece < 0.03 < found.ece
    assert cross_fitted(found).accuracy == found.accuracy
    for scores, wrong in (
        (logits, labels + 4),
        (logits, labels[1:]),
        (logits[0], labels[:1]),
        (logits[:0], labels[:0]),
    ):
        with pytest.raises(ShapeError):
            fit_scaling(scores, wrong)


def _votes() -> tuple[torch.Tensor, torch.Tensor]:
    """Votes that are right about what they vote on, but for 3 % of the samples, whose class has no vote at all."""
    generator = torch.Generator().manual_seed(1)
    probabilities = (3 * torch.randn(6000, 10, generator=generator)).softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    votes = probabilities.where(probabilities > 0.02, 0)
    stray = torch.rand(6000, generator=generator) < 0.03
    labels[stray] = votes[stray].argmin(1)
    votes = votes / votes.sum(1, keepdim=True)
    return votes.clamp_min(1e-6).log().log_softmax(1), labels


def test_votes_at_the_floor_of_their_probabilities_do_not_spoil_the_others() -> None:
    log_probs, labels = _votes()
    before = Evaluation(log_probs, labels, 0.0)
    after = cross_fitted(before)
    assert after.log_loss < before.log_loss - 0.1
    assert after.ece <= before.ece + 0.005
    assert torch.equal(after.predictions, before.predictions)
    found = fit_scaling(log_probs, labels)
    assert 0.02 < found.uniform_share < 0.1
    assert found.temperature == pytest.approx(1, abs=0.15)
    assert found == fit_scaling(log_probs, labels)
    # nothing around it is better
    best = torch.nn.functional.nll_loss(scaled(log_probs.double(), *found), labels)
    for temperature in (0.7, 0.9, 1, 1.1, 2):
        for share in (0, 0.8, 1, 1.2):
            other = scaled(log_probs.double(), temperature * found.temperature, share * found.uniform_share)
            assert float(torch.nn.functional.nll_loss(other, labels)) >= float(best) - 1e-4
    assert fit_scaling(torch.randn(500, 4), torch.arange(500) % 4).uniform_share <= 0.5


def test_few_samples_do_not_make_probabilities_overconfident() -> None:
    """Where none of them is at the floor by chance, others will be."""
    log_probs, labels = _votes()
    before = Evaluation(log_probs, labels, 0.0)
    fine = log_probs.gather(1, labels[:, None])[:, 0] > -10
    chosen = fine.nonzero()[:40, 0]
    found = fit_scaling(log_probs[chosen], labels[chosen])
    assert found.uniform_share > 0.004
    after = Evaluation(scaled(log_probs, *found), labels, 0.0)
    assert after.log_loss < before.log_loss


def _noise(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("variant", VARIANTS)
def test_calibration_makes_every_head_more_certain_or_less_but_changes_no_answer(
    variant: str, backbone: Path, digits: ImageData, tmp_path: Path
) -> None:
    model = _model(backbone, digits, variant)
    x = model.preprocessing(digits.test.images)
    before = model(x).detach()
    found = nnheads.calibrate(model, digits.test, device="cpu", precision="float32")
    after = model(x).detach()
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert after.exp().sum(1) == pytest.approx(1, abs=1e-4)
    labels = digits.test.labels
    loss = torch.nn.functional.nll_loss
    assert float(loss(after, labels)) <= float(loss(before, labels)) + 0.005
    assert found.before.log_loss == pytest.approx(float(loss(before, labels)), rel=1e-3)
    assert found.after.log_loss <= found.before.log_loss + 0.01
    assert found.after.ece <= found.before.ece + 0.01
    assert model.head.temperature == pytest.approx(found.temperature)
    assert model.head.uniform_share == pytest.approx(found.uniform_share)
    scores = model.head.outlier_scores(model.features(x).detach())
    assert 0.9 < float((scores <= found.outlier_threshold).float().mean()) <= 0.97
    again = nnheads.load(nnheads.save(model, tmp_path / "model"))
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.head.outlier_threshold, model.head.outlier_threshold)
    # calibrating again asks the uncalibrated head
    assert nnheads.calibrate(model, digits.test, device="cpu", precision="float32").temperature == pytest.approx(
        found.temperature, rel=1e-3
    )
    if isinstance(model.head, MemoryHead):
        why = model.explain(x[:60])
        assert (why.probabilities - model(x[:60]).exp()).abs().max() < 1e-5
        assert why.scale == "logit" or why.shares.min() >= 0
        assert why.uniform_share == pytest.approx(found.uniform_share)
        if why.scale == "probability":
            assert why.rest.min() >= found.uniform_share / 10 - 1e-6


def test_a_head_saved_before_there_were_temperatures_loads(backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, "nngk")
    old = {
        name: part
        for name, part in model.head.state_dict().items()
        if name not in ("temperature", "uniform_share", "outlier_threshold")
    }
    x = model.preprocessing(digits.test.images)
    before = model(x)
    model.head.set_scaling(2, 0.1)
    assert not torch.equal(model(x), before)
    model.head.load_state_dict(old)
    assert (model.head.temperature, model.head.uniform_share) == (1, 0)
    assert torch.equal(model(x), before)
    with pytest.raises(ConfigError, match="temperature must be a number above 0"):
        model.head.set_scaling(0, 0)
    for share, words in ((1, "must be below 1"), (-0.1, "must be a number 0 or more")):
        with pytest.raises(ConfigError, match=f"uniform_share {words}"):
            model.head.set_scaling(1, share)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outlier_scores_tell_noise_from_digits(variant: str, backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, variant)
    noise = torch.randint(
        0, 256, (200, *digits.test.images.shape[1:]), generator=torch.Generator().manual_seed(0)
    ).byte()
    foreign = ImageSet(noise, torch.zeros(200, dtype=torch.int64), class_names=("noise",))
    own, by_score = auroc(model, digits.test, foreign, "cpu")
    assert by_score["max_probability"] <= 1
    if isinstance(model.head, MemoryHead):
        assert own > 0.8
        assert set(by_score) == {"max_probability", "cosine", "distance", "density"}
        assert own == by_score["cosine"]
        assert min(by_score["cosine"], by_score["distance"], by_score["density"]) > 0.7


def test_outlier_scores_are_those_of_the_papers(digits: ImageData) -> None:
    head = nnheads.build_head("knn", 6, 3)
    keys, z = torch.randn(80, 6), torch.randn(7, 6)
    assert isinstance(head, MemoryHead)
    assert bool(torch.isinf(head.outlier_scores(z)).all())
    head.add(keys, torch.arange(80) % 3)
    unit = torch.nn.functional.normalize
    expected = torch.cdist(unit(z), unit(keys)).square().div(2).sort(1).values[:, 9]  # 1 - cos
    torch.testing.assert_close(head.outlier_scores(z, k=10), expected, atol=1e-5, rtol=1e-4)
    distances = torch.cdist(z, keys).sort(1).values
    torch.testing.assert_close(head.outlier_scores(z, kind="distance", k=10), distances[:, 9])
    torch.testing.assert_close(head.outlier_scores(z, kind="distance", k=1000), distances[:, -1])
    with pytest.raises(UnknownNameError, match="did you mean 'density'"):
        head.outlier_scores(z, kind="densty")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k must be 1 or more"):
        head.outlier_scores(z, k=0)
    with pytest.raises(ShapeError, match="embeddings must be"):
        head.outlier_scores(z[:, 1:])


def test_mistakes_leave_the_head_as_it_was(backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, "nngk")
    model.head.set_scaling(1.5, 0.25)
    with pytest.raises(DataError, match="needs 20 held-out samples or more, got 5"):
        nnheads.calibrate(model, digits.test.subset(torch.arange(5)), device="cpu")
    other = ImageSet(digits.test.images, digits.test.labels + 1, class_names=tuple("0123456789x"))
    with pytest.raises(DataError, match="label 10 is no class of the model"):
        nnheads.calibrate(model, other, device="cpu")
    with pytest.raises(ConfigError, match="accepted must be between 0 and 1, got 2"):
        nnheads.calibrate(model, digits.test, accepted=2, device="cpu")
    assert (float(model.head.temperature), float(model.head.uniform_share)) == (1.5, 0.25)
    assert math.isinf(model.head.outlier_threshold)


# ---- from the command line ---------------------------------------------------------------------------------------


def test_calibrate_a_saved_model_and_predict(
    backbone: Path, digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    folder = nnheads.save(_model(backbone, digits, "impostor"), tmp_path / "model")
    own, noise = tmp_path / "own.png", tmp_path / "noise.png"
    Image.fromarray(digits.train.images[0, 0].numpy()).save(own)
    Image.fromarray(torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(1)).byte().numpy()).save(
        noise
    )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, err = run("calibrate", folder)
    assert (code, out) == (2, "")
    assert "calibrate needs --data-dir" in err
    assert "unlike" not in run("predict", folder, noise)[1]
    code, out, _ = run("calibrate", folder, "--dataset", "digits", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["images"] == len(digits.test)
    assert float(nnheads.load(folder).head.temperature) == pytest.approx(told["temperature"])
    assert float(nnheads.load(folder).head.uniform_share) == pytest.approx(told["uniform_share"])
    assert {path.name for path in folder.iterdir()} == set(before)
    assert (folder / "backbone.safetensors").read_bytes() == before["backbone.safetensors"]
    out = run("calibrate", folder, "--dataset", "digits")[1]
    assert "temperature" in out
    assert "% shared equally over all classes" in out
    assert "unlike the training samples" in run("predict", folder, noise)[1]
    first, second = json.loads(run("predict", folder, own, noise, "--json")[1])
    assert (first["unlike_training_samples"], second["unlike_training_samples"]) == (False, True)
    wide = tmp_path / "foreign"
    for name in ("a", "b"):
        (wide / name).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(_noise(40)[number + 20 * (name == "b"), 0].numpy()).save(wide / name / f"{number}.png")
    code, out, _ = run("eval", folder, "--dataset", "digits", "--ood", f"images:{wide}", "--json")
    told = json.loads(out)
    assert 0.8 < told["auroc"] == told["auroc_by_score"]["cosine"]
    assert "AUROC against images:" in run("eval", folder, "--dataset", "digits", "--ood", f"images:{wide}")[1]
    assert run("explain", folder, noise, "--out", tmp_path / "page.html")[0] == 0
    assert "Unlike the training samples" in (tmp_path / "page.html").read_text(encoding="utf-8")
    model = nnheads.load(folder)
    model.head.set_scaling(1, 0.12)
    nnheads.save(model, folder)
    assert run("explain", folder, own, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "12.0\u202f% is shared equally over all classes, by calibration." in page
    assert "is smoothing, not evidence" not in page  # beside the floor there is none
    (told,) = json.loads(run("explain", folder, own, "--out", tmp_path / "page.html", "--json")[1])
    assert told["shared_equally"] == pytest.approx(0.12)


def test_comparisons_have_calibrated_errors_and_auroc(tmp_path: Path, digits: ImageData) -> None:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "noise" / split / name
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = torch.randint(0, 256, (12, 12, 3), generator=generator).byte()
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    noise = f"images:{tmp_path / 'noise'}"
    foreign = load_foreign(noise, None, digits.preprocessing)
    assert foreign.images.shape == (40, 1, 8, 8)
    config = CompareConfig(heads=("dense", "knn"), epochs=2, device="cpu", ood=noise)
    summary = compare(config, tmp_path / "out")
    for row in summary["rows"]:
        assert 0 < row["auroc"]["mean"] <= 1
        assert row["ece_scaled"]["mean"] < 0.1
    results = json.loads((tmp_path / "out" / "knn-seed0.json").read_text())
    assert set(results["auroc_by_score"]) == {"max_probability", "cosine", "distance", "density"}
    with pytest.raises(ConfigError, match="was made with ood"):
        compare(CompareConfig(heads=("dense", "knn"), epochs=2, device="cpu"), tmp_path / "out", resume=True)
    for ood, words in (("digit", "did you mean 'digits'"), ("digits", "holds what the heads are trained on")):
        with pytest.raises(ConfigError, match=words):
            CompareConfig(ood=ood).check()
    with pytest.raises(ConfigError, match="holds what the heads are trained on"):
        CompareConfig(dataset="cifar110", ood="cifar100").check()
