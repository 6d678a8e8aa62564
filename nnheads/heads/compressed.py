"""The options of compressed centers."""

from __future__ import annotations

from typing import Any, Literal

from .._codebooks import parse_rotation
from .._coded_rows import QUANTIZER
from ..coding import ROTATION, Coding
from ..errors import ConfigError
from ..quantize import MAX_BYTES, MIN_BYTES
from .base import positive
from .memory_head import MemoryHead
from .registry import build_head
from .searching import CODE_ENGINES


def coding_of(
    head: str, bytes_per_center: int | None, rotation: str, code_bits: Literal[4, 8], dim: int
) -> Coding | None:
    """How a head's centers are compressed.

    Only codes and codebooks are kept and saved, never the centers themselves. Distances are those to decoded centers,
    and their gradient reaches the embedding alone: codes take no gradient steps. A center that moves is encoded with
    the codebooks there are; these are trained when there are centers enough, and again at a refresh, and while
    training, when they do not fit any more (see `nnheads.coding.Coder`). During a refresh, and the first epoch of
    `nnheads.fit` is one, centers are kept as they come. Codebooks are trained with the centers there are, and keep
    what they learned of one that is dropped, as the backbone's weights do.

    Codes are searched by `nnheads.code_index.CodeIndex`; of a head's engines it takes ``"auto"`` and ``"torch"``. The
    others are for raw centers, among them ``"pq"``, which searches 4-bit codes and ranks what it finds by the exact
    centers, which it keeps.

    Args:
        head: its name, for messages.
        bytes_per_center: 4 to 64; None or 0 keeps centers as they are, four bytes a number.
        rotation: what is done before the parts of a center are quantized. ``"pca"`` or ``"pca:DIM"``: the DIM leading
            principal directions, four a byte by default; ``"opq"`` or ``"opq:DIM"``, these rotated further by
            training; ``"none"``.
        code_bits: 8, or 4 for codebooks of 16 words, smaller and less exact.
        dim: width of the centers.

    Raises:
        ConfigError: a value that cannot work.
    """
    positive(head, "bytes_per_center", bytes_per_center or 0, integer=True, zero=True)
    if code_bits not in (4, 8):
        raise ConfigError(f"head {head!r}: code_bits must be 8 or 4, got {code_bits!r}")
    if not bytes_per_center:
        if rotation != ROTATION or code_bits != 8:
            raise ConfigError(f"head {head!r}: rotation and code_bits are of compressed centers: give bytes_per_center")
        return None
    if not MIN_BYTES <= bytes_per_center <= MAX_BYTES:
        raise ConfigError(
            f"head {head!r}: bytes_per_center must be {MIN_BYTES} to {MAX_BYTES}, or 0 for none, got {bytes_per_center}"
        )
    try:
        parse_rotation(rotation, dim, bytes_per_center)
    except (ConfigError, AttributeError) as error:
        raise ConfigError(f"head {head!r}: {error}") from None
    return Coding(bytes_per_center, rotation, code_bits)


def compressed_head(
    head: MemoryHead, bytes_per_center: int = 16, *, rotation: str = ROTATION, code_bits: Literal[4, 8] = 8
) -> MemoryHead:
    """A trained head's twin that holds the same centers compressed; from one that has them compressed otherwise, what
    its codes decode to.

    ``model = attach_head(model, compressed_head(model.head))`` puts it on the model. Labels, weights and the width of
    the kernel are those of the head given, which is left as it is.

    Args:
        head: one with the option ``bytes_per_center``.
        bytes_per_center, rotation, code_bits: see `coding_of`.

    Raises:
        ConfigError: a head that does not compress its centers, or a value that cannot work.
    """
    options: dict[str, Any] = {"bytes_per_center": bytes_per_center, "rotation": rotation, "code_bits": code_bits}
    if bytes_per_center and head.engine not in CODE_ENGINES:
        options["engine"] = "auto"  # what it searched is not there
    twin = build_head(head.name, head.in_features, head.num_classes, **{**head.config(), **options})
    assert isinstance(twin, MemoryHead)
    state = head.state_dict()
    had, has = (None if one.memory.coder is None else one.memory.coder.coding for one in (head, twin))
    if had is not None and had != has:
        kept = f"memory.{QUANTIZER}"
        state = {name: part for name, part in state.items() if not name.startswith(kept) and name != "memory.codes"}
        state["memory.keys"] = head.memory.all_keys()
    twin.to(head.memory.keys.device).load_state_dict(state)
    return twin.train(head.training)
