"""Fill a configuration dataclass from the command line: ``--config FILE.yaml``, and ``--key value``, which wins over the file.

The help text of a field is also its documentation. Every invalid input raises ``InputError``.

    >>> from dataclasses import dataclass
    >>> from bora_pyro.options.field import option
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
import json
import math
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.safe_yaml import Quoted, YamlError, dump_mapping, read_mapping
from bora_pyro.options.schema import json_schema, option_types

T = TypeVar("T")

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NONE = ("none", "null")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of names"}
_EXPECTED |= {tuple: "a text, or several"}
_METAVARS = {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT", list: "NAME", tuple: "TEXT"}
_CONTROLS = ("config", "print_config", "print_schema", "help")
_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+|\.?inf|\.?nan)(e[-+]?\d+)?", re.IGNORECASE)
# YAML's spelling of the numbers that have no digits.
_YAML_NUMBERS = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


def parse_config(cls: type[T], argv: Sequence[str], *, prog: str | None = None, others: Mapping[str, type] | None = None) -> T:
    """Build a configuration from command-line arguments, and check it.

        >>> from bora_pyro.runs.config.map_fit import MapFitConfig
        >>> config = parse_config(MapFitConfig, ["--tau", "inf", "--targets", "q_proj", "v_proj"])
        >>> config.tau, config.targets, config.rank
        (inf, ['q_proj', 'v_proj'], 8)

    Args:
        cls: a dataclass whose fields are made by ``option``. Its method ``validate()`` is called if it has one.
        argv: the arguments without the program's name: ``--key value``, ``--key=value``, ``--config FILE.yaml``,
            ``--print_config`` (prints the resolved YAML with the help of every option), ``--print_schema`` (prints the JSON
            schema of the YAML file) and ``--help``.
        prog: the program's name in ``--help``.
        others: configuration classes of other commands, by command name. If the file fits one of them, the error says so.

    Raises:
        InputError: an option is unknown, is given twice or has an invalid value, or the file cannot be used.
        SystemExit: with code 0, after ``--help``, ``--print_schema`` and ``--print_config``.
    """
    kinds = option_types(cls)
    line, unknown = _parser(cls, kinds, prog).parse_known_args(_with_negative_numbers(argv))
    for token in unknown:
        if not token.startswith("-"):
            raise InputError(f"unexpected {shown(token)}: every value follows its option, as in --key value")
        name = token.partition("=")[0].lstrip("-")
        if name in _positional(cls):
            raise InputError(f"--{name} is not an option: give its value alone, as in {prog or 'PROGRAM'} {name.upper()}")
        raise _unknown(name, (*kinds, *_CONTROLS), "")
    given = vars(line)
    file, print_config = given.pop("config", None), given.pop("print_config", False)

    values = _from_yaml(cls, Path(file), kinds, others or {}) if file is not None else {}
    values |= {name: _convert(value, f"--{name}", *_field(cls, name, kinds)) for name, value in given.items()}
    config = cls(**values)
    if hasattr(config, "validate"):
        config.validate()
    if print_config:
        print(to_yaml(config, comments=True), end="")
        raise SystemExit(0)
    return config


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Call ``main`` with the program's arguments and exit with the code that it returns.

    After Ctrl-C the program prints "interrupted" and exits with code 130, as shells expect.
    """
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


def to_yaml(config: Any, *, comments: bool = False) -> str:
    """The configuration as YAML. ``--config`` reads it back to an equal configuration.

        >>> from bora_pyro.runs.config.map_fit import MapFitConfig
        >>> print(to_yaml(MapFitConfig(tau=float("inf"))).splitlines()[0])
        data: builtin:documentation

    Args:
        config: the configuration.
        comments: write the help of each option above it.
    """
    values = dataclasses.asdict(config)
    if not comments:
        return dump_mapping(values)
    parts = []
    for field in dataclasses.fields(config):
        about = field.metadata
        help_text = about.get("help", "") + (f" [{', '.join(about['choices'])}]" if about.get("choices") else "")
        parts += [f"# {line}\n" for line in textwrap.wrap(help_text, 118)]
        parts.append(dump_mapping({field.name: values[field.name]}))
    return "".join(parts)


def _field(cls: type, name: str, kinds: dict[str, tuple[type, bool]]) -> tuple[type, bool, str, tuple[str, ...], bool]:
    """The arguments of ``_convert`` for a field: type, whether None is allowed, allowed values in words, ``words``, ``whole``."""
    kind, optional = kinds[name]
    about = next(field.metadata for field in dataclasses.fields(cls) if field.name == name)
    expects = about.get("expects") or _EXPECTED[kind]
    # a choice that is called "none" is a value of its own, not the absence of one
    words = (*about.get("words", ()), *(choice for choice in about.get("choices") or () if choice in _NONE))
    return kind, optional, expects + (" or none" if optional else ""), words, about.get("whole", False)


def _positional(cls: type) -> list[str]:
    """Names of the fields that stand on the command line without ``--key``."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("positional")]


def _unknown(name: str, valid: Sequence[str], where: str) -> InputError:
    return InputError(f"{where}unknown option {shown(name)}{nearest(name, valid) or '; --help lists them all'}")


def _convert(value: Any, where: str, kind: type, optional: bool, expected: str, words: tuple[str, ...], whole: bool) -> Any:
    """Convert one value to the type of its field.

    From the command line the value is a text or a list of texts. From a YAML file it is a text, None, a tuple or a mapping.
    """
    given = list(value) if isinstance(value, tuple) else value
    refusal = InputError(f"{where}: {shown(given)} cannot be used; give {expected}")
    alone = (
        value[0] if isinstance(value, list) and len(value) == 1 else value
    )  # the command line gives the texts of a list as a list
    word = alone.strip().lower() if isinstance(alone, str) else None
    if word in words:
        return word
    if optional and (value is None or (word in _NONE and not isinstance(value, Quoted))):
        return None
    if kind is tuple:  # one text or several
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
            raise refusal
        return str(items[0]) if len(items) == 1 else [str(item) for item in items]
    if kind is list:
        if isinstance(value, tuple):  # from YAML: an item may contain commas
            names = [str(item) for item in value if isinstance(item, str) and item.strip()]
            if not names or len(names) < len(value):
                raise refusal
            return names
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise refusal
        names = list(items) if whole else [name.strip() for item in items for name in item.split(",") if name.strip()]
        if not names:
            raise refusal
        return names
    if not isinstance(value, str) or (kind is bool and word not in _BOOLEANS):
        raise refusal
    if kind is bool:
        return _BOOLEANS[str(word)]
    if kind is float and word in _YAML_NUMBERS:
        return _YAML_NUMBERS[str(word)]
    try:
        converted = kind(value)
    except (ValueError, OverflowError):
        raise refusal from None
    if kind is float and math.isinf(converted) and "inf" not in str(word):  # 1e999
        raise refusal
    return converted


def _command_of(content: Mapping[str, Any], others: Mapping[str, type]) -> str | None:
    """The command in ``others`` that has all options of the file; None if there is none, or if the file has only one option."""
    known = {name: {field.name for field in dataclasses.fields(cls)} for name, cls in others.items()}
    return next((name for name, fields in known.items() if len(content) > 1 and fields.issuperset(content)), None)


def _from_yaml(cls: type, file: Path, kinds: dict[str, tuple[type, bool]], others: Mapping[str, type]) -> dict[str, Any]:
    try:
        # read as texts and converted by the option's type, as on the command line: YAML's own types would differ
        content = read_mapping(file, as_text=True)
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror or error}; give a YAML file that can be read") from None
    except YamlError as error:
        line = f", line {error.line}" if error.line else ""
        raise InputError(f"--config {file}{line}: {error}") from None
    except ValueError as error:  # a NUL byte in the file's name
        raise InputError(f"--config {shown(str(file))}: {error}; give a YAML file that can be read") from None
    values: dict[str, Any] = {}
    line_only = {field.name for field in dataclasses.fields(cls) if field.metadata.get("line_only")}
    for name, value in content.items():
        if name not in kinds:
            if (other := _command_of(content, others)) is not None:
                raise InputError(f"--config {file} is a configuration of {other}; give one of this script")
            raise _unknown(str(name), tuple(kinds), f"--config {file}: ")
        value = tuple(value) if isinstance(value, list) else value
        converted = _convert(value, f"--config {file}: {name}", *_field(cls, name, kinds))
        if name not in line_only:
            values[name] = converted
    return values


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ``InputError`` where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one argument", "a value must follow, as in --key value")
        raise InputError(message.replace("expected at least one argument", "a value must follow, as in --key value"))


class _StoreOnce(argparse.Action):
    """Store the value, and raise an error if the option is given twice; argparse would silently take the last value."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            raise InputError(f"{option_string} is given twice; give it once")
        setattr(namespace, self.dest, values)


class _PrintSchema(argparse.Action):
    """Print the JSON schema of the configuration and exit, even if the other arguments are invalid."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        print(json.dumps(json_schema(self.const), indent=2, ensure_ascii=False))
        raise SystemExit(0)


def _with_negative_numbers(argv: Sequence[str]) -> list[str]:
    """The arguments with ``--key -1e3`` as ``--key=-1e3``, because argparse reads ``-1e3`` as an option."""
    joined: list[str] = []
    for token in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _NEGATIVE.fullmatch(token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _default(value: Any) -> str:
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
    parser.add_argument(
        "--config", action=_StoreOnce, metavar="FILE.yaml", help="read options from a file; options on the command line win"
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved options as YAML, with their help, and exit"
    )
    parser.add_argument(
        "--print_schema", action=_PrintSchema, nargs=0, const=cls, help="print the JSON schema of FILE.yaml and exit"
    )
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        about, kind = field.metadata, kinds[field.name][0]
        heading = about.get("group", "options")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        # A switch without a value (--overwrite) means true. A list takes all words up to the next option.
        several: dict[str, Any] = {"nargs": "+"}
        arity = {bool: {"nargs": "?", "const": "true"}, list: several, tuple: several}.get(kind, {})
        help_text = about.get("help", "")
        if "default:" not in help_text and not about.get("positional"):
            help_text += f" (default: {_default(field.default)})"
        metavar = "|".join(about.get("choices", ()) or (_METAVARS[kind], *about.get("words", ())))
        name = f"--{field.name}"
        if about.get("positional"):
            # optional for argparse: the YAML file may give it, and the configuration checks that it is there
            name, metavar, arity = field.name, field.name.upper(), {"nargs": "*" if kind is list else "?"}
        action: Any = "extend" if about.get("whole") else _StoreOnce
        groups[heading].add_argument(name, action=action, metavar=metavar, help=help_text.replace("%", "%%"), **arity)
    return parser
