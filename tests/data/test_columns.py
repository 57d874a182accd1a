"""Several columns as one: the texts of a document, the names of a task."""

from __future__ import annotations

import pandas as pd
import pytest

from bora_pyro.data import load_tasks, read_table, table
from bora_pyro.errors import InputError
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from tests.data_fixtures import word_tokenizer


def test_texts_are_joined_by_a_blank_line_and_empty_ones_left_out():
    frame = pd.DataFrame({"task": "a", "title": ["Graphs", "", None, " "], "body": ["Nodes.", "Edges.", "Loops.", ""]})
    result, notes = read_table(frame, text_column=["title", "body"])
    assert result["text"][:] == ["Graphs\n\nNodes.", "Edges.", "Loops."]
    assert notes == ["1 document with empty text was dropped"]
    assert read_table(frame, text_column=["body", "title"])[0]["text"][0] == "Nodes.\n\nGraphs"
    assert read_table(frame, text_column=["body"])[0].to_list() == read_table(frame, text_column="body")[0].to_list()


def test_names_are_joined():
    frame = pd.DataFrame({"country": ["UK", "NO", None, "UK"], "year": [1833, 1814, 1905, None], "text": ["w", "x", "y", "z"]})
    result, notes = read_table(frame, task_column=["country", "year"])
    assert result["task"][:] == ["UK / 1833", "NO / 1814"]
    assert notes == ["2 documents with no task were dropped"]
    data = load_tasks(
        table([{"p": p, "q": q, "text": "red"} for p in "ab" for q in "cd" for _ in range(3)]),
        word_tokenizer(),
        task_column=["p", "q"],
    )
    assert data.tasks == ["a / c", "a / d", "b / c", "b / d"]


def test_two_tasks_never_share_a_name():
    frame = pd.DataFrame({"p": ["a / b", "a", "a / b"], "q": ["c", "b / c", "c"], "text": ["x", "y", "z"]})
    with pytest.raises(InputError, match=r"row 2: \('a / b', 'c'\) and \('a', 'b / c'\) both give the task name 'a / b / c'"):
        read_table(frame, task_column=["p", "q"])
    assert read_table(frame.iloc[[0, 2]], task_column=["p", "q"])[0]["task"][:] == ["a / b / c"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": ["text", "boddy"]}, r"no column 'boddy' \(text_column\); .*did you mean 'body'"),
        ({"task_column": ["task", "speaker"]}, r"no column 'speaker' \(task_column\)"),
        ({"task_column": []}, r"task_column is \[\]; give one column or several different ones"),
        (
            {"prompt_column": ["task", "text"], "completion_column": "body"},
            r"prompt_column is \['task', 'text'\]; give the name of",
        ),
        ({"messages_column": 3}, r"messages_column is 3; give the name of one column"),
        ({"group_column": ["body"]}, r"group_column is \['body'\]; give the name of one column"),
        ({"text_column": ["body", "body"]}, r"text_column is \['body', 'body'\]; give one column or several different ones"),
    ],
)
def test_columns_that_are_not_there(options, message):
    with pytest.raises(InputError, match=message):
        read_table(pd.DataFrame({"task": ["a"], "text": ["b"], "body": ["c"]}), **options)


def test_columns_on_the_command_line(tmp_path):
    line = ["--task_column", "country", "speaker", "--text_column", "title, of it", "body"]
    config = parse_config(MapFitConfig, line)
    assert (config.task_column, config.text_column) == (["country", "speaker"], ["title, of it", "body"])
    file = tmp_path / "fit.yaml"
    file.write_text("task_column: [country, 2020]\ntext_column: [body]\n")
    config = parse_config(MapFitConfig, ["--config", str(file)])
    assert (config.task_column, config.text_column) == (["country", "2020"], "body")
    for text in ("task_column: []", "task_column: [a, [b]]"):
        file.write_text(text)
        with pytest.raises(InputError, match="give a text, or several"):
            parse_config(MapFitConfig, ["--config", str(file)])
    with pytest.raises(InputError, match="task_column is empty"):
        parse_config(MapFitConfig, ["--task_column", "country", " "])
    with pytest.raises(InputError, match="prompt_column is given without completion_column"):
        parse_config(MapFitConfig, ["--prompt_column", "question"])
