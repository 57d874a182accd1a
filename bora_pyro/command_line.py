"""A configuration dataclass as a command line: ``--config FILE.yaml`` first, ``--key value`` over it.

A field's help is its documentation, so it is written once. Everything that cannot be used is one ``InputError``.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Walk:
    ...     steps: int = option(10, "how many steps to take")
    ...     speed: float = option(1.5, "metres a second")
    >>> parse_config(Walk, ["--steps", "3", "--speed=2e-1"])
    Walk(steps=3, speed=0.2)
    >>> parse_config(Walk, ["--stepz", "3"])
    Traceback (most recent call last):
    bora_pyro.errors.InputError: unknown option 'stepz'; did you mean 'steps'?
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from bora_pyro.errors import InputError, nearest

T = TypeVar("T")

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NONE = ("none", "null")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of names"}
_EXPECTED |= {tuple: "a text, or several"}
_METAVARS = {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT", list: "NAME", tuple: "TEXT"}
_CONTROLS = ("config", "print_config", "help")


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
        positional: a text that stands on the line without ``--key``; in a YAML file it has its key as the others do.
    """
    metadata = {
        "help": help, "group": group, "choices": tuple(choices), "expects": expects, "positional": positional,
        "words": tuple(words), "whole": whole,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def parse_config(cls: type[T], argv: Sequence[str], *, prog: str | None = None) -> T:
    """Build a configuration from command-line arguments, and check it.

        >>> from bora_pyro.config import MapFitConfig
        >>> config = parse_config(MapFitConfig, ["--tau", "inf", "--targets", "q_proj", "v_proj"])
        >>> config.tau, config.targets, config.rank
        (inf, ['q_proj', 'v_proj'], 8)

    Args:
        cls: a dataclass whose fields are made by ``option``; its ``validate()`` is called where it has one.
        argv: the arguments without the program's name: ``--key value``, ``--key=value``, ``--config FILE.yaml``,
            ``--print_config`` (prints the resolved YAML, exits with 0) and ``--help``.
        prog: the program's name in ``--help``.

    Raises:
        InputError: an unknown, repeated or unusable option, or a file that cannot be used.
        SystemExit: with code 0, after ``--help`` and ``--print_config``.
    """
    kinds = _kinds(cls)
    line, unknown = _parser(cls, kinds, prog).parse_known_args(list(argv))
    for token in unknown:
        if not token.startswith("-"):
            raise InputError(f"unexpected {token!r}: every value follows its option, as in --key value")
        name = token.partition("=")[0].lstrip("-")
        if name in _positional(cls):
            raise InputError(f"--{name} is no option: give its value alone, as in {prog or 'PROGRAM'} {name.upper()}")
        raise _unknown(name, (*kinds, *_CONTROLS), "")
    given = vars(line)
    file, print_config = given.pop("config", None), given.pop("print_config", False)

    values = _from_yaml(cls, Path(file), kinds) if file is not None else {}
    values |= {name: _convert(value, f"--{name}", *_field(cls, name, kinds)) for name, value in given.items()}
    config = cls(**values)
    if hasattr(config, "validate"):
        config.validate()
    if print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def check_choices(config: Any) -> None:
    """Raise ``InputError`` where a field's value is not one of its ``choices``."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value not in choices and not (value is None and field.default is None):
            raise InputError(f"{field.name} is {value!r}; allowed: {', '.join(choices)}{nearest(str(value), choices)}")


def to_yaml(config: Any) -> str:
    """The configuration as YAML; ``--config`` reads it back to an equal one.

    >>> from bora_pyro.config import MapFitConfig
    >>> print(to_yaml(MapFitConfig(tau=float("inf"))).splitlines()[0])
    data: builtin:documentation
    """
    return str(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


def _kinds(cls: type) -> dict[str, tuple[type, bool]]:
    """Name -> (plain type, whether None is allowed); ``list[str]`` counts as list, ``str | list[str]`` as tuple."""
    kinds: dict[str, tuple[type, bool]] = {}
    for name, hint in get_type_hints(cls).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if str in parts and list[str] in parts:
            kinds[name] = (tuple, type(None) in parts)
            continue
        # of `float | str` the number, of `bool | str` the truth: the texts that it may be are its `words`
        hint = next(part for part in parts if part is not type(None))
        kinds[name] = (get_origin(hint) or hint, type(None) in parts)
    return kinds


def _field(cls: type, name: str, kinds: dict[str, tuple[type, bool]]) -> tuple[type, bool, str, tuple[str, ...], bool]:
    """What ``_convert`` needs to know of a field: type, whether None is allowed, what is expected, ``words``, and ``whole``."""
    kind, optional = kinds[name]
    about = next(field.metadata for field in dataclasses.fields(cls) if field.name == name)
    expects = about.get("expects") or _EXPECTED[kind]
    return kind, optional, expects + (" or none" if optional else ""), about.get("words", ()), about.get("whole", False)


def _positional(cls: type) -> list[str]:
    """Names of the fields that stand on the line without ``--key``."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]


def _unknown(name: str, valid: Sequence[str], where: str) -> InputError:
    return InputError(f"{where}unknown option {name!r}{nearest(name, valid) or '; --help lists them all'}")


def _convert(value: Any, where: str, kind: type, optional: bool, expected: str, words: tuple[str, ...], whole: bool) -> Any:
    """One value, as a text of the command line or as YAML gives it, to the field's type."""
    refusal = InputError(f"{where}: {value!r} cannot be used; give {expected}")
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value  # a list's words come as a list
    word = alone.strip().lower() if isinstance(alone, str) else None
    if optional and (value is None or word in _NONE):
        return None
    if word in words:
        return word
    if kind is tuple:  # one text, or several as they are given
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
            raise refusal
        return str(items[0]) if len(items) == 1 else [str(item) for item in items]
    if kind is list:
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise refusal
        names = list(items) if whole else [name.strip() for item in items for name in item.split(",") if name.strip()]
        if not names:
            raise refusal
        return names
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and word in _BOOLEANS:
            return _BOOLEANS[word]
        raise refusal
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (kind is int and isinstance(value, float)):
        raise refusal  # YAML's `rank: true` is no number, and its lists, mappings and dates are no text
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise refusal from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a repeated key is an error and not silently the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


def _from_yaml(cls: type, file: Path, kinds: dict[str, tuple[type, bool]]) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror or error}; give a YAML file that can be read") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"--config {file}{line}: {' '.join(str(error.problem).split())}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # bytes that are no text, a date such as 2020-13-45
        raise InputError(f"--config {file}: not usable as YAML ({' '.join(str(error).split())})") from None
    if content is None:  # an empty file, or comments only
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {file}: holds a {type(content).__name__}; give a mapping, one `key: value` a line")
    values = {}
    for name, value in content.items():
        if name not in kinds:
            raise _unknown(str(name), tuple(kinds), f"--config {file}: ")
        values[name] = _convert(value, f"--config {file}: {name}", *_field(cls, name, kinds))
    return values


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is an ``InputError`` and the caller decides what becomes of it."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one argument", "a value must follow, as in --key value")
        raise InputError(message.replace("expected at least one argument", "a value must follow, as in --key value"))


class _Once(argparse.Action):
    """Store the value; refuse the option where it was given before, instead of silently taking the last one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"{option_string} is given twice; give it once")
        setattr(namespace, self.dest, values)


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _parser(cls: type, kinds: dict[str, tuple[type, bool]], prog: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=" ".join(["%(prog)s", *map(str.upper, _positional(cls)), "[--config FILE.yaml] [--key value ...]"]),
        description=(cls.__doc__ or "").partition("\n")[0],
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    parser.add_argument("--config", action=_Once, metavar="FILE.yaml", help="read options from a file; those on the line win")
    parser.add_argument("--print_config", action="store_true", help="print the resolved options as YAML and exit")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        about, kind = field.metadata, kinds[field.name][0]
        heading = about.get("group", "options")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        # A bare switch (--overwrite) means true; a list takes all words up to the next option.
        several: dict[str, Any] = {"nargs": "+"}
        arity = {bool: {"nargs": "?", "const": "true"}, list: several, tuple: several}.get(kind, {})
        help_text = about.get("help", "")
        if "default:" not in help_text and not about.get("positional"):
            help_text += f" (default: {_shown(field.default)})"
        metavar = "|".join(about.get("choices", ()) or (_METAVARS[kind], *about.get("words", ())))
        name = f"--{field.name}"
        if about.get("positional"):
            # optional to argparse: a file may give it, and what it must be is the configuration's to check
            name, metavar, arity = field.name, field.name.upper(), {"nargs": "?"}
        action: Any = "extend" if about.get("whole") else _Once
        groups[heading].add_argument(name, action=action, metavar=metavar, help=help_text.replace("%", "%%"), **arity)
    return parser
