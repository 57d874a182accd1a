r"""Read YAML from unknown sources: mappings of plain values only. Nothing in the file is ever executed.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "fit.yaml")
    >>> _ = file.write_text("learning_rate: 1e-3\ntask_column: no\nalpha:\n")
    >>> read_mapping(file, as_text=True)
    {'learning_rate': '1e-3', 'task_column': 'no', 'alpha': None}
    >>> _ = file.write_text("rank: 4\nrank: 8\n")
    >>> read_mapping(file)
    Traceback (most recent call last):
    bora_pyro.files.safe_yaml.YamlError: 'rank' is given twice, first in line 1

YAML 1.1 reads `no` as false, `1:30` as 90, `010` as 8 and `1e-3` as a text. A caller that knows the types of its values reads
them as texts and converts them itself. Tags are refused because they can name a Python object. Anchors, aliases and merges are
refused because with them a kilobyte of YAML can expand to a terabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

#: The largest file that is read. The options of a fit, with comments, take some 10 KiB.
MAX_BYTES = 2**17
#: The deepest nesting of lists and mappings. A configuration has two levels.
MAX_DEPTH = 16


class YamlError(ValueError):
    """A one-line reason why a YAML file cannot be used.

    Attributes:
        line: the line with the problem, from 1; None if the problem is not in one line.
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


class Quoted(str):
    """A text that was quoted in YAML. It is a text even if it looks like a number or like ``none``."""

    __slots__ = ()


def read_mapping(file: Path, *, as_text: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        file: the file, UTF-8, at most ``MAX_BYTES`` long.
        as_text: return each value as the text in the file, a quoted value as `Quoted`, and an empty value or ``null`` as None.
            An empty file is then an empty mapping. False returns the types of YAML 1.1.

    Raises:
        OSError: the file cannot be read.
        YamlError: the file is not valid YAML, uses a refused feature, or is not a mapping; a key is repeated or is not a text.
    """
    with file.open("rb") as opened:
        return parse_mapping(opened.read(MAX_BYTES + 1), as_text=as_text)


def parse_mapping(raw: bytes, *, as_text: bool = False, most: int = MAX_BYTES) -> dict[str, Any]:
    """As `read_mapping`, for YAML in memory of at most ``most`` bytes."""
    if len(raw) > most:
        raise YamlError(f"it is larger than {most // 1024} KiB")
    loader: type[yaml.SafeLoader] = _TextLoader if as_text else _Loader
    try:
        content = yaml.load(raw.decode("utf-8"), Loader=loader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem).split())
        if problem.startswith("found character '\\t'"):
            problem = "a tab is used where YAML needs spaces"
        raise YamlError(problem, error.problem_mark.line + 1 if error.problem_mark else None) from None
    except UnicodeDecodeError as error:
        raise YamlError(f"byte 0x{raw[error.start]:02x} at position {error.start} is not UTF-8") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date such as 2020-13-45, an escape such as \UFFFFFFFF
        raise YamlError(" ".join(str(error).split())) from None
    if content is None and as_text:  # an empty file, or comments only
        return {}
    if not isinstance(content, dict):
        names = {list: "a list", str: "a text", Quoted: "a text", type(None): "nothing"}
        kind = next((name for kind, name in names.items() if type(content) is kind), f"a {type(content).__name__}")
        raise YamlError(f"holds {kind}; give a mapping, one `key: value` a line")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise YamlError(f"the key {strange[0]!r} is not a text; give names as keys")
    return content


def dump_mapping(mapping: Mapping[str, Any]) -> str:
    """A mapping as YAML. `read_mapping` reads it back, with or without ``as_text``.

    >>> dump_mapping({"tau": 1e-10, "group_column": "none", "alpha": None})
    "tau: 1.0e-10\\ngroup_column: 'none'\\nalpha: null\\n"
    """
    return str(yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also refuses tags, anchors, aliases, merges and repeated keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _problem(f"the anchor {event.anchor!r} is not supported; write the value in its place", event.start_mark)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _problem(f"the tag {tag!r} is not supported; write the value alone", event.start_mark)
        if self.depth == MAX_DEPTH:
            raise _problem(f"lists and mappings are nested more than {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a list or a mapping is used as a key; give names as keys", key.start_mark)
            if key.value == "<<":
                raise _problem("'<<' is not supported; write the options out", key.start_mark)
            if key.value in lines:
                raise _problem(f"{key.value!r} is given twice, first in line {lines[key.value]}", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


class _TextLoader(_Loader):
    """A `_Loader` that returns each value as the text in the file, or as None if it is empty or ``null``."""


def _as_written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return Quoted(node.value) if node.style else str(node.value)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.endswith(":null")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TextLoader.add_constructor("tag:yaml.org,2002:str", _as_written)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper with rules for texts.

    The texts ``none`` and ``null`` are quoted, because the command line reads them as None without quotes. Texts with invisible
    characters are escaped in double quotes. Texts of several lines, such as a chat template, are written as a block.
    """


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    unprintable = any(not letter.isprintable() and letter != "\n" for letter in value)
    style = "'" if value.strip().lower() in ("none", "null") else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if unprintable else style)


_Dumper.add_representer(str, _text)


def _problem(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
