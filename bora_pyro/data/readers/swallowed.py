r"""Find quoted cells that have swallowed rows: a stray quote opens a cell, and a quote some rows later closes it.

The file below has a stray quote in line 2, and a cell that ends with a quote in line 4. By the rules of CSV, lines 2 to 4 are one
row. The lines 3 and 4 are rows by themselves, and their tasks are known from other rows: so the file is refused.

>>> swallowed = SwallowedRows("file 'a.csv'", ["task", "text"], ",", trusted=False)
>>> for row in (["ada", '"Hello\nbo,Hi.\nada,5"'], ["bo", "Bye."]):
...     swallowed.learn(row)
>>> swallowed.look(2, ['ada,"Hello\n', "bo,Hi.\n", 'ada,5"\n'])
>>> swallowed.check()
Traceback (most recent call last):
bora_pyro.errors.InputError: file 'a.csv', line 2: a quote opens a cell that holds line 3, which looks like a row by itself; ...

A speech of several paragraphs with commas is read: its lines are not rows of known tasks. In the first line and the last one,
only the cells within the quotes count.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

from bora_pyro.errors import InputError

#: What to do about a stray quote.
QUOTING_CURE = "write a quote inside a quoted cell twice, or give --quoting none if quotes in this file are plain text"
# Values of a column that are remembered, their greatest length (names and numbers, not texts), and the number of columns.
_KNOWN, _LENGTH, _COLUMNS = 10_000, 60, 50
# Lines in quoted cells that are remembered until the values of all rows are known.
_DOUBTFUL = 100_000
# Lines of one cell that are looked at.
_LOOKED_AT = 10_000
# Separators that prose does not hold.
_RARE = "\t|"


class SwallowedRows:
    """Watches the rows of one file, and decides at their end.

    A line inside a quoted cell *looks like a row* if it has as many cells as the header, and the separator is a tab or a pipe, or
    one of its cells is a value that other rows have in the same column, or a number where all others have numbers.

    Args:
        label: the file in errors.
        columns: the columns of the table. A table of one column cannot be judged.
        separator: the separator of cells.
        trusted: the user says that the quotes are right; then nothing is refused, and a note counts the doubtful cells.

    Attributes:
        columns: the numbers of the columns whose values are still being collected.
    """

    def __init__(self, label: str, columns: Sequence[str], separator: str, *, trusted: bool) -> None:
        self.label, self.width, self.separator, self.trusted = label, len(columns), separator, trusted
        self.columns = list(range(min(len(columns), _COLUMNS))) if len(columns) > 1 and not trusted else []
        self._known: list[set[str]] = [set() for _ in columns]
        self._lines: list[tuple[int, int, list[str]]] = []
        self._doubtful = 0
        self._first: int | None = None

    def learn(self, cells: Sequence[str]) -> None:
        """Remember the values of a row."""
        for number in self.columns:
            cell = cells[number]
            if 0 < len(cell) <= _LENGTH:
                known = self._known[number]
                known.add(cell)
                if len(known) == _KNOWN:  # a set never shrinks, so that this is seen once
                    self.columns = [other for other in self.columns if other != number]

    def look(self, line: int, lines: Sequence[str]) -> None:
        """Look at a row of several lines.

        Args:
            line: the number of its first line.
            lines: its lines.
        """
        if self.width < 2:
            return
        lines = lines[:_LOOKED_AT]
        rows = list(csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, quotechar=None))
        if len(rows) != len(lines):  # a line without quotes is one row
            return
        first = rows[0]
        opened = max((n for n, cell in enumerate(first) if cell.startswith('"')), default=len(first))
        if len(first) == self.width and any(first[opened + 1 :]):
            self._keep(line, line, [""] * (opened + 1) + first[opened + 1 :])
        inside = [(line + n, cells) for n, cells in enumerate(rows[1:], start=1) if any(map(str.strip, cells))]
        alike = [(number, _before_quote(cells)) for number, cells in inside if len(cells) == self.width]
        alike = [(number, cells) for number, cells in alike if cells]
        if alike and len(alike) == len(inside):
            self._doubtful += 1
            self._first = line if self._first is None else self._first
        for number, cells in alike:
            self._keep(line, number, cells)

    def _keep(self, line: int, number: int, cells: list[str]) -> None:
        if not self.trusted and len(self._lines) < _DOUBTFUL:
            self._lines.append((line, number, cells))

    def check(self) -> None:
        """Raise ``InputError`` if a line inside a quoted cell looks like a row."""
        numbers = [bool(known) and all(_is_number(value) for value in known) for known in self._known]
        for line, inside, cells in self._lines:
            if self.separator in _RARE or any(
                cell in known or (number and _is_number(cell))
                for cell, known, number in zip(cells, self._known, numbers, strict=False)
                if cell
            ):
                raise InputError(
                    f"{self.label}, line {line}: a quote opens a cell that holds line {inside}, which looks like a row by "
                    f"itself; {QUOTING_CURE}, or --quoting minimal if the cell is meant so"
                )

    def notes(self) -> list[str]:
        """A line that counts the cells whose lines all have as many cells as the header."""
        if not self._doubtful:
            return []
        what = "a quoted cell goes" if self._doubtful == 1 else f"{self._doubtful} quoted cells go"
        lines = "each has as many cells as a row: check that no quote is stray"
        return [f"{self.label}: {what} over lines of which {lines} (first in line {self._first})"]


def _before_quote(cells: list[str]) -> list[str]:
    """The cells of a line before one with a quote, which may end the quoted cell."""
    return cells[: next((n for n, cell in enumerate(cells) if '"' in cell), len(cells))]


def line_of_open_quote(text: str, separator: str) -> int:
    r"""The number of lines before the last quote that opens a cell.

    >>> line_of_open_quote('a,"b\nc",d\ne,"f', ",")
    2
    """
    place, opened, next_cell = 0, 0, re.compile(f"[{re.escape(separator)}\n\r]")
    while place < len(text):
        if text[place] == '"':
            opened, place = place, place + 1
            while (place := text.find('"', place)) >= 0 and text[place + 1 : place + 2] == '"':
                place += 2
            if place < 0:
                break
        end = next_cell.search(text, place)
        if end is None:
            break
        place = end.end()
    return text.count("\n", 0, opened) or text.count("\r", 0, opened)


def _is_number(text: str) -> bool:
    return text.strip().lstrip("+-").replace(".", "", 1).isdecimal()
