"""Nearest-neighbour heads for any PyTorch backbone.

    model = nnheads.attach_head(torchvision.models.resnet18(num_classes=10), "nngk")
    nnheads.fit(model, train_loader, epochs=10)
    model(x)  # log-probabilities, (B, C)

The names below are loaded when they are first used (PEP 562): ``import nnheads`` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import nnheads.analysis as analysis
    import nnheads.errors as errors
    import nnheads.functional as functional
    import nnheads.testing as testing
    from nnheads.attach import attach_head as attach_head
    from nnheads.attach import detach_head as detach_head
    from nnheads.backbones import build_backbone as build_backbone
    from nnheads.backbones import list_backbones as list_backbones
    from nnheads.calibration import calibrate as calibrate
    from nnheads.data import ImageSet as ImageSet
    from nnheads.data import Preprocessing as Preprocessing
    from nnheads.data import with_ids as with_ids
    from nnheads.errors import NNHeadsError as NNHeadsError
    from nnheads.gating import sweep_threshold as sweep_threshold
    from nnheads.headed import HeadedModel as HeadedModel
    from nnheads.heads import Head as Head
    from nnheads.heads import MemoryHead as MemoryHead
    from nnheads.heads import build_head as build_head
    from nnheads.heads import list_heads as list_heads
    from nnheads.heads import register_head as register_head
    from nnheads.index import build_index as build_index
    from nnheads.io import load as load
    from nnheads.io import save as save
    from nnheads.memory import Memory as Memory
    from nnheads.training import embed as embed
    from nnheads.training import evaluate as evaluate
    from nnheads.training import fit as fit
    from nnheads.training import fit_gate as fit_gate

    __version__: str

_HOMES = {
    "attach_head": "attach",
    "detach_head": "attach",
    "build_backbone": "backbones",
    "calibrate": "calibration",
    "list_backbones": "backbones",
    "ImageSet": "data",
    "Preprocessing": "data",
    "with_ids": "data",
    "NNHeadsError": "errors",
    "HeadedModel": "headed",
    "Head": "heads",
    "MemoryHead": "heads",
    "build_head": "heads",
    "list_heads": "heads",
    "register_head": "heads",
    "build_index": "index",
    "load": "io",
    "save": "io",
    "Memory": "memory",
    "embed": "training",
    "evaluate": "training",
    "fit": "training",
    "fit_gate": "training",
    "sweep_threshold": "gating",
}
"""The module that defines each public name."""

_SUBMODULES = ("analysis", "errors", "functional", "testing")

__all__ = [
    "Head",
    "HeadedModel",
    "ImageSet",
    "Memory",
    "MemoryHead",
    "NNHeadsError",
    "Preprocessing",
    "analysis",
    "attach_head",
    "build_backbone",
    "build_head",
    "build_index",
    "calibrate",
    "detach_head",
    "embed",
    "errors",
    "evaluate",
    "fit",
    "fit_gate",
    "functional",
    "list_backbones",
    "list_heads",
    "load",
    "register_head",
    "save",
    "sweep_threshold",
    "testing",
    "with_ids",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


# Hidden from type checkers: they would otherwise take any misspelt name for this function's answer.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _SUBMODULES:
            return import_module(f"nnheads.{name}")
        if name in _HOMES:
            value = getattr(import_module(f"nnheads.{_HOMES[name]}"), name)
        elif name == "__version__":
            value = _version()
        else:
            raise AttributeError(f"module 'nnheads' has no attribute {name!r}")
        globals()[name] = value
        return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nnheads")
    except PackageNotFoundError:  # used from its source folder without being installed
        return "0+unknown"
