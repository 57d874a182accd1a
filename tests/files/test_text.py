"""Names and texts of others on a terminal: every letter is seen, none of them speaks to it."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from bora_pyro.errors import InputError, escaped
from bora_pyro.files.text import NAME_LENGTH, name_line, replaced
from bora_pyro.predict.generate import Continuation
from bora_pyro.runs import generate
from bora_pyro.runs.progress import print_table

HOSTILE = "\x1b]0;owned\x07\x1b[2J \u202egnp.exe \x9b31m"
SHOWN = r"\x1b]0;owned\x07\x1b[2J \u202egnp.exe \x9b31m"


def test_what_cannot_be_seen_is_written_out_or_replaced():
    assert escaped(HOSTILE) == SHOWN == str(InputError(HOSTILE))
    assert replaced(HOSTILE) == "\ufffd]0;owned\ufffd\ufffd[2J \ufffdgnp.exe \ufffd31m"
    assert escaped("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    assert replaced("\uffff\ud800\x00") == "\ufffd" * 3


@pytest.mark.parametrize("text", ["Børge B.", "東京", "می\u200cخواهم", "👩\u200d👩\u200d👧", "10\u00a0%", "שלום", "e\u0301"])
def test_what_people_write_is_left_alone(text):
    assert escaped(text) == replaced(text) == text


def test_names_are_cut_to_a_line():
    assert name_line("x" * NAME_LENGTH) == "x" * NAME_LENGTH
    assert name_line("x" * (NAME_LENGTH + 1)) == "x" * (NAME_LENGTH - 1) + "…"
    assert name_line(" two\n lines ", characters=None) == "two lines"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_no_name_in_the_table_of_a_fit_speaks_to_the_terminal(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    file = kind()
    print_table({"tasks": {"a": {"name": HOSTILE}}}, file=file)
    assert SHOWN in file.getvalue()
    assert not {"\x07", "\x9b", "\u202e"} & {*file.getvalue()}
    assert "\x1b]" not in file.getvalue()
    assert "\x1b[2J" not in file.getvalue()


def test_texts_side_by_side_do_not_speak_to_the_terminal(monkeypatch):
    written = [Continuation("a\n" + HOSTILE, task, 0, HOSTILE, torch.tensor([0]), torch.zeros(1)) for task in (HOSTILE, "b")]
    for width in (300, 40):  # columns, and rows below each other
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(generate.side_by_side(written, width))
        output = console.file.getvalue()
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*output}
        assert r"\x1b]0;owned\x07" in output
    record = {"text": HOSTILE + "é\U000e0001", "perplexity": None}
    assert json.loads(generate._json_line(record)) == record
    assert generate._json_line(record).isprintable()
