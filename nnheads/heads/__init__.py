"""The heads, by name: `build_head`, `list_heads`, `register_head`; one file a head.

"Review" in their docstrings is Chervontsev's review of nearest-neighbour Gaussian kernels and impostor networks.
"""

from .base import Head, sample_ids
from .biased import BiasedHead, Gated
from .dense import DenseHead
from .evidence import Explanation, Neighbors
from .impostor import ImpostorHead
from .kernel import KernelHead
from .knn import KNNHead
from .memory_head import MemoryHead
from .nca import NCAHead
from .nngk import NNGKHead
from .registry import build_head, head_class, list_heads, register_head

__all__ = [
    "BiasedHead",
    "DenseHead",
    "Explanation",
    "Gated",
    "Head",
    "ImpostorHead",
    "KNNHead",
    "KernelHead",
    "MemoryHead",
    "NCAHead",
    "NNGKHead",
    "Neighbors",
    "build_head",
    "head_class",
    "list_heads",
    "register_head",
    "sample_ids",
]
