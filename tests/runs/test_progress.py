"""What a person sees: plain lines in a log file, a bar on a terminal, a table that is never cut."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len

from bora_pyro.runs.progress import Progress, print_table, result_table


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(**changes):
    task = {
        "name": "Abid Q. Raja",
        "train_documents": 1234,
        "test_documents": 56,
        "base_test_perplexity": 31.5,
        "test_perplexity": 20.25,
        "deviation_norm": 1.5,
    }
    return {"base_test_perplexity": 30.0, "test_perplexity": 21.0, "tasks": {"abid-q-raja": task | changes}}


def printed(*args):
    file = io.StringIO()
    print_table(*args, file=file)
    return file.getvalue()


def test_plain_lines_come_every_few_seconds_and_at_an_epochs_end():
    file, clock = io.StringIO(), Clock()
    with Progress(100, file=file, clock=clock, interval=5.0) as progress:
        for step in range(1, 11):
            clock.now += 1
            progress.update(step, loss=3.5, tokens_per_second=12345.6, epoch=1)
        progress.update(10, validation=20.125)
    assert file.getvalue().splitlines() == [
        "step 5/100  epoch 1  loss 3.5000  12,346 tokens/s  0:05, about 1:35 left",
        "step 10/100  epoch 1  loss 3.5000  12,346 tokens/s  0:10, about 1:30 left",
        "step 10/100  epoch 1  loss 3.5000  12,346 tokens/s  validation perplexity 20.12  0:10, about 1:30 left",
    ]


def test_a_line_says_of_how_many_epochs_and_the_learned_tau():
    file, clock = io.StringIO(), Clock()
    with Progress(20, epochs=6, start=0, file=file, clock=clock) as progress:
        clock.now += 8
        progress.update(10, loss=3.5, epoch=1, validation=20.125, tau=168.44)
        clock.now += 8
        progress.update(20, epoch=2, tau=31622.8)
    assert file.getvalue().splitlines() == [
        "step 10/20  epoch 1/6  loss 3.5000  validation perplexity 20.12  τ 168  0:08, about 0:08 left",
        "step 20/20  epoch 2/6  loss 3.5000  validation perplexity 20.12  τ 31600  0:16",
    ]


def test_a_resumed_fit_guesses_its_end_from_its_own_steps():
    file, clock = io.StringIO(), Clock()
    with Progress(0, file=file, clock=clock) as progress:
        progress.total_steps = 100
        progress.update(91)
        clock.now += 3600
        progress.update(95, epoch=2)
        progress.update(100, validation=2.0)
    assert file.getvalue().splitlines() == [
        "step 95/100  epoch 2  1:00:00, about 1:00:00 left",
        "step 100/100  epoch 2  validation perplexity 2.00  1:00:00",
    ]


def test_disabled_progress_is_silent():
    for file in (io.StringIO(), Terminal()):
        with Progress(2, enabled=False, file=file) as progress:
            progress.update(1, loss=1.0, validation=2.0)
        assert file.getvalue() == ""


def test_progress_goes_to_stderr(capsys):
    with Progress(1) as progress:
        progress.update(1, validation=2.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1/1" in captured.err


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Progress(4, file=file) as progress:
        progress.update(2, loss=1.0, epoch=1, validation=2.5)
    assert "2/4" in file.getvalue()
    assert "validation perplexity 2.50" in file.getvalue()


def test_a_bar_and_its_numbers_fit_into_80_columns(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    with Progress(1000, epochs=60, file=file) as progress:
        progress.update(900, loss=3.5, tokens_per_second=12345.6, epoch=55, validation=120.125, tau=12345.6)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, shown)) <= 80
    bar = [line for line in shown if " 900/1000 " in line][-1]
    assert bar.startswith("epoch 55/60 ")
    assert bar.rstrip().endswith(" left")
    assert "loss 3.5000  12,346 tokens/s  validation perplexity 120.12  τ 12300" in [line.rstrip() for line in shown]


def test_a_terminal_without_a_cursor_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with Progress(4, file=file) as progress:
        progress.update(2, validation=2.5)
    assert file.getvalue() == "step 2/4  validation perplexity 2.50  0:00, about 0:00 left\n"


def test_table_has_a_row_a_task_and_one_for_all():
    two = metrics()
    two["tasks"]["bo"] = two["tasks"]["abid-q-raja"] | {"name": "Bo"}
    assert result_table(two).row_count == 3
    lines = printed(two).splitlines()
    assert lines[3].split() == ["Abid", "Q.", "Raja", "1,234", "56", "31.50", "20.25", "1.50"]
    assert lines[-1].split() == ["all", "tasks", "2,468", "112", "30.00", "21.00", "–"]


@pytest.mark.parametrize(
    "name", ["train_documents", "test_documents", "base_test_perplexity", "test_perplexity", "deviation_norm"]
)
def test_what_is_not_known_is_a_dash(name):
    assert printed(metrics(**{name: None})).splitlines()[3].split().count("–") == 1
    missing = metrics()
    del missing["tasks"]["abid-q-raja"][name]
    assert printed(missing) == printed(metrics(**{name: None}))


def test_table_without_tasks():
    assert printed({}).splitlines()[-1].split() == ["all", "tasks", "–", "–", "–", "–", "–"]


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/]", "x" * 60, "東京 " * 10])
def test_names_are_shown_whole_and_as_they_are(name):
    output = printed(metrics(name=name))
    assert name.strip() in output
    assert "\x1b" not in output


@pytest.mark.parametrize("name", ["q" * 3000, "qあ" * 200])
def test_long_names_take_several_lines(name):
    output = printed(metrics(name=name))
    assert max(cell_len(line) for line in output.splitlines()) < 130
    assert (output.count("q"), output.count("あ")) == (name.count("q"), name.count("あ"))


def test_a_narrow_encoding_is_no_error():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_table(metrics(name="Språk"), file=file)
    file.flush()
    assert b"Spr?k" in raw.getvalue()


def test_table_on_a_terminal_keeps_to_its_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    print_table(metrics(name="q" * 300), file=file)
    assert file.getvalue().count("q") == 300
