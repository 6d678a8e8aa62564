"""The study of drift as text."""

from __future__ import annotations

from typing import Any, Final

WHERE: Final = ("affected", "held out")
"""Where drift is measured: at the affected points and at held-out samples."""


def table(result: dict[str, Any]) -> str:
    """The result as two tables of text."""
    single = [
        ["form", *(f"{kind}, {where}" for kind in ("drop", "add") for where in WHERE)],
        *(
            [row["form"], *(_number(row[f"{kind} {where}"]) for kind in ("drop", "add") for where in WHERE)]
            for row in result["single"]
        ),
    ]
    many = [
        ["change", "chosen", "form", *WHERE, "accuracy before", "after", "at added", "without own"],
        *(
            [
                row["kind"],
                row["choice"],
                row["form"],
                *(f"{row[where]:.3f}" for where in WHERE),
                *(f"{100 * row[name]:.1f}" for name in ("accuracy_before", "accuracy_after")),
                *(
                    "" if row[name] is None else f"{100 * row[name]:.1f}"
                    for name in ("accuracy_at_added", "accuracy_at_added_without_own")
                ),
            ]
            for row in result["at_once"]
        ),
    ]
    return "\n\n".join(
        "\n".join("  ".join(cell.ljust(max(len(r[i]) for r in rows)) for i, cell in enumerate(row)) for row in rows)
        for rows in (single, many)
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
