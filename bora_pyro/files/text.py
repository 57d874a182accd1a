r"""Make texts from unknown sources safe to show in a terminal, on a page or in a picture.

>>> escaped("tasks\x1b[2J of \u202egnp.exe"), replaced("tasks\x1b[2J")
('tasks\\x1b[2J of \\u202egnp.exe', 'tasks\ufffd[2J')
>>> name_line("a\nname " + "x" * 70)
'a name xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…'

A control character can clear a terminal or set its title. A right-to-left override reverses the text that follows it. XML does
not allow most control characters. Spaces of all kinds stay, and so do the joiners in Persian, Hindi and emoji.
"""

from __future__ import annotations

from bora_pyro.errors import escaped, replace_invisible

#: The longest name on one line, in characters.
NAME_LENGTH = 60


def replaced(text: str, *, keep: str = "") -> str:
    """The text with U+FFFD in place of invisible characters, for pages and pictures; characters in ``keep`` stay."""
    return replace_invisible(text, lambda character: "\ufffd", keep=keep)


def name_line(name: str, *, characters: int | None = NAME_LENGTH) -> str:
    """A name on one line of a terminal, cut to at most ``characters`` characters, or not at all if that is None."""
    line = escaped(" ".join(name.split()))
    return line if characters is None or len(line) <= characters else f"{line[: characters - 1]}…"
