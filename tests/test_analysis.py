"""Agreement, probes, layer embeddings and measures, against numbers worked out by hand and against scikit-learn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nnheads
from nnheads.analysis import (
    agreement,
    analyze,
    calibration,
    confusion,
    default_layers,
    kl_divergence,
    layer_embeddings,
    probe,
    retrieval,
    roc,
)
from nnheads.benchmarks.datasets import load_dataset
from nnheads.cli.main import main
from nnheads.data import ImageSet
from nnheads.errors import ConfigError, DataError, ShapeError, UnknownNameError
from nnheads.evaluation import Evaluation
from nnheads.preprocessing import Preprocessing


def test_agreement_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    model = torch.tensor([0, 0, 1, 1, 2, 0, 1, 2])  # right: the first five; wrong: the last three
    other = torch.tensor([0, 1, 1, 1, 2, 0, 1, 0])  # shares four of five, and two of the three
    found = agreement(model, other, labels)
    assert found.mc == pytest.approx(4 / 5)
    assert found.me == pytest.approx(2 / 3)
    assert found.p_same == pytest.approx(6 / 8)
    assert found.accuracy == pytest.approx(5 / 8)
    assert found.other_accuracy == pytest.approx(4 / 8)
    assert found.p_same == pytest.approx(found.mc * found.accuracy + found.me * (1 - found.accuracy))


def test_agreement_of_a_model_without_errors() -> None:
    labels = torch.tensor([0, 1, 2])
    found = agreement(labels, torch.tensor([0, 1, 0]), labels)
    assert (found.mc, found.me, found.p_same) == (pytest.approx(2 / 3), 1.0, pytest.approx(2 / 3))


def test_agreement_refuses_other_lengths() -> None:
    with pytest.raises(ShapeError, match="one length"):
        agreement(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0]))


def test_kl_divergence_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    q = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(p.log(), q.log()) == pytest.approx((first + math.log(2)) / 2)
    assert kl_divergence(q.log(), p.log()) == math.inf
    assert kl_divergence(q.log(), q.log()) == 0


def _blobs(count: int, seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centers = 4 * torch.eye(classes, 8)
    return centers[labels] + torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_knn_probe_votes_as_scikit_learn(metric: str) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    x, y = _blobs(150, 0)
    queries, _ = _blobs(60, 1)
    theirs = KNeighborsClassifier(7, p=1 if metric == "l1" else 2).fit(x.numpy(), y.numpy())
    ours = probe(x, y, "knn", k=7, metric=metric)  # type: ignore[arg-type]
    assert np.allclose(ours.log_probs(queries).exp().numpy(), theirs.predict_proba(queries.numpy()))


def test_knn_probe_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([0, 1, 1, 0])
    found = probe(x, y, "knn", k=2)
    # 0.4: rows 0 and 1, a vote each, and row 0 is the nearer; 2.5: rows 2 and 1, both class 1
    assert found.predict(torch.tensor([[0.4], [0.6], [2.5]])).tolist() == [0, 1, 1]
    assert found.log_probs(torch.tensor([[0.4]])).exp().tolist() == [[0.5, 0.5]]
    alone = probe(x, y, "knn", k=1)
    assert alone.predict(x).tolist() == [0, 1, 1, 0]
    assert alone.predict(x, rows=torch.arange(4)).tolist() == [1, 0, 0, 1]


def test_knn_probe_with_pca_keeps_what_varies() -> None:
    x, y = _blobs(120, 0)
    padded = torch.cat([x, torch.zeros(120, 20)], 1)
    full, reduced = probe(x, y, "knn", k=5, metric="l2"), probe(padded, y, "knn", k=5, metric="l2", pca=8)
    queries, _ = _blobs(40, 2)
    assert torch.equal(full.predict(queries), reduced.predict(torch.cat([queries, torch.zeros(40, 20)], 1)))


@pytest.mark.parametrize("kind", ["svm", "lr"])
def test_linear_probes(kind: str) -> None:
    x, y = _blobs(300, 0)
    queries, truth = _blobs(200, 1)
    fitted = probe(1000 * x, y, kind, num_classes=5)  # type: ignore[arg-type]  # the scale does not matter
    assert float((fitted.predict(1000 * queries) == truth).float().mean()) > 0.95
    shares = fitted.log_probs(1000 * queries).exp()
    assert shares.shape == (200, 5)
    assert torch.allclose(shares.sum(1), torch.ones(200, dtype=torch.float64))
    assert not shares[:, 3:].any()
    assert float((shares.argmax(1) == truth).float().mean()) > 0.95


def test_a_probe_of_one_class_answers_it() -> None:
    fitted = probe(torch.randn(4, 3), torch.ones(4, dtype=torch.int64), "svm")
    assert fitted.predict(torch.randn(2, 3)).tolist() == [1, 1] or fitted.log_probs(torch.randn(1, 3)).exp()[0, 1] == 1


def test_probe_refuses() -> None:
    x, y = _blobs(9, 0)
    with pytest.raises(UnknownNameError, match="did you mean 'knn'"):
        probe(x, y, "kn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pca"):
        probe(x, y, pca=9)
    with pytest.raises(ShapeError):
        probe(x, y[:3])


class _Attention(nn.Module):
    """A block whose attention gives a tuple, with a residual, on tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.mix(self.attention(x, x, x)[0])
        return mixed


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(_Attention(4), _Attention(4))
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.stem(x).flatten(2).mT)
        logits: Tensor = self.linear(self.dropout(tokens.mean(1)))
        return logits


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(50) % 3)


GREY = Preprocessing((6, 6), 1, (0.5,), (0.25,))


def test_layers_are_pooled_in_one_pass(images: ImageSet) -> None:
    torch.manual_seed(0)
    net = _Net().train()
    calls: list[int] = []
    net.stem.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    layers = ["stem", "blocks.0", "blocks.1.attention", "linear"]
    found = layer_embeddings(net, images, layers, batch_size=20, preprocessing=GREY, device="cpu")
    assert calls == [20, 20, 10]
    assert net.training
    assert list(found) == [*layers, "output"]
    assert not found.on_disk
    with torch.no_grad():
        maps = net.stem(GREY(images.images))
        assert torch.allclose(found["stem"], maps.mean((2, 3)), atol=1e-6)
        tokens = net.blocks[0](maps.flatten(2).mT)
        assert torch.allclose(found["blocks.0"], tokens.mean(1), atol=1e-6)
        attended = net.blocks[1].attention(tokens, tokens, tokens)[0]  # type: ignore[union-attr,operator]
        assert torch.allclose(found["blocks.1.attention"], attended.mean(1), atol=1e-6)
    assert torch.equal(found["linear"], found["output"])
    assert torch.equal(found.labels, images.labels)
    assert torch.equal(found.ids, images.ids)


def test_a_layer_is_read_before_the_next_one_writes_over_it(images: ImageSet) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    found = layer_embeddings(net, images, ["1"], preprocessing=GREY, device="cpu")
    with torch.no_grad():
        assert torch.allclose(found["1"], net[1](GREY(images.images).flatten(1)), atol=1e-6)
    assert found["1"].min() < 0


class _Maps(nn.Module):
    """A block on maps (B, H, W, C): as Swin Transformers have them, or turned around it as in ConvNeXt."""

    def __init__(self, width: int, turned: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        if self.turned:
            return x + self.mix(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        flat = x.flatten(1, 2)
        return (flat + self.mix(self.norm(flat))).view_as(x)  # type: ignore[no-any-return]


class _Excited(nn.Module):
    """Squeeze and excitation: what works last is a linear layer, on vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.weigh = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.weigh(x.mean((2, 3))).sigmoid()[:, :, None, None]  # type: ignore[no-any-return]


class _Channels(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList([_Excited(width), _Maps(width, True), _Maps(width, False)])
        self.linear = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        return self.linear(self.blocks[2](x.permute(0, 2, 3, 1)).mean((1, 2)))  # type: ignore[no-any-return]


def test_maps_are_averaged_over_positions_wherever_their_channels_are(images: ImageSet) -> None:
    torch.manual_seed(0)
    net = _Channels(5)
    names = default_layers(net)
    assert names == ["stem", "blocks.0", "blocks.1", "blocks.2", "linear"]
    found = layer_embeddings(net, images, [*names, "blocks.2.norm"], preprocessing=GREY, device="cpu")
    assert [found[name].shape[1] for name in names] == [5, 5, 5, 5, 3]
    with torch.no_grad():
        maps = net.blocks[1](net.blocks[0](net.stem(GREY(images.images))))
        assert torch.allclose(found["blocks.1"], maps.mean((2, 3)), atol=1e-6)
        assert torch.allclose(found["blocks.2"], net.blocks[2](maps.permute(0, 2, 3, 1)).mean((1, 2)), atol=1e-6)
    square = _Channels(6)  # on images of 6 x 6
    assert layer_embeddings(square, images, ["blocks.0"], preprocessing=GREY, device="cpu")["blocks.0"].shape[1] == 6
    with pytest.raises(ShapeError, match=r"'blocks.2' gave \(50, 6, 6, 6\), whose channels may be in dimension 1 or 3"):
        layer_embeddings(square, images, ["blocks.2"], preprocessing=GREY, device="cpu")


def test_layers_of_a_swin_transformer() -> None:
    import torchvision

    net = torchvision.models.swin_t(num_classes=3)
    few = torch.utils.data.TensorDataset(torch.randn(1, 3, 64, 64), torch.tensor([0]))
    names = [name for name in default_layers(net) if name.startswith("features")]
    found = layer_embeddings(net, few, device="cpu")
    widths = [found[name].shape[1] for name in names]
    assert widths == [96, 96, 96, 192, 192, 192, *[384] * 7, *[768] * 3]


def test_layers_spill_to_disk_and_clean_up(images: ImageSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _Net()
    kwargs = {"batch_size": 20, "preprocessing": GREY, "device": "cpu"}
    in_memory = layer_embeddings(net, images, ["stem", "blocks.1"], **kwargs)  # type: ignore[arg-type]
    with layer_embeddings(net, images, ["stem", "blocks.1"], memory=500, folder=tmp_path, **kwargs) as spilled:  # type: ignore[arg-type]
        assert spilled.on_disk
        assert any(tmp_path.iterdir())
        for name in in_memory:
            assert torch.equal(in_memory[name], spilled[name])
        assert probe(spilled["stem"], spilled.labels).predict(spilled["stem"]).shape == (50,)
    assert not any(tmp_path.iterdir())


def test_layers_of_a_headed_model(images: ImageSet) -> None:
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 3, in_channels=1), "dense", preprocessing=GREY)
    names = default_layers(model)
    assert names == ["conv1", "conv2", "conv3", "linear"]
    found = layer_embeddings(model, images, names, device="cpu")
    embedded, _, _ = nnheads.embed(model, images, device="cpu", precision="float32")
    assert torch.allclose(found["linear"], embedded, atol=1e-5)
    assert torch.allclose(found["output"].exp().sum(1), torch.ones(50), atol=1e-5)


def test_default_layers_are_the_blocks() -> None:
    assert default_layers(nnheads.build_backbone("slim_resnet18"))[:4] == ["conv1", "layer1.0", "layer1.1", "layer2.0"]
    assert default_layers(_Net()) == ["stem", "blocks.0", "blocks.1", "linear"]


def test_layers_refuse(images: ImageSet) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'stem'"):
        layer_embeddings(_Net(), images, ["stm"], preprocessing=GREY, device="cpu")
    with pytest.raises(DataError, match="no samples"):
        layer_embeddings(_Net(), images.subset([]), ["stem"], preprocessing=GREY, device="cpu")
    spare = _Net()
    spare.unused = nn.Linear(2, 2)
    with pytest.raises(ShapeError, match="was not called"):
        layer_embeddings(spare, images, ["unused"], preprocessing=GREY, device="cpu")


def test_confusion_by_hand() -> None:
    found = confusion(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    with pytest.raises(ShapeError, match="0 to 1"):
        confusion(torch.tensor([2]), torch.tensor([0]), 2)


def test_roc_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    labels = torch.tensor([0, 0, 1, 1])
    first = roc(scores, labels)[0]
    # of the four pairs (one of class 0, one of class 1) three are in order
    assert first.auc == pytest.approx(3 / 4)
    # 0.9: (0, 1/2) is as close to (0, 1) as 0.6: (1/2, 1), and comes first
    assert first.closest == (0.0, 0.5)
    assert first.threshold == pytest.approx(0.9)
    assert set(roc(scores, torch.zeros(4, dtype=torch.int64))) == set()


def test_calibration_by_hand() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.35, 0.65]])
    labels = torch.tensor([0, 1, 1, 1])
    found = calibration(shares.log(), labels, bins=5)
    assert found.samples.tolist() == [0, 0, 0, 2, 2]  # 0.6 and 0.65 in (0.6, 0.8] but for the rounding of 0.6
    assert found.ece == pytest.approx((2 * (1 - 0.625) + 2 * (0.9 - 0.5)) / 4, abs=1e-6)
    assert found.accuracy[3:].tolist() == [1.0, 0.5]


def test_calibration_is_that_of_an_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = (3 * torch.randn(500, 7, generator=generator)).log_softmax(1)
    labels = torch.randint(0, 8, (500,), generator=generator)  # 7 is no class of the model: never right
    log_probs[0] = torch.tensor([1e-7, *[-30.0] * 6])  # above 1 by rounding
    found = calibration(log_probs, labels)
    assert found.ece == pytest.approx(Evaluation(log_probs, labels, 0.0).ece, abs=1e-6)
    assert float(found.confidence[-1]) <= 1
    with pytest.raises(ShapeError, match="0 or more, got -1"):
        calibration(log_probs, labels - 1)


def test_calibration_of_a_single_class() -> None:
    assert calibration(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64)).ece == 0


def test_retrieval_by_hand() -> None:
    z = torch.tensor([[0.0], [1.0], [1.9], [10.0], [10.1]])
    labels = torch.tensor([0, 1, 0, 1, 1])
    # nearest others: 0 -> 1, 2; 1 -> 2, 0, 3; 2 -> 1, 0; 3 -> 4; 4 -> 3
    assert retrieval(z, labels, (1, 2, 3)) == {1: 2 / 5, 2: 4 / 5, 3: 1.0}
    among = retrieval(z[:1], labels[:1], (1, 2), gallery=z[1:], gallery_labels=labels[1:])
    assert among == {1: 0.0, 2: 1.0}


def test_retrieval_never_finds_the_sample_itself_among_copies() -> None:
    z, labels = torch.zeros(6, 2), torch.tensor([0, 1, 2, 3, 4, 5])
    assert retrieval(z, labels, (1, 4)) == {1: 0.0, 4: 0.0}
    with pytest.raises(ConfigError, match="both"):
        retrieval(z, labels, gallery=z)


def test_analyze_says_how_far_classifiers_answer_as_the_model() -> None:
    data = load_dataset("digits")
    model = nnheads.attach_head(nnheads.build_backbone("convnet", 10, in_channels=1, width=8), "dense")
    few = data.train.subset(range(400))
    nnheads.fit(model, few, epochs=6, batch_size=32, optimizer="adamw", lr=1e-2, device="cpu", progress=False)
    told: list[str] = []
    found = analyze(
        model,
        few,
        data.test,
        k=5,
        device="cpu",
        kinds=("knn", "lr"),
        report=lambda what, done, total: told.append(what),
    )
    assert (found["train"], found["test"]) == (400, len(data.test))
    assert found["accuracy"] == pytest.approx(
        nnheads.evaluate(model, data.test, device="cpu", precision="float32").accuracy
    )
    assert [(row["layer"], row["kind"]) for row in found["rows"][-2:]] == [("linear", "knn"), ("linear", "lr")]
    first, last = found["rows"][0], found["rows"][-2]
    assert last["accuracy"] > first["accuracy"]
    assert last["p_same"] > 0.8
    expected = last["mc"] * found["accuracy"] + last["me"] * (1 - found["accuracy"])
    assert last["p_same"] == pytest.approx(expected)
    assert "fitting knn on conv1" in told


def test_the_command_analyze(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_dataset("digits")
    backbone = nnheads.build_backbone("convnet", 10, in_channels=1, width=4)
    model = nnheads.attach_head(backbone, "knn", preprocessing=data.preprocessing, class_names=data.train.class_names)
    nnheads.fit(model, data.train.subset(range(200)), epochs=1, device="cpu", progress=False)
    nnheads.save(model, tmp_path / "model")
    few = ["--train-images", "200", "--test-images", "50", "--kinds", "knn,lr", "--device", "cpu"]
    figure = tmp_path / "layers.png"

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["analyze", str(tmp_path / "model"), *few, *arguments])
        return int(end.value.code or 0)

    assert command("--dataset", "digits", "--figure", str(figure)) == 0
    shown = capsys.readouterr().out
    assert "P_SAME" in shown
    assert "fitted on 200 images, judged on 50" in shown
    assert figure.stat().st_size > 1000
    assert command("--dataset", "digits", "--layers", "conv2,linear", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in found["rows"]} == {"conv2", "linear"}
    assert command("--dataset", "digits", "--layers", "conv9") == 2
    assert "did you mean" in capsys.readouterr().err
    assert command("--data-dir", str(tmp_path)) == 2
    assert "needs both train/ and test/" in capsys.readouterr().err
    held = (tmp_path / "model" / "head.json").read_bytes()
    assert command("--dataset", "digits", "--figure", str(tmp_path / "model" / "head.json")) == 2
    assert "is there already and not a PNG" in capsys.readouterr().err
    assert (tmp_path / "model" / "head.json").read_bytes() == held
    model.add(data.test.images[:1], ["blot"])
    nnheads.save(model, tmp_path / "model")
    assert command("--dataset", "digits", "--layers", "linear") == 0  # a class that is not of the data set
    assert "judged on 50" in capsys.readouterr().out
    assert command("--dataset", "cifar10") == 2
