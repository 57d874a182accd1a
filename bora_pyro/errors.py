"""The error that bad input raises, and helpers that write its one-line messages."""

from __future__ import annotations

import difflib
import numbers
import unicodedata
from collections.abc import Callable, Iterable

# Zero-width characters that Persian, Hindi and emoji are written with; they count as visible.
_JOINERS = "\u200c\u200d"


class InputError(ValueError):
    r"""Input that cannot be used. The command-line tools print its message and exit with code 2.

    The message is one line. It says which value was given, what is allowed and what to do. Line ends, control characters and
    lone surrogates are escaped, so that a value from outside can neither break the line nor control the terminal.

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
    """A clause that suggests the valid name most like ``name``, or an empty string if none is similar. A long name is cut.

    >>> nearest("txt", ["task", "text"])
    "; did you mean 'text'?"
    """
    valid = list(valid)
    lower = {option.lower(): option for option in valid}
    match = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    return f"; did you mean {shown(lower[match[0]])}?" if match else ""


def shown(value: object, *, characters: int = 60) -> str:
    """The ``repr`` of a value, cut after ``characters`` characters.

    >>> shown("x" * 100, characters=8)
    "'xxxxxxx..."
    """
    text = repr(value)
    return text if len(text) <= characters + 3 else f"{text[:characters]}..."


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Check that an option has one of the allowed values.

    >>> check_one_of("pace", "fats", ("slow", "fast"))
    Traceback (most recent call last):
    bora_pyro.errors.InputError: pace is 'fats'; allowed: slow, fast; did you mean 'fast'?

    Args:
        name: the option's name in the message.
        value: the value that was given.
        allowed: all allowed values.

    Raises:
        InputError: the value is not one of them.
    """
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} is {shown(value)}; allowed: {', '.join(allowed)}{nearest(str(value), allowed)}")


def check_at_least(name: str, value: object, least: int) -> None:
    """Check that an option is a whole number and not too small.

    >>> check_at_least("rank", 0, 1)
    Traceback (most recent call last):
    bora_pyro.errors.InputError: rank is 0; give a whole number from 1 up

    Args:
        name: the option's name in the message.
        value: the value that was given.
        least: the smallest allowed value.

    Raises:
        InputError: the value is below ``least``, or is not a whole number (True and False are not).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f"{name} is {shown(value)}; give a whole number from {least} up")


def escaped(text: str, *, keep: str = "") -> str:
    """The text with escapes in place of invisible characters, for a terminal; characters in ``keep`` stay."""
    return replace_invisible(text, lambda character: repr(character)[1:-1], keep=keep)


def replace_invisible(text: str, replacement: Callable[[str], str], *, keep: str = "") -> str:
    """The text with ``replacement(character)`` in place of each invisible character; characters in ``keep`` stay."""
    if text.isprintable():
        return text
    return "".join(character if _is_visible(character) or character in keep else replacement(character) for character in text)


def _is_visible(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
