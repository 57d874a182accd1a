r"""Names of tasks and groups: how a cell becomes a name, and which names look alike.

One rule holds for all containers. A text is its name as written, without spaces around it. A whole number is written with its
digits, and a number such as 7.0 as 7. A truth value is ``true`` or ``false``, as JSON writes it.

>>> [name_of(cell, "row 1: column 'task'") for cell in ("007", " NA ", 7, 7.0, 2**60 + 1, True, None)]
['007', 'NA', '7', '7', '1152921504606846977', 'true', '']
>>> alike_notes(["Ada", "ada ", "7", "007", "Bo"], "task")
["tasks whose names look alike are different tasks: '007', '7' (1 more such group: 'Ada', 'ada ')"]
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from bora_pyro.data.readers.texts import check_unicode, kind_of
from bora_pyro.errors import InputError, shown

#: From here on, a 64-bit float is not the only one for a whole number: ids may have been rounded.
EXACT = 2**53
# Groups of names that a note shows, and names that it shows of a group.
_GROUPS, _NAMES = 3, 3
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]")
_NUMBER = re.compile(r"[+-]?0*(\d+)(\.0*)?")


def name_of(cell: Any, where: str) -> str:
    """A cell as the name of a task or a group; a missing cell becomes an empty text.

    Args:
        cell: the cell.
        where: its place, for errors.

    Raises:
        InputError: the cell has no name: it is a list, a mapping or bytes; or a float that may have been rounded.
    """
    if isinstance(cell, str):
        name = cell.strip()
        check_unicode(name, where)
        return name
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, list | tuple | dict | bytes | np.ndarray):
        raise InputError(f"{where} is a {kind_of(cell)} ({shown(cell, characters=40)}), not a name; give text or a number")
    if isinstance(cell, float) and cell.is_integer():
        if abs(cell) >= EXACT:
            raise InputError(
                f"{where} is the number {cell:g}, stored with a decimal point; so large a number may have been rounded, and two "
                "names become one: store it as text or as a whole number (in pandas: dtype str or Int64)"
            )
        cell = int(cell)
    name = str(cell).strip()
    check_unicode(name, where)
    return name


def alike_notes(names: Iterable[str], what: str) -> list[str]:
    """A line on names that differ in case, spaces, invisible characters, the form of accents or leading zeros alone.

    Args:
        names: all names.
        what: what has these names, such as ``task``.
    """
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_key(name), set()).add(name)
    found = sorted((sorted(group) for group in groups.values() if len(group) > 1), key=lambda group: group[0])
    if not found:
        return []
    lines, more = [_listed(group) for group in found], ""
    if len(found) > 1:
        more = f" ({len(found) - 1} more such group{'s' if len(found) > 2 else ''}: {'; '.join(lines[1:_GROUPS])})"
    return [f"{what}s whose names look alike are different {what}s: {lines[0]}{more}"]


def _listed(group: list[str]) -> str:
    """Names that look alike; with escapes where they look the same in print, too."""
    same_in_print = len({unicodedata.normalize("NFC", name) for name in group}) < len(group)
    names = [f"{name!a:.60}" if same_in_print else shown(name) for name in group[:_NAMES]]
    return ", ".join(names) + (", ..." if len(group) > _NAMES else "")


def _key(name: str) -> str:
    name = " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFKC", name)).casefold().split())
    number = _NUMBER.fullmatch(name)
    return number.group(1) if number else unicodedata.normalize("NFKC", name)
