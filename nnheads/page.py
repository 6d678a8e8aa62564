"""Evidence as one page of HTML that needs nothing beside itself: no network, no scripts, no other files."""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Sequence
from typing import Any

from nnheads.explain import ImageEvidence
from nnheads.headed import HeadedModel
from nnheads.heads import MemoryHead

_LEAST = 0.0005  # probability below which a class is not shown: it would read 0.0 %
_SMALL = 64  # pixels below which pictures are enlarged without smoothing


def render_page(
    model: HeadedModel, images: Sequence[ImageEvidence], *, title: str = "", left_out: Sequence[int] = ()
) -> str:
    """HTML of a page that shows why a model answered images as it did.

    Whatever comes from outside (names of files and classes) is escaped. The page is legible in light and dark, on
    narrow screens and on paper, and has a text for every picture.

    Args:
        model: the one that answered.
        images: see `nnheads.explain.gather_evidence`.
        title: of the page.
        left_out: ids of the samples of a what-if.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=_percent, width=_width, number=_number, change=_change)

    def picture(code: bytes | None, description: str, otherwise: str) -> Markup:
        if code is None:
            return Markup('<div class="none" role="img" aria-label="{}">no picture</div>').format(otherwise)
        data = base64.b64encode(code).decode("ascii")
        width, height = _size(code)
        form = ' class="small"' if max(width, height) <= _SMALL else ""
        return Markup('<img{} src="data:image/webp;base64,{}" alt="{}" width="{}" height="{}">').format(
            Markup(form), data, description, width, height
        )

    text = (importlib.resources.files("nnheads") / "templates" / "explain.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=title or ("Why this answer?" if len(images) == 1 else f"Why these {len(images)} answers?"),
        facts=_facts(model),
        images=[_shown(image, left_out) for image in images],
        left_out=list(left_out),
        picture=picture,
        footnote=(
            "A sample's percentage is its weight in the decision. Blue: of the class that was answered; orange: of "
            "another. Made by nnheads; this page needs no network and holds no scripts."
        ),
    )


def _facts(model: HeadedModel) -> list[str]:
    facts = [f"head {model.head.name}"]
    if model.backbone_spec is not None:
        facts.append(f"backbone {model.backbone_spec['name']}")
    if isinstance(model.head, MemoryHead):
        facts.append(f"{len(model.head.memory):,} stored samples")
    return [*facts, f"{model.head.num_classes} classes"]


def _shown(image: ImageEvidence, left_out: Sequence[int]) -> dict[str, Any]:
    changes = []
    if image.what_if is not None:
        before = dict(image.classes)
        # Those shown above, and what else has become likely.
        new = sorted(image.what_if, key=lambda name: -(image.what_if or {})[name])[: len(before)]
        both = [(name, image.all_classes[name], image.what_if[name]) for name in dict.fromkeys([*before, *new])]
        changes = [row for row in both if max(row[1:]) >= _LEAST] if image.lost else []
    return {
        "name": image.name,
        "picture": image.picture,
        "predicted": image.predicted,
        "predicted_without": image.predicted_without,
        "classes": [(name, p) for place, (name, p) in enumerate(image.classes) if p >= _LEAST or not place],
        "neighbors": image.neighbors,
        "scale": image.scale,
        "what_if": image.what_if,
        "lost": image.lost,
        "changes": changes,
        "heaviest": max((near.weight for near in image.neighbors), default=1.0) or 1.0,
        "remarks": image.remarks,
        "summary": _summary(image),
    }


def _summary(image: ImageEvidence) -> str:
    parts = []
    count, weight = image.others
    if count:
        parts.append(f"{count} more {'sample has' if count == 1 else 'samples have'} {_percent(weight)} of the weight.")
    shown = sum(near.weight for near in image.neighbors if near.label == image.predicted)
    if image.neighbors:
        parts.append(f"Of the samples shown, those of class {image.predicted} have {_percent(shown)}.")
    if image.scale == "logit":
        parts.append(
            f"Contributions add up in logits; {_number(image.rest)} of that of {image.predicted} is from elsewhere."
        )
    elif (smoothing := image.rest - image.uniform_share / len(image.all_classes)) >= _LEAST:
        parts.append(f"{_percent(smoothing)} of its probability is smoothing, not evidence.")
    if image.uniform_share >= _LEAST:
        parts.append(f"{_percent(image.uniform_share)} is shared equally over all classes, by calibration.")
    return " ".join(parts)


def _size(code: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(code)) as picture:
        return picture.size


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u202f%"


def _change(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212") + " points"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def _width(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"
