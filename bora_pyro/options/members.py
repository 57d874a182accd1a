"""Build a member of an axis (an adapter, a prior, a router, a likelihood or a guide) from its name and from options as texts.

>>> from dataclasses import dataclass
>>> @dataclass
... class Circle:
...     radius: float = 1.0
...     filled: bool = False
>>> build_member("shape", {"circle": Circle}, "circle", ["radius=2"])
Circle(radius=2.0, filled=False)
>>> build_member("shape", {"circle": Circle}, "circle", ["radios=2"])
Traceback (most recent call last):
bora_pyro.errors.InputError: shape circle has no option 'radios'; did you mean 'radius'?

The options are the constructor arguments of the class, or those of the function that builds the member, so a new member needs
only one file and one line in its registry.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from bora_pyro.errors import InputError, check_one_of, nearest, shown

T = TypeVar("T")

_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def build_member(
    axis: str,
    registry: Mapping[str, type[T]],
    name: str,
    options: Sequence[str] = (),
    *,
    usual: Mapping[str, Any] | None = None,
) -> T:
    """Build a member of a registry.

    Args:
        axis: the name of the axis for error messages, such as ``adapter``.
        registry: classes by name.
        name: the name of the member.
        options: arguments of the class as texts, ``key=value``.
        usual: further arguments. The class gets those that it has and that ``options`` does not set.

    Raises:
        InputError: the name or an option is unknown, a text cannot be converted to the type of its option, or the class raises
            the error.
    """
    check_one_of(axis, name, registry)
    values = read_options(axis, name, registry[name], options)
    arguments = inspect.signature(registry[name]).parameters
    passed = {key: value for key, value in (usual or {}).items() if key in arguments and key not in values}
    return registry[name](**(passed | values))


def read_options(
    axis: str, name: str, member: Callable[..., Any], options: Sequence[str], *, without: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments of a member that some texts give, by name.

        >>> def spiral(centre: list[float], turns: int = 3) -> None:
        ...     ...
        >>> read_options("shape", "spiral", spiral, ["turns=5"])
        {'turns': 5}

    Args:
        axis: the name of the axis for error messages.
        name: the name of the member.
        member: its class, or the function that builds it.
        options: the texts, ``key=value``.
        without: arguments that are no options of the member.

    Raises:
        InputError: an option is unknown or given twice, or a text cannot be converted to the type of its option.
    """
    kinds = {key: kind for key, kind in member_options(member).items() if key not in without}
    values: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{axis}_option {shown(text)} cannot be used; give key=value")
        if key not in kinds:
            known = f"; it has {', '.join(kinds)}" if kinds else "; it has none"
            raise InputError(f"{axis} {name} has no option {key!r}{nearest(key, kinds) or known}")
        if key in values:
            raise InputError(f"{axis}_option {key} is given twice; give it once")
        values[key] = _convert(value, kinds[key], f"{axis}_option {key}")
    return values


def member_options(member: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a class or a function that a text can give, with their types, by name."""
    parameters = inspect.signature(member, eval_str=True).parameters.values()
    return {parameter.name: parameter.annotation for parameter in parameters if _plain(parameter.annotation) is not None}


def options_text(registry: Mapping[str, Callable[..., Any]], *, without: Sequence[str] = ()) -> str:
    """The options of all members that have some, with their defaults, for a help text.

        >>> def spiral(centre: list[float], turns: int = 3, name: str | None = None) -> None:
        ...     ...
        >>> def dot() -> None:
        ...     ...
        >>> options_text({"spiral": spiral, "dot": dot})
        'spiral turns=3 name=none'

    Args:
        registry: classes, or functions that build a member, by name.
        without: arguments that are no options of a member.
    """
    parts = []
    for name, member in registry.items():
        defaults = inspect.signature(member).parameters
        options = [f"{key}={_text(defaults[key].default)}" for key in member_options(member) if key not in without]
        parts += [" ".join([name, *options])] if options else []
    return "; ".join(parts)


def _text(default: Any) -> str:
    """A default as ``_convert`` reads it."""
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _plain(hint: Any) -> type | None:
    """The type to which a text is converted, or None if a text cannot give a value of this type."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [part for part in parts if part in (int, float, bool, str)]
    return kinds[0] if kinds else None


def _convert(text: str, hint: Any, what: str) -> Any:
    kind, optional = _plain(hint), type(None) in get_args(hint)
    if optional and text.lower() in ("none", "null"):
        return None
    if kind is str:
        return text
    assert kind is not None
    refusal = InputError(f"{what} is {shown(text)}; give {_EXPECTED[kind]}{' or none' if optional else ''}")
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise refusal
        return _BOOLEANS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise refusal from None
