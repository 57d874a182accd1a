"""The names of the sides of a split, and what people call them.

>>> split_name(" Dev ", "row 3: column 'part'")
'validation'
>>> find_split("speeches") is None
True
"""

from __future__ import annotations

from typing import Any

from bora_pyro.errors import InputError, nearest, shown

#: The sides of a split.
SPLITS = ("train", "validation", "test")

_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "validate", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_SIDE_OF = {name: side for side, names in _NAMES.items() for name in names}


def find_split(name: str) -> str | None:
    """The side that a name stands for, in any case and with spaces around it; None if it is no such name.

    >>> find_split("Training"), find_split("eval")
    ('train', 'validation')
    """
    return _SIDE_OF.get(name.strip().lower())


def split_name(cell: Any, where: str) -> str:
    """The side that a cell, a file's name or a split's name stands for: ``train``, ``validation`` or ``test``.

    Args:
        cell: the name as written.
        where: the place of the cell, for errors.

    Raises:
        InputError: it is none of the known names.
    """
    side = find_split(cell) if isinstance(cell, str) else None
    if side is None:
        others = ", ".join(name for name in _SIDE_OF if name not in SPLITS)
        hint = nearest(cell, _SIDE_OF) if isinstance(cell, str) else ""
        raise InputError(f"{where} is {shown(cell)}; allowed: {', '.join(SPLITS)} (also as {others}){hint}")
    return side
