"""The one error that bad input raises: a single line that says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterable

_JOINERS = "\u200c\u200d"


class InputError(ValueError):
    r"""Input that cannot be used. Its message is one line; the command-line tools print it and exit with code 2.

    What was given may stand in the message: line ends, control characters and lone surrogates in it are shown as Python writes
    them, so that no input can break the line or speak to the terminal.

    >>> import bora_pyro as bp
    >>> try:
    ...     bp.prior_from_tau(-1)
    ... except bp.InputError as error:
    ...     print(error)
    tau -1 is not allowed; it is a number from 0 (independent tasks) to inf (one shared adapter), nearest: 0
    >>> print(InputError("no file 'a\nb\x1b[2J'"))
    no file 'a\nb\x1b[2J'
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


def nearest(name: str, valid: Iterable[str]) -> str:
    """The clause that suggests the nearest valid name, or an empty string where none is near.

    >>> nearest("txt", ["task", "text"])
    "; did you mean 'text'?"
    """
    valid = list(valid)
    lower = {option.lower(): option for option in valid}
    match = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    return f"; did you mean {lower[match[0]]!r}?" if match else ""


def shown(value: object, *, characters: int = 60) -> str:
    """A value as Python writes it, cut to a length that a line can hold.

    >>> shown("x" * 100, characters=8)
    "'xxxxxxx..."
    """
    text = repr(value)
    return text if len(text) <= characters + 3 else f"{text[:characters]}..."


def escaped(text: str, *, keep: str = "") -> str:
    """The text with what cannot be seen as Python writes it, for a terminal; ``keep`` are letters to leave alone."""
    return mapped(text, lambda letter: repr(letter)[1:-1], keep=keep)


def mapped(text: str, change: Callable[[str], str], *, keep: str = "") -> str:
    """The text with each letter that cannot be seen changed; ``keep`` are letters to leave alone."""
    if text.isprintable():
        return text
    return "".join(letter if _can_be_seen(letter) or letter in keep else change(letter) for letter in text)


def _can_be_seen(letter: str) -> bool:
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"
