"""How many exemplars, with their centers, fit into so many bytes."""

from __future__ import annotations

import copy

from nnheads.attach import attach_head
from nnheads.errors import ConfigError
from nnheads.heads import build_head
from nnheads.heads.base import Head
from nnheads.heads.memory_head import MemoryHead
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.learner import Setup

CENTER_OVERHEAD = 3 * 8
"""Bytes of a center beside its key: label, id, and the place of its soft label."""


def center_bytes(head: Head, soft: bool = False) -> int:
    """Bytes that each center of a head may take; 0 for a head without memory.

    Args:
        head: whose centers they are.
        soft: whether each may get a soft label.
    """
    if not isinstance(head, MemoryHead):
        return 0
    memory = head.memory
    number = memory.keys.element_size()
    widths = [head.num_classes if width == "classes" else width or 1 for width in memory.columns.values()]
    return number * (memory.dim + sum(widths) + soft * head.num_classes) + CENTER_OVERHEAD


def exemplars_within(budget_bytes: int, setup: Setup, *, images: bool = True, soft: bool = False) -> int:
    """How many exemplars fit, each as it is stored and with the center that it is.

    Args:
        budget_bytes: what there is.
        setup: the run.
        images: whether their images are kept.
        soft: whether centers may get soft labels.

    Raises:
        ConfigError: fewer than there are classes.
    """
    probe = attach_head(copy.deepcopy(setup.backbone), "dense")
    head = build_head(setup.head, probe.in_features, setup.num_classes, **setup.head_options)
    shape = (setup.preprocessing.channels, *setup.preprocessing.size) if images else None
    buffer = ExemplarBuffer(1, shape, exemplar_bytes=setup.exemplar_bytes if images else None)
    fitting = budget_bytes // (buffer.row_bytes + center_bytes(head, soft))
    if fitting < setup.num_classes:
        raise ConfigError(
            f"{budget_bytes} bytes of memory hold {fitting} centers, fewer than the {setup.num_classes} classes of the "
            "stream: give at least one center a class"
        )
    return fitting
