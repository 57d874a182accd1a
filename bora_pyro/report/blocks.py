"""What a page is made of: headline numbers, tables, pictures, samples of text, and the sections that hold them.

    >>> table = Table("Tasks", [Column("task"), Column("perplexity", digits=2)], [["ada", 12.345], ["bo", None]])
    >>> [[cell.text for cell in row] for row in table.cells()]
    [['ada', '12.35'], ['bo', '–']]

They hold plain values; the template alone writes HTML, and escapes what it writes.
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
        label: what it is.
        text: the number as it is shown.
        note: what to compare it with.
    """

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it shows.
        order: by what its column is sorted: a number, or a text; an empty text is last whichever way.
        strong: whether it stands out.
        link: where it leads to.
    """

    text: str
    order: float | str = ""
    strong: bool = False
    link: str | None = None

    @property
    def key(self) -> str:
        """``order`` as the page's script reads it."""
        if isinstance(self.order, str):
            return self.order
        order = float(self.order)
        return repr(order) if math.isfinite(order) else "Infinity" if order > 0 else "-Infinity"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: its name.
        digits: behind the decimal point, of a column of numbers; None: a column of texts.
        number: whether its cells are sorted and aligned as numbers; default: where it has digits.
        sign: whether numbers above 0 have one too.
    """

    heading: str
    digits: int | None = None
    number: bool | None = None
    sign: bool = False

    @property
    def numeric(self) -> bool:
        """Whether it is sorted and aligned as numbers are."""
        return self.digits is not None if self.number is None else self.number

    def cell(self, value: Any) -> Cell:
        """A value as a cell; None and NaN are missing."""
        if isinstance(value, Cell):
            return value
        if value is None or value != value or value == "":
            return Cell(MISSING)
        if self.digits is None or isinstance(value, str):
            return Cell(str(value), str(value))
        return Cell(number_text(value, self.digits, sign=self.sign), float(value))


@dataclass(frozen=True)
class Table:
    """A table whose columns the reader may sort.

    Attributes:
        caption: what it holds.
        columns: of which the first names the rows.
        rows: values, or cells, by row.
        total: the last row, which stays where it is.
        sortable: whether its columns can be sorted.
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
        title: what it shows.
        caption: how to read it.
        svg: the drawing as an ``svg`` element.
        width: its natural width in CSS pixels.
    """

    title: str
    caption: str
    svg: Markup
    width: float


@dataclass(frozen=True)
class Pictures:
    """Drawings that stand together."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Samples:
    """Texts that different writers made of one beginning.

    Attributes:
        prompt: the beginning.
        texts: who wrote, what is to be said of them, and their text.
    """

    kind: ClassVar[str] = "samples"
    prompt: str
    texts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Lines:
    """Sentences: a list where there are several."""

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """A block that the reader opens."""

    kind: ClassVar[str] = "folded"
    summary: str
    block: Any


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; ``name`` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Any]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kind: what it is of: a run, a sweep, runs.
        title: the name of that.
        subtitle: in one line, what was done.
        numbers: the headline.
        sections: the parts; one without blocks is left out.
        versions: by name, those that the result was made with.
        versions_of: what they are those of.
    """

    kind: str
    title: str
    subtitle: str
    numbers: Sequence[Number]
    sections: Sequence[Section]
    versions: Mapping[str, str] = field(default_factory=dict)
    versions_of: str = "the fit"


def number_text(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """A number for people: thousands set apart, a true minus, ∞.

    >>> number_text(12345.678), number_text(-3, 0), number_text(2.5, 1, sign=True), number_text(float("inf"))
    ('12,345.68', '−3', '+2.5', '∞')
    """
    text = f"{value:{'+' if sign else ''},.{digits}f}" if math.isfinite(value) else f"{value:{'+' if sign else ''}}"
    return text.replace("inf", "∞").replace("-", "−")


def short_number(value: float) -> str:
    """Three digits of a number of any size.

    >>> short_number(168.44), short_number(10000.0), short_number(float("inf"))
    ('168', '10,000', '∞')
    """
    return "∞" if math.isinf(value) else f"{float(f'{value:.3g}'):,}".removesuffix(".0")


def duration_text(seconds: float) -> str:
    """A time for people.

    >>> duration_text(7.25), duration_text(185), duration_text(3 * 3600 + 60)
    ('7.2 s', '3.1 min', '3.0 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def option_text(value: Any) -> str:
    """An option as YAML has it, which ``--config`` reads.

    >>> option_text(["q_proj", "v_proj"]), option_text(None), option_text(0.01)
    ('[q_proj, v_proj]', 'null', '0.01')
    """
    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)).removesuffix("...\n").strip()
