"""Cells of a table as values that JSON can hold. Structure is kept, and nothing becomes text on the way.

>>> import numpy as np
>>> structure(np.array([{"role": "user", "content": "Hi", "name": None}], dtype=object), "row 1")
[{'role': 'user', 'content': 'Hi'}]
>>> import datetime
>>> structure({"when": datetime.date(2020, 1, 1)}, "row 1")
Traceback (most recent call last):
bora_pyro.errors.InputError: row 1: 'when' is a date (datetime.date(2020, 1, 1)), which JSON cannot hold; give text
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bora_pyro.data.files import check_unicode, one_line
from bora_pyro.errors import InputError, shown
from bora_pyro.files.json_keys import RepeatedKeyError, without_repeats

#: How deep values may be nested. The schema of a tool needs some ten levels.
MOST_LEVELS = 60


def is_present(cell: Any) -> bool:
    """Whether a cell holds something: not None, NaN or white space."""
    missing = cell is None or cell is pd.NA or (isinstance(cell, float) and np.isnan(cell))
    return not missing and not (isinstance(cell, str) and not cell.strip())


def text_of(cell: Any, where: str) -> str:
    """The text of a cell; a missing cell is an empty text.

    Raises:
        InputError: the cell is something else, or has half a surrogate pair.
    """
    if cell is None or cell is pd.NA:
        return ""
    if not isinstance(cell, str):
        raise InputError(f"{where} is a {type(cell).__name__} ({cell!r:.40}), not text")
    check_unicode(cell, where)
    return cell


def structure(value: Any, where: str) -> Any:
    """A value as JSON can hold it: lists, mappings with texts as keys, texts, numbers, bools.

    A key whose value is None is left out, because a table of columns stores None for a key that a mapping does not have.
    In a list None stays.

    Args:
        value: the value, which may hold numpy arrays and numpy numbers.
        where: the place, for errors.

    Raises:
        InputError: JSON cannot hold the value, such as a date, bytes or NaN.
    """
    return _structure(value, where, "", 0)


def parse_json(text: str, where: str, *, give: str = "JSON text") -> Any:
    """The value of a JSON text.

    >>> parse_json('{"a": 1, "a": 2}', "row 1")
    Traceback (most recent call last):
    bora_pyro.errors.InputError: row 1 has the key 'a' twice in one JSON object; keep one of them

    Args:
        text: the text.
        where: its place, for errors.
        give: what the text must be, for errors.

    Raises:
        InputError: the text is not JSON, or an object in it has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except RepeatedKeyError as error:
        raise InputError(f"{where} has the key {error.key[:60]!r} twice in one JSON object; keep one of them") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); give {give}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists a thousand deep
        raise InputError(f"{where} cannot be read as JSON ({one_line(error)}); give {give}") from None


def json_cell(cell: Any, where: str, *, give: str) -> Any:
    """The `structure` of a cell that holds one, or its JSON text; ``give`` says what the cell must be, for errors."""
    if isinstance(cell, str):
        cell = parse_json(cell, where, give=f"{give} as JSON text")
    return structure(cell, where)


def holds_null(value: Any) -> bool:
    """Whether some key within a value is None."""
    if isinstance(value, Mapping):
        return any(item is None or holds_null(item) for item in value.values())
    return isinstance(value, list | tuple | np.ndarray) and any(holds_null(item) for item in value)


def json_text(value: Any) -> str:
    """The JSON text of a `structure`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _structure(value: Any, where: str, key: str, level: int) -> Any:
    if level > MOST_LEVELS:
        raise InputError(f"{where} is nested too deeply; {MOST_LEVELS} levels are allowed")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or isinstance(value, bool | int):
        return None if value is pd.NA else value
    if isinstance(value, str):
        check_unicode(value, f"{where}{_named(key)}")
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        return [_structure(item, where, key, level + 1) for item in value]
    if isinstance(value, Mapping):
        found = {}
        for name, item in value.items():
            if not isinstance(name, str):
                raise InputError(f"{where}{_named(key)} has the key {shown(name)}; keys are texts")
            check_unicode(name, f"{where}{_named(key)}")
            if item is not None and item is not pd.NA:
                found[name] = _structure(item, where, name, level + 1)
        return found
    kind = type(value).__name__
    raise InputError(f"{where}{_named(key)} is a {kind} ({value!r:.40}), which JSON cannot hold; give text")


def _named(key: str) -> str:
    return f": {key[:60]!r}" if key else ""
