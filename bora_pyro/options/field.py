"""The fields of a configuration: each one documents itself and says which values it takes.

>>> from dataclasses import dataclass
>>> @dataclass
... class Walk:
...     pace: str = option("slow", "how fast to walk", choices=("slow", "fast"))
...     steps: int = option(10, "how many steps to take", least=1)
>>> check_fields(Walk(pace="fats"))
Traceback (most recent call last):
bora_pyro.errors.InputError: pace is 'fats'; allowed: slow, fast; did you mean 'fast'?
>>> check_fields(Walk(steps=0))
Traceback (most recent call last):
bora_pyro.errors.InputError: steps is 0; give a whole number from 1 up
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from bora_pyro.errors import InputError, nearest, shown

T = TypeVar("T")
C = TypeVar("C")
#: The largest whole number that an option takes unless it says otherwise.
MOST = 2**31 - 1


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
    least: int | None = None,
    most: int = MOST,
    positive: bool = False,
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
        least: the smallest whole number that is allowed; ``check_fields`` holds a configuration to it.
        most: the largest whole number, where ``least`` is given.
        positive: only finite numbers above 0 are allowed.
        positional: a text that stands on the line without ``--key``; in a YAML file it has its key as the others do.
    """
    metadata = {
        "help": help, "group": group, "choices": tuple(choices), "expects": expects, "positional": positional,
        "words": tuple(words), "whole": whole, "line_only": line_only, "least": least, "most": most, "positive": positive,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def changed(cls: type, name: str, default: Any, help: str | None = None, **about: Any) -> Any:
    """The field ``name`` of another configuration with another default, and with another help where one is given.

        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Walk:
        ...     steps: int = option(10, "how many steps to take", least=1)
        >>> @dataclass
        ... class LongWalk(Walk):
        ...     steps: int = changed(Walk, "steps", 1000)
        >>> LongWalk(), next(field.metadata["help"] for field in dataclasses.fields(LongWalk))
        (LongWalk(steps=1000), 'how many steps to take')

    Args:
        cls: the configuration that has the field.
        name: the field.
        default: its value where nobody gives one.
        help: what ``--help`` says of it; None: as before.
        about: other arguments of :func:`option` that differ.
    """
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    about = dict(field.metadata) | ({} if help is None else {"help": help}) | about
    return option(default, about.pop("help"), **about)


def with_changes(config: C, changes: dict[str, Any]) -> C:
    """The configuration with other values of some fields.

    Raises:
        InputError: it has no such field.
    """
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise InputError(f"there is no option {name!r}{nearest(name, names) or '; there are ' + ', '.join(names)}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def check_fields(config: Any) -> None:
    """Raise ``InputError`` where a field's value is not one of its ``choices`` or outside its bounds."""
    check_choices(config)
    for field in dataclasses.fields(config):
        name, value, about = field.name, getattr(config, field.name), field.metadata
        if value is None and field.default is None:
            continue
        if (least := about.get("least")) is not None:
            if value < least:
                raise InputError(f"{name} is {value}; give a whole number from {least} up")
            if value > about["most"]:
                raise InputError(f"{name} is {shown(value)}; give a whole number of at most {about['most']}")
        if about.get("positive") and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; give a finite number above 0")


def check_choices(config: Any) -> None:
    """Raise ``InputError`` where a field's value is not one of its ``choices``."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value not in choices and not (value is None and field.default is None):
            raise InputError(f"{field.name} is {value!r}; allowed: {', '.join(choices)}{nearest(str(value), choices)}")
