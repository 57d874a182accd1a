"""Tables of cells between separators: .csv and .tsv. Every cell stays the text that is written.

>>> import tempfile
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp(), "a.csv")
>>> _ = path.write_text('task,text\\n007,"He said:\\n""Hi"" "\\nNA,Bye.\\n')
>>> part = open_delimited(DataFile.of(path), ReadingOptions())
>>> list(part.rows(None, []))
[('line 2', {'task': '007', 'text': 'He said:\\n"Hi" '}), ('line 4', {'task': 'NA', 'text': 'Bye.'})]

Python's ``csv`` module parses the lines, in its strict mode. This module adds what it does not do: the header, the number of
cells of a row, the line of an error, and the search for quotes that swallow rows (``swallowed.py``).
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.options import SEPARATORS, ReadingOptions
from bora_pyro.data.readers.raw import Part, Row
from bora_pyro.data.readers.swallowed import QUOTING_CURE, SwallowedRows, line_of_open_quote
from bora_pyro.data.readers.text_stream import TextStream
from bora_pyro.errors import InputError, shown
from bora_pyro.files.limits import check_cells

#: Separators by ending; others need ``separator``.
BY_ENDING = {".csv": ",", ".tsv": "\t"}
# The line that some spreadsheet programs write above the header.
_NAMES_SEPARATOR = re.compile(r'"?sep=.?"?\s*$', re.IGNORECASE)
# Rows that are read to see whether another separator fits.
_TRIED = 20
# The largest cell in characters: the module's own limit is 128 KiB, less than a long document.
_LARGEST_CELL = 2**31 - 1


def open_delimited(file: DataFile, reading: ReadingOptions) -> Part:
    """Read the header, and find the separator.

    Raises:
        InputError: the file is empty or no text, or its header has a column twice or another separator than its rows.
    """
    with TextStream(file, reading.encoding) as stream:
        usual = BY_ENDING.get(file.kind)
        if reading.delimiter is None and usual is None:
            raise InputError(f"{file.label} is a table without a known separator; give one, as in --separator tab")
        separator, notes = reading.delimiter or usual or ",", stream.notes
        if reading.delimiter is None and (found := _other_separator(file, reading, separator)) is not None:
            separator = found
            notes.append(f"{file.label} is separated by {_named(separator)}, as its header shows")
        records = _Records(stream, separator, reading)
        first = next(iter(records), None)
        if first is None:
            raise InputError(f"{file.label} is empty; give a header line and one document a row")
        if named := _NAMES_SEPARATOR.match(stream.pending[0]):
            raise InputError(
                f"{file.label}: its first line, {shown(named.group().strip())}, only names the separator; remove that line"
            )
    columns = [name or f"column{number}" for number, name in enumerate(first[1], start=1)]
    if not reading.header:
        columns = [f"column{number}" for number in range(1, len(columns) + 1)]
        notes.append(f"{file.label} is read without a header; its columns are {columns[0]} to {columns[-1]}")
    elif twice := [name for name, times in Counter(columns).items() if times > 1]:
        raise InputError(f"{file.label} has the column {shown(twice[0])} {columns.count(twice[0])} times; give each one name")

    def rows(_: Sequence[str] | None, notes: list[str]) -> Iterator[Row]:
        with TextStream(file, reading.encoding) as stream:
            yield from _rows(_Records(stream, separator, reading), columns, reading, notes)

    return Part(file.label, columns, rows, notes)


def _rows(records: _Records, columns: list[str], reading: ReadingOptions, notes: list[str]) -> Iterator[Row]:
    file, width, count = records.stream.file, len(columns), 0
    found = iter(records)
    if reading.header:
        next(found)
    swallowed = SwallowedRows(file.label, columns, records.separator, trusted=reading.quoting is not None)
    for line, cells in found:
        if len(cells) != width:
            raise _wrong_width(records, line, cells, columns)
        if swallowed.columns:
            swallowed.learn(cells)
        if len(records.stream.pending) > 1:
            swallowed.look(line, records.stream.pending)
        count += 1
        if file.whole and count % 1000 == 0:
            check_cells(file.label, count, width)
        yield f"line {line}", dict(zip(columns, cells, strict=True))
    if file.whole:
        check_cells(file.label, count, width)
    swallowed.check()
    notes += swallowed.notes()
    if records.blank:
        lines = "1 blank line was" if records.blank == 1 else f"{records.blank} blank lines were"
        notes.append(f"{file.label}: {lines} left out")


class _Records:
    """The records of an open file, each with the line at which it begins.

    Attributes:
        blank: the number of blank lines between records so far.
    """

    def __init__(self, stream: TextStream, separator: str, reading: ReadingOptions) -> None:
        self.stream, self.separator, self.blank = stream, separator, 0
        self.quoted = reading.quoting != "none"

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        if csv.field_size_limit() < _LARGEST_CELL:
            csv.field_size_limit(_LARGEST_CELL)
        options: dict[str, Any] = {"quotechar": '"'} if self.quoted else {"quotechar": None, "quoting": csv.QUOTE_NONE}
        reader = csv.reader(self.stream, delimiter=self.separator, strict=True, **options)
        stream, line, blank = self.stream, 0, 0
        try:
            for cells in reader:
                start, line = line + 1, reader.line_num
                if not cells or (len(cells) == 1 and cells[0].isspace() and '"' not in stream.pending[0]):
                    blank += 1
                else:
                    self.blank, blank = self.blank + blank, 0
                    yield start, cells
                stream.renew()
        except csv.Error as error:
            raise self._malformed(error, line + 1) from None

    def _malformed(self, error: csv.Error, start: int) -> InputError:
        label, text = self.stream.file.label, "".join(self.stream.pending)
        if "expected after" in str(error):
            where = start + len(self.stream.pending) - 1
            opened = start + line_of_open_quote(text, self.separator)
            what = f"line {where}: text follows a closing quote, of a cell whose quote opens in line {opened}"
            return InputError(f"{label}, {what}; {QUOTING_CURE}")
        if "unexpected end" in str(error):
            opened = start + line_of_open_quote(text, self.separator)
            return InputError(f"{label}, line {opened}: a quote opens a cell and is never closed; {QUOTING_CURE}")
        return InputError(f"{label}, line {start}: malformed ({error}); put texts with line ends in double quotes")


def _wrong_width(records: _Records, line: int, cells: list[str], columns: list[str]) -> InputError:
    last = line + len(records.stream.pending) - 1
    where = f"line {line}" if last == line else f"lines {line} to {last}"
    what = f"{len(cells)} cell{'s' if len(cells) != 1 else ''} where the header has {len(columns)}"
    if last > line:
        cure = f"a quoted cell goes over several lines; {QUOTING_CURE}"
    elif len(cells) < len(columns):
        cure = "write all cells of the row, also empty ones"
    else:
        cure = "put texts that hold a separator in double quotes"
    return InputError(f"{records.stream.file.label}, {where}: {what} (separated by {_named(records.separator)}); {cure}")


def _other_separator(file: DataFile, reading: ReadingOptions, usual: str) -> str | None:
    """Another separator than the usual one, if the header is a single cell that holds it, or no header with the usual one.

    Raises:
        InputError: the rows that follow do not agree with the header.
    """
    rows = _first_records(file, reading, usual)
    if rows and len(rows[0]) != 1:
        return None
    with TextStream(file, reading.encoding) as stream:
        header = next(iter(stream), "").rstrip("\r\n")
    others = sorted((one for one in SEPARATORS.values() if one != usual and one in header), key=header.count, reverse=True)
    for other in dict.fromkeys(others):
        found = _first_records(file, reading, other)
        if found and len(found[0]) > 1 and all(len(row) == len(found[0]) for row in found):
            return other
    if others and any(len(row) > 1 for row in _first_records(file, reading, others[0])[1:]):
        raise InputError(
            f"{file.label}: its header is one cell, {shown(header)}, and its rows have other numbers of cells; give the "
            f"separator, as in --separator {_word(others[0])}"
        )
    return None


def _first_records(file: DataFile, reading: ReadingOptions, separator: str) -> list[list[str]]:
    found: list[list[str]] = []
    with suppress(InputError), TextStream(file, reading.encoding) as stream:
        for _, cells in islice(_Records(stream, separator, reading), _TRIED):
            found.append(cells)
    return found


def _word(separator: str) -> str:
    return next((word for word, one in SEPARATORS.items() if one == separator), separator)


def _named(separator: str) -> str:
    return {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "pipes"}.get(separator, repr(separator))
