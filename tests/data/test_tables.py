from __future__ import annotations

import gzip
import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest

from bora_pyro.data.tables import read_table, table
from bora_pyro.errors import InputError

ROWS = [
    {"task": "Ada", "text": 'She said: "Hi",\nand left.', "doc_id": "s1"},
    {"task": "NA", "text": "null", "doc_id": "s2"},
    {"task": "Bo", "text": "Smørbrød\u2028på æ", "doc_id": "1.0"},
]
EXPECTED = [{"task": row["task"], "text": row["text"], "group": row["doc_id"]} for row in ROWS]


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path_factory, monkeypatch):
    """Tables that `datasets.load_dataset` reads are cached with the test, not in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, name):
    """ROWS under the file name (or folder form) `name`; returns what `read_table` takes."""
    frame, target = pd.DataFrame(ROWS), path / name
    if name.startswith(("t.csv", "t.tsv")):
        frame.to_csv(target, index=False, sep="\t" if "tsv" in name else ",")
    elif name.startswith("t.jsonl"):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
        target.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    elif name == "t.parquet":
        frame.to_parquet(target)
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(target)
    elif name == "saved_dict":
        parts = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])}
        datasets.DatasetDict(parts).save_to_disk(target)
    elif name == "data_files":
        target.mkdir()
        frame.to_parquet(target / "train.parquet")
    return target


FILES = ["t.csv", "t.csv.gz", "t.tsv", "t.tsv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet"]


@pytest.mark.parametrize("name", [*FILES, "saved", "saved_dict", "data_files"])
def test_every_form_on_disk_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path, name)
    for source in (path, str(path)):
        result, notes = read_table(source)
        assert [{key: row[key] for key in EXPECTED[0]} for row in result] == EXPECTED
        assert ("split" in result.column_names) == (name == "saved_dict")
        assert notes == ([f"folder {str(path)!r} has the split 'train' alone"] if name == "data_files" else [])


@pytest.mark.parametrize("form", [pd.DataFrame, datasets.Dataset.from_list, table])
def test_every_form_in_memory_gives_the_same_rows(form):
    assert read_table(form(ROWS))[0].to_list() == EXPECTED


def test_builtin_documentation():
    result, _ = read_table("builtin:documentation")
    assert result.column_names == ["task", "text", "group"]
    assert len(set(result["task"])) > 10
    assert len(set(result["group"])) < len(result)


def test_csv_with_byte_order_mark(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("\ufefftask,text\r\na,b\r\n".encode())
    assert read_table(path)[0].to_list() == [{"task": "a", "text": "b", "group": "row 1"}]


def test_groups_without_a_column_are_rows_of_the_source():
    frame = pd.DataFrame({"task": ["a"] * 3, "text": ["x", "", "y"], "speech": ["s", "s", None]})
    assert read_table(frame)[0]["group"][:] == ["row 1", "row 3"]
    assert read_table(frame, group_column="speech")[0]["group"][:] == ["s", "row 3"]


def test_other_column_names_and_numbers_as_tasks():
    frame = pd.DataFrame({"customer": [3, 3.0, np.nan, 4.5], "review": ["w", "x", "y", "z"]})
    result, notes = read_table(frame, task_column="customer", text_column="review")
    assert result["task"][:] == ["3", "3", "4.5"]
    assert notes == ["1 document with no task was dropped"]


def test_empty_texts_are_dropped_and_counted(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"task": "a", "text": "x"}\n{"task": "a", "text": " \\n"}\n{"task": "a", "text": null}\n{"task": "a"}\n')
    result, notes = read_table(path)
    assert result["text"][:] == ["x"]
    assert notes == ["3 documents with empty text were dropped"]


def test_splits_of_a_dataset_dict_are_kept(tmp_path):
    path = write(tmp_path, "saved_dict")
    for options in ({}, {"split_column": "split"}):
        assert read_table(path, **options)[0]["split"][:] == ["train", "train", "test"]
    table, _ = read_table(path, hub_split="test")
    assert (table.column_names, len(table)) == (["task", "text", "group"], 1)


def test_splits_of_data_files_are_known_by_their_usual_names(tmp_path):
    for name, rows in (("train", ROWS[:2]), ("dev", ROWS[2:])):
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    assert read_table(tmp_path)[0]["split"][:] == ["train", "train", "validation"]
    assert len(read_table(tmp_path, hub_split="train")[0]) == 2


def test_splits_of_other_names_are_read_one_at_a_time():
    part = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict({"train_sft": part, "test_sft": part})
    with pytest.raises(InputError, match=r"the splits 'train_sft', 'test_sft', and 'train_sft' stands for none of .*hub_split"):
        read_table(both)
    assert len(read_table(both, hub_split="test_sft")[0]) == len(EXPECTED)
    with pytest.raises(InputError, match=r"hub_split is 'test_stf'; .*did you mean 'test_sft'"):
        read_table(both, hub_split="test_stf")
    with pytest.raises(InputError, match=r"hub_split is 'train', but the DataFrame has no splits; leave it out"):
        read_table(pd.DataFrame(ROWS), hub_split="train")


# no compression, so that the text stands in it as it is
PARQUET = pd.DataFrame({"task": ["a"], "text": ["café"]}).to_parquet(compression=None)

BAD_FILES = [
    (
        "t.csv",
        b"task,text\na,caf\xe9\n",
        r"not UTF-8: byte 0xe9 in line 2 \(position 15 of the file\); save the file as UTF-8, or .*--encoding latin-1",
    ),
    (
        "t.jsonl",
        b'{"task": "a", "text": "\xe9"}',
        r"not UTF-8: byte 0xe9 in line 1 \(position 23 of the file\); save the file as UTF-8",
    ),
    ("t.csv", b"", r"is empty; give a header line"),
    ("t.csv", b"task,text\n", r"has no rows; give one document a row"),
    ("t.csv", b"task,text\na,b,c\n", r"line 2: 3 cells where the header has 2 \(separated by commas\); .*double quotes"),
    ("t.csv", b"task,text\na,b\na,b,c\n", r"line 3: 3 cells where the header has 2 .*double quotes"),
    ("t.csv", b"task,text\na,b\na\n", r"line 3: 1 cell where the header has 2 .*write all cells of the row, also empty ones"),
    ("t.csv", b'task,text\na,b\na,"b\n', r"line 3: a quote opens a cell and is never closed; .*twice, or give --quoting none"),
    ("t.csv", b"task,txt\na,b\n", r"has no column 'text' \(text_column\); its columns are task, txt; did you mean 'txt'\?"),
    ("t.csv", b"Task,text\na,b\n", r"has no column 'task' \(task_column\); .*did you mean 'Task'\?"),
    ("t.csv", b"task,text\na,\n", r"has no document with a task and a text: 1 document with empty text was dropped"),
    ("t.csv.gz", b"task,text\n", r"is not a whole gzip file .*compress it again"),
    ("t.csv.gz", gzip.compress(b"task,text\na,b\n", mtime=0)[:-9], r"is not a whole gzip file"),
    ("t.jsonl", b'{"task": "a", "text": "b"}\n{"task": "a",\n', r"line 2: not JSON \(.*\); write one JSON object a line"),
    ("t.jsonl", b'["a", "b"]\n', r"line 1: a JSON list; write one JSON object a line"),
    ("t.jsonl", b"\n", r"has no rows"),
    ("t.jsonl", b'{"task": "a", "text": "b"}\n{"task": "a", "text": 7}', r"line 2: column 'text' is a int \(7\), not text"),
    ("t.jsonl", b'{"task": ["a"], "text": "b"}', r"line 1: column 'task' is a list .*give text or a number"),
    ("t.jsonl", b'{"task": "a", "text": "\\ud800b"}', r"line 1: column 'text' has half a surrogate pair, '\\ud800'"),
    ("t.jsonl", b'{"task": "\\udfff", "text": "b"}', r"line 1: column 'task' has half a surrogate pair"),
    ("t.jsonl", b'{"task": "a", "text": "b", "\\ud800": 1}', r"a column's name has half a surrogate pair"),
    ("t.jsonl", b"[" * 100_000, r"line 1: not JSON \(RecursionError"),
    ("t.jsonl", b'{"task": 1' + b"0" * 5000 + b"}", r"line 1: not JSON \(ValueError: Exceeds the limit"),
    ("t.csv", b"task,te\x1b[2Jxt\na,b\n", r"its columns are task, te\\x1b\[2Jxt"),
    ("t.csv", ",".join(f"c{n}" for n in range(99)).encode() + b"\nb" + b"," * 98, r"c18, c19 and 79 more"),
    ("t.parquet", b"no parquet", r"is not a parquet file"),
    ("t.parquet", PARQUET.replace(b"caf\xc3\xa9", b"caf\xc3\xc3"), r"is not a parquet file .*UTF8"),
    ("t.parquet", PARQUET[:-20], r"is not a parquet file"),
    ("t.doc", b"", r"ending that is not known; use one of \.csv, \.tsv, \.jsonl,"),
    ("t.jsnl", b"", r"ending that is not known; .*did you mean '\.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_file_gives_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_column_that_stands_twice():
    frame = pd.DataFrame([["a", "b", "c"]], columns=["task", "text", "text"])
    with pytest.raises(InputError, match=r"has column 'text' 2 times \(text_column\)"):
        read_table(frame)


@pytest.mark.parametrize("cell", [["train"], 1, None, {"train": 1}])
def test_a_split_that_is_no_text(cell):
    data = datasets.Dataset.from_list([{"task": "a", "text": "b", "split": cell}])
    with pytest.raises(InputError, match=r"row 1: column 'split' is .*; allowed: train, validation, test"):
        read_table(data, split_column="split")
    with pytest.raises(InputError, match=r"row 1: column 'split' is .*; allowed: train, validation, test"):
        read_table(data.to_pandas(), split_column="split")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_column": "doc"}, r"no column 'doc' \(group_column\); its columns are task, text, doc_id; did you mean 'doc_id'"),
        ({"split_column": "split"}, r"no column 'split' \(split_column\)"),
        ({"split_column": "task"}, r"row 1: column 'task' is 'Ada'; allowed: train, validation, test"),
    ],
)
def test_bad_column_gives_one_line(options, message):
    with pytest.raises(InputError, match=message):
        read_table(pd.DataFrame(ROWS), **options)


def test_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "t.csv")
    for source in (tmp_path / "u.csv", str(tmp_path / "u.csv")):
        with pytest.raises(InputError, match=r"u\.csv' does not exist; check the path; did you mean 't\.csv'\?"):
            read_table(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:documentaton", r"not built in; there is builtin:documentation; did you mean"),
        (7, r"data is a int; give a path, several paths, a hub id"),
        (ROWS, r"data is a list; .*table\(rows\)"),
        ("no/such/folder", r"'no/such/folder' does not exist"),
    ],
)
def test_bad_source_gives_one_line(source, message):
    with pytest.raises(InputError, match=message):
        read_table(source)


def test_folder_without_data_gives_one_line(tmp_path):
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))) as caught:
        read_table(tmp_path)
    assert "\n" not in str(caught.value)
