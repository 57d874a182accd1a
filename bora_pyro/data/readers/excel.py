"""Spreadsheets (.xlsx), read by openpyxl. Every cell becomes a text, as in .csv.

Whole numbers have no decimal point, and a number in a format of zeros alone has its leading zeros: 7 as ``000`` is ``007``. Dates
are written ``yyyy-mm-dd``. Formulas give the value that was stored with them.
"""

from __future__ import annotations

import datetime
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.options import ReadingOptions
from bora_pyro.data.readers.raw import Part, Row, listed
from bora_pyro.data.readers.texts import one_line
from bora_pyro.errors import InputError, shown
from bora_pyro.files.limits import Budget, check_cells

_FORMULA = re.compile(rb"<f[ >/]")


def open_excel(file: DataFile, reading: ReadingOptions) -> Part:
    """Read the first sheet.

    Raises:
        InputError: openpyxl is missing; the file is no spreadsheet or too large; a cell holds an error, or a formula without a
            value; or a column stands twice.
    """
    sheets, table, dates = _read(file)
    if not table:
        raise InputError(f"{file.label} is empty; give a header row and one document a row")
    notes: list[str] = []
    if len(sheets) > 1:
        notes.append(f"{file.label}: the first sheet, {shown(sheets[0])}, is read; left out: {listed(sheets[1:], most=5)}")
    names = table[0][1]
    if reading.header:
        table = table[1:]
        columns = [name or f"column{number}" for number, name in enumerate(names, start=1)]
        if twice := [name for name, times in Counter(columns).items() if times > 1]:
            raise InputError(f"{file.label} has the column {shown(twice[0])} {columns.count(twice[0])} times; give each one name")
    else:
        width = max(len(cells) for _, cells in table)
        columns = [f"column{number}" for number in range(1, width + 1)]
        notes.append(f"{file.label} is read without a header; its columns are {columns[0]} to {columns[-1]}")
    check_cells(file.label, len(table), len(columns))
    for number, cells in table:
        if len(cells) > len(columns):
            raise InputError(f"{file.label}, row {number}: a cell stands right of the last column with a name; name its column")
    if dates:
        notes.append(f"{file.label}: {'1 date is' if dates == 1 else f'{dates} dates are'} read as yyyy-mm-dd")

    def rows(_: Sequence[str] | None, notes: list[str]) -> Iterator[Row]:
        for number, cells in table:
            yield f"row {number}", dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True))

    return Part(file.label, columns, rows, notes)


def _read(file: DataFile) -> tuple[list[str], list[tuple[int, list[str]]], int]:
    """The names of the sheets; the rows of the first one that have a cell, with their numbers; the number of dates."""
    try:
        import openpyxl
    except ImportError:
        raise InputError(f"{file.label} needs openpyxl; install it with: pip install 'bora_pyro[excel]'") from None
    with file.problems():
        content = file.content()
    has_formulas = _checked(file, content)
    table: list[tuple[int, list[str]]] = []
    dates = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on parts of a spreadsheet that are not read, such as styles
            book = openpyxl.load_workbook(content, read_only=True, data_only=True)
            sheets = [sheet.title for sheet in book.worksheets]
            formulas = _formulas(content) if has_formulas else set()
            if not sheets:
                raise InputError(f"{file.label} has no sheet of cells; give one with one document a row")
            book.worksheets[0].reset_dimensions()  # the size that the file states may be wrong
            for number, row in enumerate(book.worksheets[0].iter_rows(), start=1):
                cells = [_text(cell, f"{file.label}, row {number}", formulas) for cell in row]
                dates += sum(isinstance(cell.value, datetime.date) for cell in row)
                while cells and not cells[-1]:
                    cells.pop()
                if cells:
                    table.append((number, cells))
            book.close()
    except InputError:
        raise
    except Exception as error:  # openpyxl raises many types of errors for damaged files
        raise InputError(
            f"{file.label} is no spreadsheet that can be read ({one_line(error)}); save it again as .xlsx"
        ) from error
    return sheets, table, dates


def _checked(file: DataFile, content: BytesIO) -> bool:
    """Check the expanded size of the spreadsheet's parts. Returns whether it has formulas."""
    budget, formulas = Budget(file.label), False
    try:
        with zipfile.ZipFile(content) as parts:
            for part in parts.infolist():
                budget.spend(part.file_size)  # no more is read, whatever the compressed bytes hold
            for part in parts.infolist():
                if part.filename.startswith("xl/worksheets/") and part.filename.endswith(".xml"):
                    formulas = formulas or _FORMULA.search(parts.read(part)) is not None
    except InputError:
        raise
    except Exception as error:  # damaged zip files raise many types of errors
        raise InputError(
            f"{file.label} is no spreadsheet that can be read ({one_line(error)}); save it again as .xlsx"
        ) from error
    return formulas


def _formulas(content: BytesIO) -> set[tuple[int, int]]:
    """Places (row, column) of the formulas in the first sheet."""
    import openpyxl

    book = openpyxl.load_workbook(content, read_only=True)
    book.worksheets[0].reset_dimensions()
    found = {(cell.row, cell.column) for row in book.worksheets[0].iter_rows() for cell in row if cell.data_type == "f"}
    book.close()
    return found


def _text(cell: Any, where: str, formulas: set[tuple[int, int]]) -> str:
    value = cell.value
    if value is None:
        if formulas and (getattr(cell, "row", None), getattr(cell, "column", None)) in formulas:
            raise InputError(f"{where}: cell {cell.coordinate} is a formula without a stored value; open and save the file once")
        return ""
    if cell.data_type == "e":
        raise InputError(f"{where}: cell {cell.coordinate} holds the error {shown(value)}; correct it")
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"  # as a spreadsheet shows it
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat(" ") if isinstance(value, datetime.datetime) else value.isoformat()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int) and re.fullmatch("0+", cell.number_format or ""):
        return f"{value:0{len(cell.number_format)}d}"
    return str(value)
