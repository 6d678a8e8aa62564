"""What a study is: cells that are run, tables that show what came of them beside what was published, and scales."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

from nnheads.errors import ConfigError, unknown_name

Settings = Mapping[str, Any]
"""What a cell is run with: JSON values."""

Form = Literal["percent", "points", "share", "count", "seconds", "bytes", "nats", "ms"]
"""How a number is shown: a share from 0 to 1 as per cent or as it is, a difference of two shares in percentage points,
a whole number, seconds and so on."""

UNITS: Final[Mapping[Form, str]] = {
    "percent": "%",
    "points": "points",
    "share": "share",
    "count": "",
    "seconds": "s",
    "bytes": "bytes",
    "nats": "nats",
    "ms": "ms",
}
"""What stands beside a number of each form."""

SCALES: Final = ("smoke", "cpu", "paper")


@final
@dataclass(frozen=True)
class Cell:
    """One thing to run: a training, and all that is measured on it.

    Attributes:
        name: unique in the study, and the beginning of its files' names.
        settings: what it is run with at the paper's scale.
    """

    name: str
    settings: Settings


@final
@dataclass(frozen=True)
class Entry:
    """One number of a table.

    Attributes:
        row, column: where it stands.
        cell: whose it is.
        measure: which of the cell's measures.
        published: the paper's number as printed there (99.44 for 99.44 %); None where it gives none.
        form: how it is shown.
    """

    row: str
    column: str
    cell: str
    measure: str
    published: float | None = None
    form: Form = "percent"


@final
@dataclass(frozen=True)
class Curves:
    """A figure of lines, a panel for each cell.

    Attributes:
        cells: the panels.
        series: which of the cells' series.
        x: the key of its horizontal axis, numbers or names.
        lines: keys of what is drawn over it, and their names in the legend.
        x_label, y_label: of the axes, with the unit.
        percent: whether values are shares to be drawn as per cent.
        mark: a measure at which a vertical line is drawn, with its name in the legend.
        log_x, log_y: whether an axis is logarithmic; the horizontal one may begin at 0.
    """

    cells: tuple[str, ...]
    series: str
    x: str
    lines: tuple[tuple[str, str], ...]
    x_label: str
    y_label: str
    percent: bool = True
    mark: tuple[str, str] | None = None
    log_x: bool = False
    log_y: bool = False


@final
@dataclass(frozen=True)
class Picture:
    """A figure that is neither lines nor points, a panel for each cell.

    Attributes:
        kind: ``"confusion"``, from the series ``confusion`` with a column a class; ``"nearest"``, from the series
            ``nearest`` with PNG images.
        cells: the panels.
    """

    kind: Literal["confusion", "nearest"]
    cells: tuple[str, ...]


@final
@dataclass(frozen=True)
class Table:
    """A table or figure of a paper.

    Attributes:
        id: what ``--table`` takes.
        title: with the paper's own number.
        entries: its numbers; may be none where there is a figure alone.
        curves: its figure; None for measured against published numbers.
        note: what a reader must know about it.
        picture: its figure, where it is neither.
        quantity: what its per cent or whole numbers are, for the axis of its figure.
    """

    id: str
    title: str
    entries: tuple[Entry, ...] = ()
    curves: Curves | None = None
    note: str = ""
    picture: Picture | None = None
    quantity: str = "accuracy"

    @property
    def cells(self) -> tuple[str, ...]:
        """The names of the cells it shows, each once."""
        shown = [entry.cell for entry in self.entries] + list(self.curves.cells if self.curves else ())
        shown += self.picture.cells if self.picture else ()
        return tuple(dict.fromkeys(shown))


@final
@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run.

    Attributes:
        describes: one line for the reader: data, epochs and what else differs from the paper's.
        settings: replace the cells' own.
        overrides: pairs of a pattern of cell names and settings for those alone; later ones count.
        cells: patterns of the cells that are run at this scale.
    """

    describes: str
    settings: Settings = field(default_factory=dict)
    overrides: tuple[tuple[str, Settings], ...] = ()
    cells: tuple[str, ...] = ("*",)


@final
@dataclass(frozen=True)
class Job:
    """What running one cell takes.

    Attributes:
        settings: of the cell at the scale chosen.
        seed: of everything random.
        data_dir: where images are; None for the usual places.
        device: see `nnheads.training.resolve_device`.
        report: called with a few words on what is being done, how much is done, and how much there is.
    """

    settings: Settings
    seed: int
    data_dir: Path | None
    device: str
    report: Callable[[str, int, int], None]


@final
@dataclass(frozen=True)
class Outcome:
    """What a cell's run found.

    Attributes:
        measures: name to number; None where there is nothing to measure.
        series: name to columns of equal length, numbers or (the horizontal axis) names.
    """

    measures: Mapping[str, float | None]
    series: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Study:
    """A paper's experiments.

    Attributes:
        name: what ``nnheads study`` takes.
        title: in the list and at the head of the report.
        source: the paper.
        cells: all that can be run.
        tables: all that can be shown.
        scales: by name, ``smoke``, ``cpu`` and ``paper``.
        run: runs a cell.
        note: choices that the paper leaves open, for the report.
    """

    name: str
    title: str
    source: str
    cells: tuple[Cell, ...]
    tables: tuple[Table, ...]
    scales: Mapping[str, Scale]
    run: Callable[[Job], Outcome]
    note: str = ""

    def cell(self, name: str) -> Cell:
        """Raises:
        UnknownNameError: no cell has that name.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise unknown_name(f"cell of study {self.name!r}", name, [cell.name for cell in self.cells])

    def table(self, table_id: str) -> Table:
        """Raises:
        UnknownNameError: no table has that id.
        """
        for table in self.tables:
            if table.id.lower() == table_id.lower():
                return table
        raise unknown_name(f"table of study {self.name!r}", table_id, [table.id for table in self.tables])

    def scale(self, name: str) -> Scale:
        """Raises:
        UnknownNameError: no scale has that name.
        """
        if name not in self.scales:
            raise unknown_name("scale", name, self.scales)
        return self.scales[name]

    def settings(self, cell: Cell, scale: str) -> dict[str, Any]:
        """What a cell is run with at a scale."""
        chosen = self.scale(scale)
        settings = {**cell.settings, **chosen.settings}
        for pattern, more in chosen.overrides:
            if fnmatch.fnmatchcase(cell.name, pattern):
                settings |= more
        return settings

    def chosen(self, scale: str, tables: Sequence[str] = (), only: Sequence[str] = ()) -> list[Cell]:
        """The cells of a scale, of some tables (all by default), whose names fit one of the patterns (all by default).

        Raises:
            UnknownNameError: a table or scale that the study does not have.
            ConfigError: nothing is left.
        """
        at_scale = self.scale(scale).cells
        shown = {name for table_id in tables for name in self.table(table_id).cells}
        found = [
            cell
            for cell in self.cells
            if (not tables or cell.name in shown)
            and any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in at_scale)
            and (not only or any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in only))
        ]
        if not found:
            wanted = ", ".join([*tables, *only]) or "nothing asked for"
            raise ConfigError(f"study {self.name!r} has no cell at scale {scale!r} for {wanted}: try --scale paper")
        return found

    def check(self) -> None:
        """Raises:
        ConfigError: a table shows a cell that there is not, or two things have one name.
        """
        names = [cell.name for cell in self.cells]
        ids = [table.id.lower() for table in self.tables]
        if len(set(names)) < len(names) or len(set(ids)) < len(ids):
            raise ConfigError(f"study {self.name!r}: two cells or two tables have the same name")
        if tuple(self.scales) != SCALES:
            raise ConfigError(f"study {self.name!r}: scales must be {', '.join(SCALES)}, not {', '.join(self.scales)}")
        for table in self.tables:
            for name in table.cells:
                self.cell(name)
