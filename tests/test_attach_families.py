"""A head goes on every family of classifiers: torchvision's, timm's, Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnheads.attach import attach_head, detach_head

# One small member of each family, the smallest image it takes, the width of its classifier's input.
TORCHVISION = [
    ("alexnet", 64, 4096),
    ("densenet121", 64, 1024),
    ("efficientnet_b0", 64, 1280),
    ("googlenet", 64, 1024),
    ("inception_v3", 75, 2048),
    ("mnasnet0_5", 64, 1280),
    ("mobilenet_v2", 64, 1280),
    ("mobilenet_v3_small", 64, 1024),
    ("regnet_y_400mf", 64, 440),
    ("resnet18", 64, 512),
    ("shufflenet_v2_x0_5", 64, 1024),
    ("squeezenet1_0", 64, 512),
    ("squeezenet1_1", 64, 512),
]
TORCHVISION_SLOW = [
    ("convnext_tiny", 64, 768),
    ("maxvit_t", 224, 512),
    ("resnext50_32x4d", 64, 2048),
    ("swin_t", 64, 768),
    ("swin_v2_t", 64, 768),
    ("vgg11", 64, 4096),
    ("vit_b_16", 224, 768),
    ("wide_resnet50_2", 64, 2048),
]
TIMM = [
    ("convnext_atto", 64, 320),
    ("deit_tiny_distilled_patch16_224", 224, 192),
    ("efficientnet_b0", 64, 1280),
    ("mobilenetv3_small_050", 64, 1024),
    ("regnetx_002", 64, 368),
    ("resnet10t", 64, 512),
    ("resnetv2_50", 64, 2048),  # a 1x1 convolution
    ("test_vit", 160, 64),
    ("test_efficientnet", 64, 256),
    ("test_byobnet", 64, 256),
    ("levit_128s", 224, 384),  # distilled, batch norm before the linear layer
    ("mambaout_femto", 64, 1152),
]
TIMM_SLOW = [
    ("caformer_s18", 64, 2048),
    ("coat_tiny", 224, 152),
    ("efficientvit_m0", 224, 192),
    ("inception_next_tiny", 64, 2304),
    ("mixer_s32_224", 224, 512),
    ("pit_ti_distilled_224", 224, 256),
    ("swin_tiny_patch4_window7_224", 224, 768),
    ("vit_tiny_patch16_224", 224, 192),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small on images this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slow(cases: list[tuple[str, int, int]]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def logits(output: object) -> Tensor:
    found = output["logits"] if isinstance(output, Mapping) else output
    assert isinstance(found, Tensor)
    return found


def check_family(make: Callable[[], nn.Module], size: int, width: int, *, linear: bool = True) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 3, size, size)
    before_modules, before_state = list(model.modules()), model.state_dict()
    with torch.no_grad():
        before = logits(model(x))
        headed = attach_head(model, "dense")
        z = headed.features(x)
        assert z.shape == (2, width)
        assert headed(x).shape == before.shape
        layers = [entry.layer for entry in headed.attached()]
        if linear and len(layers) == 1:  # the classifier, applied to the embedding, gives the model's own logits
            given = z if isinstance(layers[0], nn.Linear) else z[:, :, None, None]
            torch.testing.assert_close(layers[0](given).flatten(1), before, rtol=1e-4, atol=1e-4)
        assert detach_head(headed) is model
        assert torch.equal(logits(model(x)), before)
    assert [id(module) for module in model.modules()] == [id(module) for module in before_modules]
    after_state = model.state_dict()
    assert list(after_state) == list(before_state)
    assert all(after_state[key].data_ptr() == before_state[key].data_ptr() for key in before_state)


@pytest.mark.parametrize(("name", "size", "width"), TORCHVISION + slow(TORCHVISION_SLOW))
def test_torchvision(name: str, size: int, width: int) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    check_family(
        lambda: models.get_model(name, num_classes=10, **options), size, width, linear="squeezenet" not in name
    )


@pytest.mark.parametrize(("name", "size", "width"), TIMM + slow(TIMM_SLOW))
def test_timm(name: str, size: int, width: int) -> None:
    timm = pytest.importorskip("timm")
    check_family(lambda: timm.create_model(name, num_classes=10), size, width)


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    vit = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 10,
    }
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "ViTForImageClassification": ("ViTConfig", vit),
        "BeitForImageClassification": ("BeitConfig", vit),
        "Dinov2ForImageClassification": ("Dinov2Config", vit),
        "DeiTForImageClassification": ("DeiTConfig", vit),
        "DeiTForImageClassificationWithTeacher": ("DeiTConfig", vit),
        "ResNetForImageClassification": (
            "ResNetConfig",
            {
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "num_labels": 10,
            },
        ),
        "ConvNextForImageClassification": (
            "ConvNextConfig",
            {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 10},
        ),
        "MobileNetV1ForImageClassification": ("MobileNetV1Config", {"depth_multiplier": 0.25, "num_labels": 10}),
        "MobileNetV2ForImageClassification": ("MobileNetV2Config", {"depth_multiplier": 0.25, "num_labels": 10}),
        "LevitForImageClassificationWithTeacher": ("LevitConfig", {"num_labels": 10}),
        "SwiftFormerForImageClassification": ("SwiftFormerConfig", {"num_labels": 10}),
    }
    config, arguments = options[name]
    model = vars(transformers).get(name) or getattr(transformers, name)
    made: nn.Module = model(getattr(transformers, config)(**arguments))
    return made


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("ViTForImageClassification", 32, 32),
        ("BeitForImageClassification", 32, 32),
        ("Dinov2ForImageClassification", 32, 64),
        ("DeiTForImageClassification", 32, 32),
        ("DeiTForImageClassificationWithTeacher", 32, 32),
        ("ResNetForImageClassification", 32, 16),
        ("ConvNextForImageClassification", 32, 32),
        ("MobileNetV1ForImageClassification", 64, 256),
        ("MobileNetV2ForImageClassification", 64, 1280),
        pytest.param("LevitForImageClassificationWithTeacher", 224, 384, marks=pytest.mark.slow),
        pytest.param("SwiftFormerForImageClassification", 224, 220, marks=pytest.mark.slow),
    ],
)
def test_hugging_face(name: str, size: int, width: int) -> None:
    check_family(lambda: hugging_face(name), size, width)


def test_squeezenet_gives_the_pooled_input_of_its_convolution() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.squeezenet1_1(num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.features(x).mean((2, 3))
        torch.testing.assert_close(attach_head(model, "dense").features(x), expected)


def test_distilled_models_give_the_mean_of_both_tokens() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=32, depth=2).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        headed = attach_head(model, "dense")
        torch.testing.assert_close(headed.features(x), expected)
        model.set_distilled_training(True)
        torch.testing.assert_close(headed.train().features(x), expected)  # returns both outputs, apart


@pytest.mark.parametrize(
    ("name", "size"), [("googlenet", 64), pytest.param("inception_v3", 299, marks=pytest.mark.slow)]
)
def test_auxiliary_outputs_in_training_are_passed_over(name: str, size: int) -> None:
    models = pytest.importorskip("torchvision.models")
    headed = attach_head(models.get_model(name, num_classes=10, aux_logits=True, init_weights=False), "dense")
    assert headed.training
    assert headed(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_a_timm_model_without_a_classifier_is_refused() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="num_classes >= 1"):
        attach_head(timm.create_model("test_vit", num_classes=0), "dense")
