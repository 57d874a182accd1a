"""Fields of a configuration dataclass. Each field holds its help text and its allowed values.

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
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bora_pyro.errors import InputError, check_at_least, check_one_of, nearest, shown

T = TypeVar("T")
C = TypeVar("C")
#: The default of ``most``: the largest allowed whole number of an option.
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
    filled: bool = False,
) -> T:
    """A dataclass field with the help text and the rules that the command line uses.

    Args:
        default: the value if the user gives none.
        help: the text in ``--help``. The default is added to it, unless the text contains "default:".
        group: the heading under which ``--help`` lists the option.
        choices: the allowed values of a text; ``check_choices`` checks them.
        expects: the allowed values in words, for error messages. It is needed if the type alone does not say them.
        positional: the option stands on the command line without ``--key``. In a YAML file it has a key like every option.
        words: texts that are allowed besides the type, for a field of type ``float | str`` or ``bool | str``.
        whole: do not split the texts of a list at commas. The option may then be repeated, with one text or more each time.
        line_only: ignore the value in a file, for switches that a file from somebody else must not turn on.
        least: the smallest allowed whole number, of a list for each of its texts; ``check_fields`` checks it.
        most: the largest allowed whole number, if ``least`` is given.
        positive: only finite numbers above 0 are allowed, of a list for each of its texts; ``check_fields`` checks it.
        filled: the option is a name, or a list of names, none of which may be empty; ``check_fields`` checks it.
    """
    metadata = {
        "help": help, "group": group, "choices": tuple(choices), "expects": expects, "positional": positional,
        "words": tuple(words), "whole": whole, "line_only": line_only, "least": least, "most": most, "positive": positive,
        "filled": filled,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def changed(cls: type, name: str, default: Any, help: str | None = None, **about: Any) -> Any:
    """A copy of a field of another configuration, with another default.

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
        name: the name of the field.
        default: the new default.
        help: the new text in ``--help``; None keeps the old one.
        about: other arguments of :func:`option` to change.
    """
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    about = dict(field.metadata) | ({} if help is None else {"help": help}) | about
    return option(default, about.pop("help"), **about)


def by_heading(*headings: str) -> Callable[[type[C]], type[C]]:
    """A class decorator that sorts the fields of a configuration by their headings.

    A configuration that inherits several groups of options then lists related options together, in ``--print_config`` and in
    ``config.yaml`` as in ``--help``.

    Args:
        headings: the headings in order.
    """

    def arrange(cls: type[C]) -> type[C]:
        of_configuration: Any = cls
        fields = {field.name: field for field in dataclasses.fields(of_configuration)}
        order = sorted(fields, key=lambda name: headings.index(fields[name].metadata["group"]))
        of_configuration.__dataclass_fields__ = {name: fields[name] for name in order}
        return cls

    return arrange


def part_of(config: Any, cls: type[T]) -> T:
    """One group of options, with the values of a configuration that has the same fields among others."""
    group: Any = cls
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(group)})


def with_changes(config: C, changes: dict[str, Any]) -> C:
    """A copy of a configuration with other values of some fields.

    Raises:
        InputError: the configuration has no field of a given name.
    """
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            raise InputError(f"there is no option {name!r}{nearest(name, names) or '; there are ' + ', '.join(names)}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def check_fields(config: Any) -> None:
    """Raise ``InputError`` if the value of a field is empty, not one of its ``choices``, or outside its bounds."""
    check_choices(config)
    for field in dataclasses.fields(config):
        name, value, about = field.name, getattr(config, field.name), field.metadata
        if value is None and field.default is None:
            continue
        if about.get("filled") and not all(str(text).strip() for text in (value if isinstance(value, list) else [value])):
            raise InputError(f"{name} is empty; give a name, or leave it out for its default")
        if isinstance(value, list):
            _check_numbers(name, value, positive=about.get("positive", False), least=about.get("least"))
            continue
        if (least := about.get("least")) is not None:
            check_at_least(name, value, least)
            if value > (most := about["most"]):
                largest = f"below 2**{most.bit_length()}" if most > MOST else f"of at most {most}"
                raise InputError(f"{name} is {shown(value)}; give a whole number {largest}")
        if about.get("positive") and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; give a finite number above 0")


def _check_numbers(name: str, texts: Sequence[str], *, positive: bool, least: int | None) -> None:
    """Check the numbers of a list of texts.

    >>> _check_numbers("rates", ["0.1", "fast"], positive=True, least=None)
    Traceback (most recent call last):
    bora_pyro.errors.InputError: rates has 'fast'; give finite numbers above 0
    """
    for text in texts if positive or least is not None else ():
        try:
            usable = 0 < float(text) < math.inf if least is None else int(text) >= least
        except ValueError:
            usable = False
        if not usable:
            what = "finite numbers above 0" if least is None else f"whole numbers from {least} up"
            raise InputError(f"{name} has {shown(text)}; give {what}")


def check_choices(config: Any) -> None:
    """Raise ``InputError`` if the value of a field is not one of its ``choices``."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and not (value is None and field.default is None):
            check_one_of(field.name, value, choices)
