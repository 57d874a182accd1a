"""JSON tables: one object a line (.jsonl, .ndjson), or a list of objects (.json). Values keep their types and their structure.

>>> import tempfile
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp(), "a.jsonl")
>>> _ = path.write_text('{"task": 7, "text": "Hi."}\\n\\n{"task": true, "text": null, "n": 1}\\n')
>>> part = open_json_lines(DataFile.of(path), ReadingOptions())
>>> part.columns, list(part.rows(None, []))[1]
(['task', 'text', 'n'], ('line 3', {'task': True, 'text': None, 'n': 1}))

The columns are those of all rows, so a file is read twice: once for the columns, and once for the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from json.decoder import JSONDecoder
from typing import Any

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.options import ReadingOptions
from bora_pyro.data.readers.raw import Part, Row, listed
from bora_pyro.data.readers.text_stream import TextStream
from bora_pyro.data.readers.texts import check_unicode, kind_of, one_line
from bora_pyro.errors import InputError, shown
from bora_pyro.files.json_keys import RepeatedKeyError, without_repeats
from bora_pyro.files.limits import check_cells

_SPACE = " \t\n\r"


def open_json_lines(file: DataFile, reading: ReadingOptions) -> Part:
    """Read the names of all columns, and check every line.

    Raises:
        InputError: a line is no JSON object, or has a key twice.
    """
    columns: dict[str, None] = {}
    blank = waiting = count = 0
    with TextStream(file, reading.encoding) as stream:
        for number, line in enumerate(stream, start=1):
            stream.renew()
            if not line.strip():
                waiting += 1
                continue
            blank, waiting, count = blank + waiting, 0, count + 1
            columns |= dict.fromkeys(_object(line, f"{file.label}, line {number}", strict=True))
            if file.whole:
                check_cells(file.label, count, len(columns))
    _check_names(file, columns)

    def rows(wanted: Sequence[str] | None, notes: list[str]) -> Iterator[Row]:
        names = dict.fromkeys(columns if wanted is None else wanted)
        with TextStream(file, reading.encoding) as stream:
            for number, line in enumerate(stream, start=1):
                stream.renew()
                if line.strip():
                    yield f"line {number}", _filled(_object(line, f"{file.label}, line {number}"), names)
        if blank:
            notes.append(f"{file.label}: {'1 blank line was' if blank == 1 else f'{blank} blank lines were'} left out")

    return Part(file.label, list(columns), rows, stream.notes, ragged=True)


def open_json(file: DataFile, reading: ReadingOptions) -> Part:
    """Read a .json file: a list of objects, an object with one such list (as ``{"data": [...]}``), or one object a line.

    Raises:
        InputError: the file is none of them, or an object has a key twice.
    """
    with TextStream(file, reading.encoding) as stream:
        text = stream.read()
    start, notes = _skip(text, 0), stream.notes
    if text[start : start + 1] == "{":
        first, end = _decoded(text, start, file.label)
        if _skip(text, end) < len(text):
            return open_json_lines(file, reading)
        lists = [name for name, value in first.items() if isinstance(value, list) and value and _all_objects(value)]
        if len(lists) != 1:
            what = "a JSON object" if not first else f"a JSON object with {listed(list(first), most=5)}"
            raise InputError(f"{file.label} is {what}; give a list of objects, one a document, or one object a line")
        notes.append(f"{file.label}: the rows are the list {shown(lists[0])}")
        items = [(f"item {number}", item) for number, item in enumerate(first[lists[0]], start=1)]
    elif text[start : start + 1] == "[":
        items = list(_items(text, start, file.label))
    else:
        if start == len(text):
            raise InputError(f"{file.label} is empty; give a list of objects, one a document")
        return open_json_lines(file, reading)
    columns: dict[str, None] = {}
    for _, item in items:
        columns |= dict.fromkeys(item)
    check_cells(file.label, len(items), len(columns))
    _check_names(file, columns)

    def rows(wanted: Sequence[str] | None, _: list[str]) -> Iterator[Row]:
        names = dict.fromkeys(columns if wanted is None else wanted)
        for place, item in items:
            yield place, _filled(item, names)

    return Part(file.label, list(columns), rows, notes, ragged=True)


_STRICT = JSONDecoder(object_pairs_hook=without_repeats)


def _object(line: str, where: str, *, strict: bool = False) -> dict[str, Any]:
    try:
        row = _STRICT.decode(line) if strict else json.loads(line)
    except RepeatedKeyError as error:
        raise InputError(f"{where}: the key {shown(error.key)} stands twice in one object; write it once") from None
    except (ValueError, RecursionError) as error:  # RecursionError: lists a thousand deep
        what = getattr(error, "msg", None) or one_line(error)
        hint = "; for a list of objects name the file .json" if line.lstrip()[:1] == "[" else ""
        raise InputError(f"{where}: not JSON ({what}); write one JSON object a line{hint}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {kind_of(row)}; write one JSON object a line, with named columns")
    return row


def _decoded(text: str, start: int, label: str) -> tuple[Any, int]:
    where = f"{label}, line {text.count(chr(10), 0, start) + 1}"
    try:
        return _STRICT.raw_decode(text, start)
    except RepeatedKeyError as error:
        raise InputError(f"{where}: the key {shown(error.key)} stands twice in one object; write it once") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{label}, line {error.lineno}: not JSON ({error.msg}); write a list of objects") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({one_line(error)}); write a list of objects") from None


def _items(text: str, start: int, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, with their places."""
    place, number, line, counted = _skip(text, start + 1), 0, 1, 0
    if text[place : place + 1] == "]":
        place = _skip(text, place + 1)
    else:
        while True:
            item, end = _decoded(text, place, label) if place < len(text) else (None, place)
            number, line, counted = number + 1, line + text.count("\n", counted, place), place
            if not isinstance(item, dict):
                kind = "missing" if place >= len(text) else f"a JSON {kind_of(item)}"
                raise InputError(f"{label}, line {line}: item {number} is {kind}; write a list of objects, with named columns")
            yield f"item {number} (line {line})", item
            place = _skip(text, end)
            mark = text[place : place + 1]
            place = _skip(text, place + 1)
            if mark == "]":
                break
            if mark != ",":
                raise InputError(f"{label}: the list is not closed after item {number} (line {line}); write the whole file again")
    if place < len(text):
        line += text.count("\n", counted, place)
        raise InputError(f"{label}, line {line}: text follows the list; write one list of objects, or one object a line")


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place


def _all_objects(value: list[Any]) -> bool:
    return all(isinstance(item, dict) for item in value)


def _filled(row: dict[str, Any], names: dict[str, None]) -> dict[str, Any]:
    """The row with None for the columns that it lacks."""
    return row if names.keys() <= row.keys() else {**names, **row}


def _check_names(file: DataFile, columns: dict[str, None]) -> None:
    for column in columns:
        check_unicode(column, f"{file.label}, a column's name")
