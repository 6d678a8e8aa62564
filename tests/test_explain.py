"""Evidence: what neighbours contribute, the page that shows it, and answers without given samples."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import nnheads
from nnheads import list_heads
from nnheads.benchmarks.comparison import head_variant
from nnheads.benchmarks.datasets import ImageData, load_dataset
from nnheads.cli.main import main
from nnheads.errors import ConfigError, DataError, ShapeError
from nnheads.explain import Pictures, gather_evidence, without
from nnheads.heads import head_class
from nnheads.page import render_page
from nnheads.thumbnails import Thumbnails

VARIANTS = [
    *(name for name in list_heads() if head_class(name).uses_memory),
    "impostor+bytes_per_center=16",
    "knn+vote=gaussian+metric=cosine",
    "kernel+k=null",
]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def backbone(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 10, 1), "dense")
    nnheads.fit(model, digits.train, epochs=2, optimizer="adamw", lr=3e-3, device="cpu", progress=False)
    return nnheads.save(model, tmp_path_factory.mktemp("explain") / "backbone")


def _model(backbone: Path, digits: ImageData, variant: str) -> nnheads.HeadedModel:
    name, options = head_variant(variant)
    model = nnheads.attach_head(nnheads.load(backbone), name, **options)
    nnheads.fit(model, digits.train, epochs=0, device="cpu", progress=False)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_contributions_add_up_to_the_models_own_probabilities(variant: str, backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, variant)
    x = model.preprocessing(digits.test.images[:100])
    why = model.explain(x)
    assert (why.probabilities - model(x).exp()).abs().max() < 1e-5
    assert (why.weights.sum(1) - 1).abs().max() < 1e-5
    assert not any(part.requires_grad for part in (why.probabilities, why.weights, why.shares, why.rest))
    if why.scale == "probability":
        # what the neighbours of a class contribute, and nothing else, is its probability but for the rest
        ours = torch.zeros_like(why.rest).scatter_add(1, why.labels.clamp_min(0), why.shares.sum(2))
        assert (ours + why.rest - model(x).exp()).abs().max() < 1e-5
        assert why.rest.min() > -1e-6
    few = model.explain(x, k=3)
    assert few.shares.shape[1] == 3
    assert (few.probabilities - model(x).exp()).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_if_is_what_dropping_gives(variant: str, backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, variant)
    x = model.preprocessing(digits.test.images[:40])
    before = model(x)
    gone = model.explain(x).ids[:, 0].unique()
    with without(model, gone):
        answer = model(x)
        why = model.explain(x)
    assert not torch.isin(why.ids, gone).any()
    assert torch.equal(model(x), before)
    model.drop(gone)
    assert torch.equal(model(x), answer)
    assert not torch.equal(answer, before)
    with pytest.raises(ShapeError, match="no sample with id"), without(model, gone):
        pass
    assert torch.equal(model(x), answer)


def test_evidence_names_the_samples_that_decide(backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, "nngk")
    model.class_names = tuple("abcdefghi")  # the last was never named
    images = digits.test.images[:5]
    found = gather_evidence(model, images, [f"{i}.png" for i in range(5)], listed=4, leave_out=[0])
    x = model.preprocessing(images)
    why = model.explain(x)
    with without(model, [0]):
        other = model(x).exp()
    for row, image in enumerate(found):
        assert [near.id for near in image.neighbors] == why.ids[row, :4].tolist()
        assert [near.weight for near in image.neighbors] == pytest.approx(why.weights[row, :4].tolist())
        assert image.others[0] == why.ids.shape[1] - 4
        assert image.others[1] == pytest.approx(float(why.weights[row, 4:].sum()))
        assert list((image.what_if or {}).values()) == pytest.approx(other[row].tolist(), abs=1e-5)
        assert image.to_dict()["weight_left_out"] == image.lost
        assert list(image.all_classes) == [*"abcdefghi", "9"]
        assert image.neighbors[0].picture is None


def test_pictures_come_from_thumbnails_and_from_the_training_images(digits: ImageData) -> None:
    thumbnails = Thumbnails.of_images(digits.train, digits.train.ids[:2])
    pictures = Pictures(thumbnails, digits.train)
    label = [str(int(label)) for label in digits.train.labels[:4]]
    assert pictures.get(0, "anything") == thumbnails.get(0)
    assert pictures.get(3, label[3])
    assert pictures.get(10**6, "0") is None
    with pytest.raises(DataError, match=r"sample 3 is of class 'no' in the model and of '.' in the images given"):
        pictures.get(3, "no")


# ---- the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(backbone: Path, digits: ImageData) -> Path:
    """A model with class names that are no HTML, and thumbnails of half its samples."""
    model = _model(backbone, digits, "nngk")
    model.class_names = ("<script>alert(1)</script>", '" onerror="alert(2)', *"23456789")
    half = digits.train.subset(torch.arange(0, len(digits.train), 2))
    return nnheads.save(model, backbone.parent / "saved" / "model", thumbnails=half)


@pytest.fixture(scope="module")
def queries(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("queries")
    files = []
    for label in range(3):
        image = digits.test.images[digits.test.labels == label][0, 0]
        files.append(folder / f"a <b>digit & {label}.png")
        Image.fromarray(image.numpy()).save(files[-1])
    return files


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.fixture
def page(saved: Path, queries: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "page.html"
    nearest = nnheads.load(saved)
    first = int(nearest.explain(nearest.preprocessing(nearest.preprocessing.open(queries[0])[None])).ids[0, 0])
    code, printed, _ = _run(
        capsys, "explain", saved.parent, *queries, "--out", out, "--what-if", f"drop:{first}", "--neighbors", 6
    )
    assert code == 0
    assert f"page: {out}" in printed
    assert f"  without {first}: " in printed
    return out


def test_the_page_is_one_file_that_holds_what_the_model_says(page: Path, saved: Path, queries: list[Path]) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|https?:|@import|url\(", text)
    assert 'onerror="alert' not in text
    assert re.findall(r'src="(?!data:image/webp;base64,)', text) == []
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))
    words = html.unescape(re.sub(r"<[^>]+>", " ", text))
    model = nnheads.load(saved)
    x = model.preprocessing(torch.stack([model.preprocessing.open(path) for path in queries]))
    why, probabilities = model.explain(x), model(x).exp().detach()
    for row, path in enumerate(queries):
        assert path.name in words
        assert f"{100 * float(probabilities[row].max()):.1f}\u202f%" in words
        for ids, weight in zip(why.ids[row, :6].tolist(), why.weights[row, :6].tolist(), strict=True):
            assert f"sample {ids} " in words
            assert f"{100 * weight:.1f}\u202f%" in words
    assert "<script>alert(1)</script>" in words
    shown = len(re.findall(r"<img", text))
    assert 3 < shown < 3 + 18  # thumbnails of half the samples
    assert len(re.findall('class="none"', text)) == 3 + 18 - shown


def test_the_page_takes_pictures_from_the_data(
    backbone: Path, digits: ImageData, queries: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nnheads.save(_model(backbone, digits, "impostor"), tmp_path / "model")
    out = tmp_path / "page.html"
    code, _, err = _run(capsys, "explain", folder, queries[0], "--out", out)
    assert code == 0
    assert "no pictures of training samples: give --data-dir" in err
    code, printed, err = _run(capsys, "explain", folder, queries[0], "--out", out, "--dataset", "digits", "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(printed)
    assert sum(near["weight"] for near in found["neighbors"]) + found["others"]["weight"] == pytest.approx(1)
    assert 'class="none"' not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs --out page.html"),
        (["--out", "nowhere/page.html"], "must be a file in a folder that is there"),
        (["--out", "page.html", "--what-if", "forget:3"], "--what-if must be drop:ID"),
        (["--out", "page.html", "--what-if", "drop:x"], "--what-if must be drop:ID"),
        (["--out", "page.html", "--what-if", "drop:99999999999999999999"], "an id is below 2"),
        (["--out", "page.html", "--what-if", "drop:98765"], "no sample with id 98765"),
        (["--out", "page.html", "--dataset", "digit"], "did you mean 'digits'"),
    ],
)
def test_mistakes_leave_no_page(
    arguments: list[str],
    words: str,
    saved: Path,
    queries: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = _run(capsys, "explain", saved, queries[0], *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_head_without_samples_is_told(backbone: Path, digits: ImageData) -> None:
    model = nnheads.load(backbone)
    with pytest.raises(ConfigError, match="stores no samples to explain with"):
        gather_evidence(model, digits.test.images[:1], ["a"])
    with pytest.raises(ConfigError, match="could be left out"), without(model, [1]):
        pass


def test_a_model_that_forgot_everything_has_a_page(backbone: Path, digits: ImageData) -> None:
    model = _model(backbone, digits, "nngk")
    model.drop(model.head.memory.ids[: len(model.head.memory)].clone())
    found = gather_evidence(model, digits.test.images[:1], ["a.png"])
    assert "The model stores no training samples" in render_page(model, found)


# ---- in a browser ------------------------------------------------------------------------------------------------

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

_LOOK = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.documentElement.dataset.seen = JSON.stringify({
    images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 40).length,
    square: images.every(i => Math.abs(i.clientWidth - i.clientHeight) < 2),
    overflow: document.documentElement.scrollWidth - innerWidth,
    articles: document.querySelectorAll("article").length,
    contrast: [...document.querySelectorAll("p, dt, figcaption b, small")].map(e => getComputedStyle(e).color),
    background: getComputedStyle(document.body).backgroundColor,
    alerts: document.scripts.length,
  });
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_the_page_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    text = page.read_text(encoding="utf-8")
    looked = tmp_path / "looked.html"
    looked.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{_LOOK}</body>"), encoding="utf-8"
    )
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={width},900",
            "--dump-dom",
            looked.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-500:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["images"] == seen["loaded"] == len(re.findall("<img", text))
    assert seen["square"]
    assert seen["overflow"] <= 0
    assert seen["articles"] == 3
    assert seen["alerts"] == 1  # ours

    def light(color: str) -> float:
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in (int(number) / 255 for number in re.findall(r"\d+", color)[:3])
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    behind = light(seen["background"])
    assert (behind < 0.1) == dark
    for color in seen["contrast"]:
        lighter, darker = max(light(color), behind), min(light(color), behind)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5  # WCAG 2 AA


def test_a_page_takes_no_place_of_an_image_or_a_model(
    saved: Path, queries: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for kept in (queries[0], saved / "head.json"):
        before = kept.read_bytes()
        code, _, err = _run(capsys, "explain", saved, queries[0], "--out", kept)
        assert code == 2
        assert "is there already and not a page: name another file" in err
        assert kept.read_bytes() == before


def test_the_picture_asked_about_is_turned_as_it_is_shown(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = tmp_path / "phone.jpg"
    Image.new("L", (40, 20), 128).save(photo, exif=exif)
    code, _, err = _run(capsys, "explain", saved, photo, "--out", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = re.search(r"data:image/webp;base64,([^\"]+)", page)
    assert shown is not None
    assert Image.open(io.BytesIO(base64.b64decode(shown[1]))).size == (20, 40)


def test_images_of_one_name_are_told_apart(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [tmp_path / folder / "image.png" for folder in ("first", "second")]
    for path in same:
        path.parent.mkdir()
        Image.new("L", (8, 8), 100).save(path)
    code, printed, _ = _run(capsys, "explain", saved, *same, "--json")
    assert code == 0
    assert [found["image"] for found in json.loads(printed)] == [str(path) for path in same]


def test_json_says_what_is_unlike_the_training_samples(
    backbone: Path, digits: ImageData, queries: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _model(backbone, digits, "knn")
    model.head.outlier_threshold.fill_(-1.0)
    code, printed, _ = _run(capsys, "explain", nnheads.save(model, tmp_path / "model"), queries[0], "--json")
    assert code == 0
    assert json.loads(printed)[0]["unlike_training_samples"] is True
