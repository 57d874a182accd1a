"""The command that says which task a text is of."""

from __future__ import annotations

import re

import pytest

from bora_pyro.predict.infer_task import infer_task as infer
from bora_pyro.predict.token_filter import token_filter
from bora_pyro.runs.infer_task import COMMAND
from bora_pyro.runs.saved import load_run
from tests.tiny_base import documents, map_run, quick_fit, write_table

main = COMMAND.main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infer")
    options = quick_fit(folder) | {"data": write_table(folder / "more.csv", documents(number=20)), "epochs": 2}
    map_run(options | {"learning_rate": 0.1, "output_dir": folder / "run"})
    return folder / "run"


def said(capsys):
    """The numbers in the rows of the table."""
    rows = capsys.readouterr().out.splitlines()[1:]
    return [[float(number) for number in re.findall(r"\b[01]\.\d+", row)] for row in rows]


def test_it_is_as_sure_as_it_was_right_on_the_validation_documents(run, capsys, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("The first text.\n\nAnd another one.\n", encoding="utf-8")
    assert main([str(run), "--file", str(texts), "--calibrate", "true", "--most", "1"]) == 0
    saved = load_run(run)
    validation = saved.data.validation
    calibration = infer(saved.fitted, validation).calibrate(validation.task)
    expected = infer(saved.fitted, ["The first text.", "And another one."], calibration=calibration)
    found = said(capsys)
    assert [row[0] for row in found] == pytest.approx(expected.probabilities.max(1).values.tolist(), abs=1e-4)
    assert main([str(run), "--file", str(texts), "--temperature", "1e6", "--prior", "flat"]) == 0
    for row in said(capsys):  # at a high temperature the text says nothing
        assert row == pytest.approx([1 / 3] * 3, abs=1e-3)


def test_the_segments_of_each_text(run, capsys):
    texts = ["The first text.", "And another one, which is longer than the first."]
    words = [word for text in texts for word in ("--text", text)]
    assert main([str(run), *words, "--by", "token", "--switch_rate", "0.3", "--prior", "flat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = token_filter(load_run(run).fitted, texts, switch_rate=0.3, prior="flat")
    rows = [(number + 1, segment) for number, segments in enumerate(expected.segments) for segment in segments]
    assert lines[-1] == f"switch rate 0.3, perplexity of the texts {expected.perplexity:.2f}"
    for line, (number, segment) in zip(lines[1:-1], rows, strict=True):
        cells = line.split()
        assert [int(cells[0]), int(cells[1])] == [number, segment.end - segment.start]
        assert segment.task in line
        assert f"{segment.probability:.4f}" in line
    assert main([str(run), *words, "--by", "token"]) == 0
    chosen = token_filter(load_run(run).fitted, texts).switch_rate
    assert f"switch rate {chosen:.3g}," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--calibrate", "true", "--temperature", "3"], "calibrate finds the temperature"),
        (["--temperature", "0"], "temperature is 0"),
        (["--unknown", "1"], "unknown is 1"),
        (["--switch_rate", "0.1"], "switch_rate is 0.1, but by is text; give --by token"),
        (["--draws", "2"], "draws is 2, but by is text"),
        (["--by", "token", "--draws", "2"], "is a point estimate"),
        (["--by", "token", "--draws", "0"], "draws is 0"),
        (["--by", "token", "--calibrate", "true"], "calibrate is for whole texts"),
        (["--by", "token", "--switch_rate", "1.5"], "switch_rate is 1.5; give a probability from 0 to 1"),
        (["--by", "token", "--temperature", "0"], "temperature is 0"),
        (["--by", "token", "--most", "1"], "most is 1, and a segment has one task"),
        (["--by", "word"], "by is 'word'; allowed: text, token"),
        (["--text", "a\udcff"], r"text 2 ('a\udcff') has half a surrogate pair"),
    ],
)
def test_bad_input(run, change, words, capsys):
    assert main([str(run), "--text", "A text.", *change]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in error
