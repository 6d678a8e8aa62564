"""How many exemplars, with their centers, fit into so many bytes."""

from __future__ import annotations

import copy

from nnheads.attach import attach_head
from nnheads.coding import MIN_ROWS
from nnheads.errors import ConfigError
from nnheads.heads import build_head
from nnheads.heads.base import Head
from nnheads.heads.memory_head import MemoryHead
from nnheads.strategies.buffer import ExemplarBuffer
from nnheads.strategies.learner import Setup

CENTER_OVERHEAD = 3 * 8
"""Bytes of a center beside its key: label, id, and the place of its soft label."""

NEXT_ID = 8
"""Bytes of the id that a memory gives next."""


def center_bytes(head: Head, soft: bool = False, centers: int = 2**8) -> int:
    """Bytes that each center of a head may take, codebooks not counted; 0 for a head without memory.

    Args:
        head: whose centers they are.
        soft: whether each may get a soft label.
        centers: how many there are, which decides how they are compressed.
    """
    if not isinstance(head, MemoryHead):
        return 0
    memory = head.memory
    number = memory.keys.element_size()
    widths = [head.num_classes if width == "classes" else width or 1 for width in memory.columns.values()]
    coder = memory.coder
    key = number * memory.dim if coder is None else coder.coding.row_bytes(memory.dim, centers)
    return key + number * (sum(widths) + soft * head.num_classes) + CENTER_OVERHEAD


def centers_within(budget_bytes: int, head: Head, beside: int = 0, soft: bool = False) -> int:
    """How many centers of a head fit, with their codebooks where they are compressed.

    Args:
        budget_bytes: what there is.
        head: whose centers they are.
        beside: bytes that come with each center.
        soft: whether each may get a soft label.
    """
    if isinstance(head, MemoryHead):
        budget_bytes = max(0, budget_bytes - (head.bytes - head.memory.bytes))
    coder = head.memory.coder if isinstance(head, MemoryHead) else None
    if not isinstance(head, MemoryHead):
        return budget_bytes // beside
    if coder is None:
        return max(0, budget_bytes - NEXT_ID) // (beside + center_bytes(head, soft))
    # The more centers, the larger the codebooks: as many as fit with the largest that so many would get.
    limit = None
    for least in (2**coder.coding.bits, MIN_ROWS, 1):
        fixed = coder.coding.fixed_bytes(head.memory.dim, least)
        fitting = max(0, budget_bytes - fixed) // (beside + center_bytes(head, soft, least))
        if fitting >= least:
            return fitting if limit is None else min(fitting, limit)
        limit = least - 1
    return 0


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
    fitting = centers_within(budget_bytes, head, buffer.row_bytes, soft)
    if fitting < setup.num_classes:
        raise ConfigError(
            f"{budget_bytes} bytes of memory hold {fitting} centers, fewer than the {setup.num_classes} classes of the "
            "stream: give at least one center a class"
        )
    return fitting
