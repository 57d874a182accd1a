"""The parts of a page: headline numbers, tables, pictures, samples of text, and the sections that hold them.

    >>> table = Table("Tasks", [Column("task"), Column("perplexity", digits=2)], [["ada", 12.345], ["bo", None]])
    >>> [[cell.text for cell in row] for row in table.cells()]
    [['ada', '12.35'], ['bo', '–']]

The parts hold plain values. Only the template writes HTML, and it escapes every value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml
from markupsafe import Markup

MISSING = "–"


@dataclass(frozen=True)
class Number:
    """One headline number.

    Attributes:
        label: what the number is.
        text: the number as it is shown.
        note: what to compare the number with.
    """

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the text that is shown.
        order: the sort key in its column, a number or a text. An empty text comes last in both directions.
        strong: whether the cell is shown in bold.
        link: the address that a click opens; None: the cell is no link.
    """

    text: str
    order: float | str = ""
    strong: bool = False
    link: str | None = None

    @property
    def key(self) -> str:
        """The sort key as a text that the page's script can read."""
        if isinstance(self.order, str):
            return self.order
        order = float(self.order)
        return repr(order) if math.isfinite(order) else "Infinity" if order > 0 else "-Infinity"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: the column's name.
        digits: digits after the decimal point; None: a column of texts.
        number: whether cells are sorted and aligned as numbers; default: they are if ``digits`` is given.
        sign: whether numbers above 0 get a plus sign.
    """

    heading: str
    digits: int | None = None
    number: bool | None = None
    sign: bool = False

    @property
    def numeric(self) -> bool:
        """Whether the column is sorted and aligned as numbers."""
        return self.digits is not None if self.number is None else self.number

    def cell(self, value: Any) -> Cell:
        """Make a value a cell. None, NaN and an empty text are shown as missing."""
        if isinstance(value, Cell):
            return value
        if value is None or value != value or value == "":
            return Cell(MISSING)
        if self.digits is None or isinstance(value, str):
            return Cell(str(value), str(value))
        return Cell(number_text(value, self.digits, sign=self.sign), float(value))


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort by a column.

    Attributes:
        caption: what the table holds.
        columns: the columns; the first one names the rows.
        rows: the rows, each with a value or a cell a column.
        total: a last row that sorting does not move; None: no such row.
        sortable: whether the reader can sort the table.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    total: Sequence[Any] | None = None
    sortable: bool = True

    def cells(self) -> Iterator[list[Cell]]:
        """The cells, row by row."""
        for row in self.rows:
            yield self._cells(row)

    def total_cells(self) -> list[Cell]:
        """The cells of the last row."""
        return self._cells(self.total or ())

    def _cells(self, row: Sequence[Any]) -> list[Cell]:
        return [column.cell(value) for column, value in zip(self.columns, row, strict=True)]


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        title: what the drawing shows.
        caption: how to read the drawing.
        svg: the drawing as an ``svg`` element.
        width: the natural width of the drawing in CSS pixels.
    """

    title: str
    caption: str
    svg: Markup
    width: float


@dataclass(frozen=True)
class Pictures:
    """Drawings that are shown next to each other."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Samples:
    """Continuations of one prompt by different adapters.

    Attributes:
        prompt: the text that is continued.
        texts: for each continuation the name of its adapter, a note on that adapter, and the text.
    """

    kind: ClassVar[str] = "samples"
    prompt: str
    texts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Lines:
    """Sentences; more than one are shown as a list."""

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """A block that stays closed until the reader opens it."""

    kind: ClassVar[str] = "folded"
    summary: str
    block: Any


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; ``name`` is the anchor that links point to."""

    name: str
    title: str
    blocks: Sequence[Any]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kind: what the page shows: a run, a sweep, runs.
        title: the name of the run, the sweep or the folder of runs.
        subtitle: one line on what was done.
        numbers: the headline numbers.
        sections: the sections; one without blocks is not shown.
        versions: versions of the software by name.
        versions_of: what was made with those versions.
    """

    kind: str
    title: str
    subtitle: str
    numbers: Sequence[Number]
    sections: Sequence[Section]
    versions: Mapping[str, str] = field(default_factory=dict)
    versions_of: str = "the fit"


def number_text(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Format a number for people: commas between thousands, a true minus sign, ∞.

    >>> number_text(12345.678), number_text(-3, 0), number_text(2.5, 1, sign=True), number_text(float("inf"))
    ('12,345.68', '−3', '+2.5', '∞')
    """
    text = f"{value:{'+' if sign else ''},.{digits}f}" if math.isfinite(value) else f"{value:{'+' if sign else ''}}"
    return text.replace("inf", "∞").replace("-", "−")


def short_number(value: float) -> str:
    """Format a number of any size with three significant digits.

    >>> short_number(168.44), short_number(10000.0), short_number(float("inf"))
    ('168', '10,000', '∞')
    """
    return "∞" if math.isinf(value) else f"{float(f'{value:.3g}'):,}".removesuffix(".0")


def duration_text(seconds: float) -> str:
    """Format a duration in seconds for people.

    >>> duration_text(7.25), duration_text(185), duration_text(3 * 3600 + 60)
    ('7.2 s', '3.1 min', '3.0 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def option_text(value: Any) -> str:
    """Format an option's value as YAML, so that ``--config`` can read it.

    >>> option_text(["q_proj", "v_proj"]), option_text(None), option_text(0.01)
    ('[q_proj, v_proj]', 'null', '0.01')
    """
    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)).removesuffix("...\n").strip()
