"""The fields of a configuration: each one documents itself and says which values it takes.

>>> from dataclasses import dataclass
>>> @dataclass
... class Walk:
...     pace: str = option("slow", "how fast to walk", choices=("slow", "fast"))
>>> check_choices(Walk(pace="fats"))
Traceback (most recent call last):
bora_pyro.errors.InputError: pace is 'fats'; allowed: slow, fast; did you mean 'fast'?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from bora_pyro.errors import InputError, nearest

T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    group: str = "options",
    choices: Sequence[str] = (),
    expects: str = "",
    positional: bool = False,
    words: Sequence[str] = (),
    whole: bool = False,
    line_only: bool = False,
) -> T:
    """A dataclass field that documents itself.

    Args:
        default: the field's value where nobody gives one.
        help: what ``--help`` says; the default is added to it, unless it says "default:" itself.
        group: the heading under which ``--help`` lists it.
        choices: the only values allowed, for texts; ``check_choices`` holds a configuration to them.
        expects: what is allowed, in words, where the type alone does not say it.
        words: texts that a value may also be, of a field of type ``float | str`` or ``bool | str``.
        whole: take the texts of a list as they are, commas included; they may also be given one by one, the option repeated.
        line_only: a file's value is not taken: what a stranger's file must not switch on.
        positional: a text that stands on the line without ``--key``; in a YAML file it has its key as the others do.
    """
    metadata = {
        "help": help, "group": group, "choices": tuple(choices), "expects": expects, "positional": positional,
        "words": tuple(words), "whole": whole, "line_only": line_only,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def check_choices(config: Any) -> None:
    """Raise ``InputError`` where a field's value is not one of its ``choices``."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value not in choices and not (value is None and field.default is None):
            raise InputError(f"{field.name} is {value!r}; allowed: {', '.join(choices)}{nearest(str(value), choices)}")
