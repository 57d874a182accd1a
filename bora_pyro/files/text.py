r"""Texts that anybody may have written, made fit to be shown: in a terminal, on a page, in a picture.

>>> escaped("tasks\x1b[2J of \u202egnp.exe"), replaced("tasks\x1b[2J")
('tasks\\x1b[2J of \\u202egnp.exe', 'tasks\ufffd[2J')
>>> name_line("a\nname " + "x" * 70)
'a name xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…'

A control character can clear a terminal or set its title, a right-to-left override turns round what stands behind it, and XML has
no place for most of them. Spaces of all kinds, and the joiners that Persian, Hindi and emoji are written with, are left alone.
"""

from __future__ import annotations

from bora_pyro.errors import escaped, mapped

#: The longest name on one line, in letters.
NAME_LENGTH = 60


def replaced(text: str, *, keep: str = "") -> str:
    """The text with U+FFFD for what cannot be seen, for pages and pictures; ``keep`` are letters to leave alone."""
    return mapped(text, lambda letter: "\ufffd", keep=keep)


def name_line(name: str, *, characters: int | None = NAME_LENGTH) -> str:
    """A name on one line of a terminal, cut to so many letters; None: whole."""
    line = escaped(" ".join(name.split()))
    return line if characters is None or len(line) <= characters else f"{line[: characters - 1]}…"
