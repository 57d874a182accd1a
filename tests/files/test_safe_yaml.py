"""YAML that is read in the types that it is written in, as a run folder's is; the traps of options are in test_config.py."""

from __future__ import annotations

import time

import pytest

from bora_pyro.files.safe_yaml import MAX_BYTES, YamlError, dump_mapping, parse_mapping

VALUES = {
    "whole": 3, "number": 1e-10, "large": 1e300, "infinite": float("inf"), "yes": True, "nothing": None, "list": ["a", "b, c"],
    "texts": ["none", "Null", "~", "no", "1:30", "1e3", ".inf", "", " ", "# no comment", "a: b", "é\u2028\U0001f600", "\ud800"],
}  # fmt: skip


def test_what_is_written_is_read_back():
    assert parse_mapping(dump_mapping(VALUES).encode()) == VALUES
    as_text = parse_mapping(dump_mapping(VALUES).encode(), as_text=True)
    assert as_text["texts"] == VALUES["texts"]
    assert (as_text["whole"], as_text["yes"], as_text["nothing"]) == ("3", "true", None)


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "\x1b[2J", "naïve ☃", "two\nlines", "none", " x ", "a\tb"])
def test_every_text_comes_back_from_yaml(text):
    for as_text in (False, True):
        assert parse_mapping(dump_mapping({"data": text}).encode(), as_text=as_text) == {"data": text}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {{ m.content }}\n{% endfor %}",
        "\n  {{ a }}  \n\n",
        "  {{ a }}\n\t{{ b }} \n",
        "{{ a }}\n",
        "\ufeff{{ a }}\r\n\x85\u2028# {{ b }}: 'x' \"y\" \\n\x1b\U0001f600\n---\n...\n",
        "%YAML {{ a }}\n" + "x" * 300 + " y" * 100,
    ],
)
def test_lines_are_read_back_in_either_form(template):
    for as_text in (False, True):
        written = dump_mapping({"chat_template": template, "after": 1})
        assert parse_mapping(written.encode(), as_text=as_text)["chat_template"] == template
    assert parse_mapping(dump_mapping({"a": [template, template]}).encode()) == {"a": [template, template]}


def test_a_bomb_is_refused_before_it_goes_off():
    levels = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    start = time.perf_counter()
    with pytest.raises(YamlError, match="the anchor 'a0' is not supported") as caught:
        parse_mapping("\n".join(levels).encode())
    assert caught.value.line == 1
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("depth", [10, 100_000])
def test_depth_is_bounded(depth):
    with pytest.raises(YamlError):
        parse_mapping(b"a: " + b"[" * depth)
    with pytest.raises(YamlError):
        parse_mapping(b"a: " + b"{a: " * min(depth, 20_000))


@pytest.mark.parametrize(
    ("raw", "message", "line"),
    [
        (b"", "holds nothing", None),
        (b"# a comment\n", "holds nothing", None),
        (b"x" * (MAX_BYTES + 1), "larger than 128 KiB", None),
        (b"a: 2020-13-45", "month must be in 1..12", None),
        (b"a: 1\nb: *c", "the anchor 'c'", 2),
        (b"a: !!python/name:os.system", "the tag '!!python/name:os.system'", 1),
        (b"a: !!binary aGk=", "the tag '!!binary'", 1),
        (b"1: 2", "the key 1 is not a text", None),
        (b"[1]: 2", "a list or a mapping is used as a key; give names as keys", 1),
        (b"{a: 1}: 2", "a list or a mapping is used as a key; give names as keys", 1),
        (b"- a", "holds a list", None),
        (b"3", "holds a int", None),
        (b"\xff", "byte 0xff at position 0 is not UTF-8", None),
        (b"a: \x00", "unacceptable character", None),
        (b'a: "\\Uffffffff"', "too large|not in range", None),
        (b"a: 0b_", "invalid literal", None),
    ],
)
def test_refusals(raw, message, line):
    with pytest.raises(YamlError, match=message) as caught:
        parse_mapping(raw)
    assert "\n" not in str(caught.value)
    assert caught.value.line == line
