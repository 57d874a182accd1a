"""Checks of texts from files, and errors of other libraries on one line."""

from __future__ import annotations

from typing import Any

from bora_pyro.errors import InputError


def check_unicode(text: str, where: str) -> None:
    r"""Check that a text has no lone surrogate, such as JSON's "\ud800", which UTF-8 cannot encode.

    >>> check_unicode("\ud83d", "row 1")
    Traceback (most recent call last):
    bora_pyro.errors.InputError: row 1 has half a surrogate pair, '\ud83d'; write the whole character
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has half a surrogate pair, {text[error.start]!r}; write the whole character") from None


def one_line(error: BaseException, *, characters: int = 200) -> str:
    """The type of an error and the beginning of its message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:characters]}" if message else type(error).__name__


def kind_of(value: Any) -> str:
    """The name of a value's type in JSON's words.

    >>> kind_of([1]), kind_of({}), kind_of(None), kind_of("x"), kind_of(True), kind_of(1.5)
    ('list', 'object', 'null', 'text', 'boolean', 'number')
    """
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "boolean", list: "list", dict: "object", str: "text", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
