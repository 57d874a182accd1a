r"""Texts that anybody may have written, made fit to be shown: in a terminal, on a page, in a picture.

>>> escaped("tasks\x1b[2J of \u202egnp.exe"), replaced("tasks\x1b[2J")
('tasks\\x1b[2J of \\u202egnp.exe', 'tasks\ufffd[2J')
>>> name_line("a\nname " + "x" * 70)
'a name xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…'

A control character can clear a terminal or set its title, a right-to-left override turns round what stands behind it, and XML has
no place for most of them. Spaces of all kinds, and the joiners that Persian, Hindi and emoji are written with, are left alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

#: The longest name on one line, in letters.
NAME_LENGTH = 60
_JOINERS = "\u200c\u200d"


def escaped(text: str, *, keep: str = "") -> str:
    """The text with what cannot be seen as Python writes it, for a terminal; ``keep`` are letters to leave alone."""
    return _mapped(text, lambda letter: repr(letter)[1:-1], keep)


def replaced(text: str, *, keep: str = "") -> str:
    """The text with U+FFFD for what cannot be seen, for pages and pictures; ``keep`` are letters to leave alone."""
    return _mapped(text, lambda letter: "\ufffd", keep)


def name_line(name: str, *, characters: int | None = NAME_LENGTH) -> str:
    """A name on one line of a terminal, cut to so many letters; None: whole."""
    line = escaped(" ".join(name.split()))
    return line if characters is None or len(line) <= characters else f"{line[: characters - 1]}…"


def _mapped(text: str, change: Callable[[str], str], keep: str) -> str:
    if text.isprintable():
        return text
    return "".join(letter if _can_be_seen(letter) or letter in keep else change(letter) for letter in text)


def _can_be_seen(letter: str) -> bool:
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"
