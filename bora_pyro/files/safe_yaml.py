r"""YAML that anybody may have written: mappings of plain values, without surprises, and nothing in it is ever run.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "fit.yaml")
    >>> _ = file.write_text("learning_rate: 1e-3\ntask_column: no\nalpha:\n")
    >>> read_mapping(file, as_text=True)
    {'learning_rate': '1e-3', 'task_column': 'no', 'alpha': None}
    >>> _ = file.write_text("rank: 4\nrank: 8\n")
    >>> read_mapping(file)
    Traceback (most recent call last):
    bora_pyro.files.safe_yaml.YamlError: 'rank' is given twice, first in line 1

YAML 1.1 takes `no` for false, `1:30` for 90, `010` for 8 and `1e-3` for a text. Where the reader knows of what type a value
must be, it asks for texts and converts them itself. Tags, which could name a Python object, are refused, and so are anchors,
aliases and merges, by which a file of a kilobyte can stand for one of a terabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

#: The largest file that is read: the options of a fit, with comments, take some 10 KiB.
MAX_BYTES = 2**17
#: Lists and mappings within one another; a configuration has two.
MAX_DEPTH = 16


class YamlError(ValueError):
    """Why a file is not used as YAML, in one line; ``line`` counts from 1, None where it is the file as a whole."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


class Quoted(str):
    """A text that stood in quotes: it is meant as a text, whatever it looks like."""

    __slots__ = ()


def read_mapping(file: Path, *, as_text: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        file: the file, UTF-8, at most ``MAX_BYTES`` long.
        as_text: leave every value as the text that it is written as, quoted ones as `Quoted`, empty and ``null`` ones as None,
            and take an empty file for an empty mapping; else values have the types of YAML 1.1.

    Raises:
        OSError: the file cannot be read.
        YamlError: it is no YAML of the kind that is read here, or no mapping; a key is repeated, or is no text.
    """
    with file.open("rb") as opened:
        return parse_mapping(opened.read(MAX_BYTES + 1), as_text=as_text)


def parse_mapping(raw: bytes, *, as_text: bool = False, most: int = MAX_BYTES) -> dict[str, Any]:
    """The mapping in some YAML of at most ``most`` bytes, as `read_mapping` gives it."""
    if len(raw) > most:
        raise YamlError(f"it is larger than {most // 1024} KiB")
    loader: type[yaml.SafeLoader] = _TextLoader if as_text else _Loader
    try:
        content = yaml.load(raw.decode("utf-8"), Loader=loader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem).split())
        if problem.startswith("found character '\\t'"):
            problem = "a tab stands where YAML takes spaces"
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
        raise YamlError(f"the key {strange[0]!r} is no text; give names as keys")
    return content


def dump_mapping(mapping: Mapping[str, Any]) -> str:
    """A mapping as YAML, from which `read_mapping` gives the same in either form.

    >>> dump_mapping({"tau": 1e-10, "group_column": "none", "alpha": None})
    "tau: 1.0e-10\\ngroup_column: 'none'\\nalpha: null\\n"
    """
    return str(yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without tags, anchors, aliases, merges and repeated keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _problem(f"the anchor {event.anchor!r} is not followed; write the value where it is meant", event.start_mark)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _problem(f"the tag {tag!r} is not followed; write the value alone", event.start_mark)
        if self.depth == MAX_DEPTH:
            raise _problem(f"lists and mappings stand more than {MAX_DEPTH} deep in one another", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a list or a mapping stands where a key must", key.start_mark)
            if key.value == "<<":
                raise _problem("'<<' merges nothing here; write the options out", key.start_mark)
            if key.value in lines:
                raise _problem(f"{key.value!r} is given twice, first in line {lines[key.value]}", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


class _TextLoader(_Loader):
    """The same, but a value without quotes is the text that it is written as, or None."""


def _as_written(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return Quoted(node.value) if node.style else str(node.value)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.endswith(":null")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TextLoader.add_constructor("tag:yaml.org,2002:str", _as_written)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, but ``none`` stands in quotes where it is a text: without them it is None to the command line.

    Texts with letters that are not printed, line ends of other systems among them, stand in double quotes, escaped. Lines, as of
    a chat template, stand as lines.
    """


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    unprintable = any(not letter.isprintable() and letter != "\n" for letter in value)
    style = "'" if value.strip().lower() in ("none", "null") else "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if unprintable else style)


_Dumper.add_representer(str, _text)


def _problem(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
