"""What readers once read wrongly, each with its right value: quotes, ids, encodings, separators, containers, names."""

from __future__ import annotations

import contextlib
import gzip
import json

import datasets
import numpy as np
import pandas as pd
import pytest

from bora_pyro.data import load_tasks
from bora_pyro.data.files import read_file
from bora_pyro.data.readers import ReadingOptions, open_source
from bora_pyro.data.tables import read_table
from bora_pyro.errors import InputError
from tests.data.written import COMPRESS, excel, parquet, zipped
from tests.data_fixtures import WORDS, word_tokenizer


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cells(source, **options):
    return [row for _, row in open_source(source, ReadingOptions(**options))]


def refusal(source, **options):
    with pytest.raises(InputError) as caught:
        list(open_source(source, ReadingOptions(**options)))
    assert str(caught.value).isprintable()
    return str(caught.value)


# Quotes


STRAY = "task\ttext\n" + "".join(
    f"{'ab'[n % 2]}\t{text}\n"
    for n, text in enumerate(['"Hello, she said', "one", "two", 'a screen of 5"', "three", '"whole"', "four", 'in "the" middle'])
)


def test_a_stray_quote_does_not_swallow_rows(tmp_path):
    path = write(tmp_path, "t.tsv", STRAY)
    assert "line 2: a quote opens a cell that holds line 3, which looks like a row by itself" in refusal(path)
    table, _ = read_table(path, reading=ReadingOptions(quoting="none"))
    assert len(table) == 8
    assert table["text"][:][0] == '"Hello, she said'
    assert table["text"][:][5] == '"whole"'
    # the user may insist that the quotes are right; then a note counts the cells
    raw = open_source(path, ReadingOptions(quoting="minimal"))
    assert len(list(raw)) == 5
    assert [note.partition(": ")[2] for note in raw.notes] == [
        "a quoted cell goes over lines of which each has as many cells as a row: check that no quote is stray (first in line 2)"
    ]


SPEECH = 'Mr President,\n\nI rise, today, to speak.\nThank you, all; "hear, hear", they said.\nAda, come here.\n'


def test_a_speech_of_several_paragraphs_is_read(tmp_path):
    for columns in (["task", "text"], ["text", "task"]):
        frame = pd.DataFrame({"task": ["Ada Byron", "Bo"] * 3, "text": [SPEECH, "Yes, please.\nNo.", "Hm."] * 2})[columns]
        for separator in (",", ";", "\t"):
            path = tmp_path / "t.csv"
            frame.to_csv(path, index=False, sep=separator)
            assert cells(path) == frame.to_dict("records")


def test_rows_of_numbers_that_a_quote_swallows(tmp_path):
    # no task stands twice, but the first column holds numbers alone
    path = write(tmp_path, "t.csv", 'id,text\n1,a\n2,"b\n3,c\n4,5"\n5,d\n')
    assert "line 3: a quote opens a cell that holds line 4" in refusal(path)
    path = write(tmp_path, "t.csv", 'name,text\nx,a\ny,"b\nthen, c\nso, 5"\nz,d\n')
    raw = open_source(path)
    assert len(list(raw)) == 3
    assert "(first in line 3)" in raw.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('task,text\na,"b" c\n', "line 2: text follows a closing quote, of a cell whose quote opens in line 2"),
        ('task,text\na,x\nb,"y\nz" c\n', "line 4: text follows a closing quote, of a cell whose quote opens in line 3"),
        ('task,text\na,"x\ny"\nb,"z\n\n\n', "line 4: a quote opens a cell and is never closed"),
        ('task,text\na,"x\ny",z\n', "lines 2 to 3: 3 cells where the header has 2"),
        ('task,text\na,"x\ny"\n\nb\n', "line 5: 1 cell where the header has 2"),
        ("task,text\na,x\nb,y\0\n", "has a NUL byte in its text"),
        ("task,text,task\na,x,b\n", "has the column 'task' 2 times"),
        ('"task,text\n', "line 1: a quote opens a cell and is never closed"),
        ("sep=;\ntask;text\na;b\n", "its first line, 'sep=;', only names the separator; remove that line"),
    ],
)
def test_malformed_rows_are_named_by_their_line(tmp_path, content, message):
    assert message in refusal(write(tmp_path, "t.csv", content))


def test_a_quote_within_a_cell_is_text(tmp_path):
    path = write(tmp_path, "t.csv", 'task,text\na,5" screen\nb,say "hi" now\n"c ""d""","e, ""f"""\n')
    assert [row["text"] for row in cells(path)] == ['5" screen', 'say "hi" now', 'e, "f"']


def test_lines_end_in_any_way_and_blank_ones_are_counted(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        path = write(tmp_path, "t.csv", end.join(["task,text", "a,b", "", " ", "c,d", "", ""]))
        raw = open_source(path)
        assert list(raw) == [("line 2", {"task": "a", "text": "b"}), ("line 5", {"task": "c", "text": "d"})]
        assert raw.notes == [f"file {str(path)!r}: 2 blank lines were left out"]


def test_a_cell_may_be_long(tmp_path):
    text = "word, " * 100_000
    path = write(tmp_path, "t.csv", f'task,text\na,"{text}"\n')
    assert cells(path) == [{"task": "a", "text": text}]


# Separators, encodings, headers


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "pipes")])
def test_another_separator_is_found_in_the_header(tmp_path, separator, name):
    for quote in ("", '"'):
        rows = [["task", "text"], ["a", "1,5 and 2,5"], ["b", "x"]]
        path = write(tmp_path, "t.csv", "".join(separator.join(f"{quote}{cell}{quote}" for cell in row) + "\n" for row in rows))
        raw = open_source(path)
        assert [row["text"] for _, row in raw] == ["1,5 and 2,5", "x"]
        assert raw.notes == [f"file {str(path)!r} is separated by {name}, as its header shows"]
    assert cells(path, separator={";": "semicolon", "\t": "tab", "|": "pipe"}[separator])[1] == {"task": "b", "text": "x"}


def test_a_separator_that_does_not_fit_is_asked_for(tmp_path):
    path = write(tmp_path, "t.csv", "task;text\na;b;c\n")
    assert "its header is one cell, 'task;text', and its rows have other numbers of cells; give the separator" in refusal(path)
    assert cells(write(tmp_path, "t.csv", "text\na;b\n")) == [{"text": "a;b"}]
    for separator in ("", "ab", "x", '"', "semi"):
        with pytest.raises(InputError, match="separator is"):
            ReadingOptions(separator=separator).validate()


def test_encodings(tmp_path):
    text = "task,text\nå,bär\n"
    path = write(tmp_path, "t.csv", text.encode("latin-1"))
    message = "is not UTF-8: byte 0xe5 in line 2 (position 10 of the file); save the file as UTF-8, or give its encoding, as in"
    assert message in refusal(path)
    assert cells(path, encoding="latin-1") == [{"task": "å", "text": "bär"}]
    for encoding, mark in (("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-8-sig", None)):
        raw = open_source(write(tmp_path, "t.csv", text.encode(encoding)))
        assert [row for _, row in raw] == [{"task": "å", "text": "bär"}]
        assert raw.notes == ([f"file {str(path)!r} is read as {mark}, as the mark at its start says"] if mark else [])
    assert "NUL byte" in refusal(write(tmp_path, "t.csv", "task,text\na,b\n".encode("utf-16-le")))
    assert cells(path, encoding="utf-16-le") == [{"task": "a", "text": "b"}]
    path = write(tmp_path, "t.csv", text.encode("utf-8-sig"))
    assert "encoding is latin-1, but the mark at its start says UTF-8; leave encoding out" in refusal(path, encoding="latin-1")
    assert cells(write(tmp_path, "t.csv", ("\ufeff" + text).encode("utf-16-be")), encoding="utf-16-be")[0]["task"] == "å"
    for encoding in ("ascii", "idna", "punycode", "utf-7", "undefined", "cp1252", "utf-16", "gb18030"):
        with contextlib.suppress(InputError):  # one line, or a table of wrong letters that the user asked for
            cells(write(tmp_path, "t.csv", text), encoding=encoding)
    with pytest.raises(InputError, match=r"encoding is 'utf8x', which is not known; .*did you mean 'utf-8'"):
        ReadingOptions(encoding="utf8x").validate()
    with pytest.raises(InputError, match="encoding is 'hex'"):
        ReadingOptions(encoding="hex").validate()


def test_a_byte_far_into_a_file_is_named(tmp_path):
    raw = "task,text\n" + "å,bär\n" * 300_000
    path = write(tmp_path, "t.csv", raw.encode() + b"\xe5,b\n")
    assert f"byte 0xe5 in line 300002 (position {len(raw.encode())} of the file)" in refusal(path)


def test_tables_without_a_header(tmp_path):
    path = write(tmp_path, "t.csv", "a,Hello.\nb,Hi.\n")
    table, notes = read_table(path, task_column="1", text_column="column2", reading=ReadingOptions(header=False))
    assert table.to_list() == [{"task": "a", "text": "Hello.", "group": "row 1"}, {"task": "b", "text": "Hi.", "group": "row 2"}]
    assert notes == [f"file {str(path)!r} is read without a header; its columns are column1 to column2"]


OTHERS = [
    ("t.csv", gzip.compress(b"task,text\n"), "its first bytes are those of a gzip file; name it 't.csv.gz'"),
    ("t.jsonl", COMPRESS[".zst"](b"{}", ""), "those of a zstd file; name it 't.jsonl.zst'"),
    ("t.tsv", COMPRESS[".bz2"](b"{}", ""), "those of a bzip2 file; name it 't.tsv.bz2'"),
    ("t.json", COMPRESS[".xz"](b"{}", ""), "those of an xz file; name it 't.json.xz'"),
    ("t.csv", zipped(b"a", "t.csv"), "those of a zip file; name it 't.csv.zip'"),
    ("t.csv", parquet([{"a": 1}]), "those of a parquet file; name it 't.parquet'"),
    ("t.csv", excel([["a"]], ["b"]), "those of a spreadsheet or another office file; name it 't.xlsx'"),
    ("t.csv", b"%PDF-1.7", "those of a PDF document"),
    ("t.csv.gz", gzip.compress(gzip.compress(b"a")), "those of a gzip file, inside its compression"),
    ("t.csv.gz", b"task,text\n", "is not a whole gzip file"),
    ("t.csv.bz2", b"task,text\n", "is not a whole bzip2 file"),
    ("t.csv.xz", b"task,text\n", "is not a whole xz file"),
    ("t.csv.zst", b"task,text\n", "is not a whole zstd file"),
    ("t.csv.zip", b"task,text\n", "is not a whole zip file"),
    ("t.csv.zst", COMPRESS[".zst"](b"task,text\n" * 100, "")[:-3], "is not a whole zstd file"),
    ("t.xlsx", b"task,text\n", "is no spreadsheet that can be read"),
    ("t.xls", b"task,text\n", "has an ending that is not known; use one of .csv"),
]


# ids of their own: compressed bytes hold the time at which they were made, which differs between processes
@pytest.mark.parametrize(("name", "content", "message"), OTHERS, ids=[f"{n} {case[0]}" for n, case in enumerate(OTHERS)])
def test_bytes_that_are_no_text_are_recognised(tmp_path, name, content, message):
    assert message in refusal(write(tmp_path, name, content))


def test_a_zip_file_of_one_file(tmp_path):
    assert cells(write(tmp_path, "a.zip", zipped(b"task;text\na;b\n", "x/t.csv"))) == [{"task": "a", "text": "b"}]
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.csv", "task,text\na,b\n")
        file.writestr("b.csv", "task,text\na,b\n")
    assert "holds 2 files" in refusal(write(tmp_path, "two.zip", buffer.getvalue()))


# Values


def test_ids_of_64_bits_stay_exact_where_one_is_missing(tmp_path):
    ids = [2**53 + 1, 2**53, None, 2**63 - 1]
    rows = [{"task": one, "text": f"t{n}"} for n, one in enumerate(ids)]
    names = [str(one) for one in ids if one is not None]
    sources = [
        write(tmp_path, "t.parquet", parquet(rows)),
        write(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        write(tmp_path, "t.csv", "task,text\n" + "".join(f"{one if one else ''},t{n}\n" for n, one in enumerate(ids))),
        pd.DataFrame({"task": pd.array(ids, dtype="Int64"), "text": [row["text"] for row in rows]}),
        datasets.Dataset.from_list(rows),
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in (*sources, tmp_path / "saved"):
        assert read_table(source)[0]["task"][:] == names
    # pandas has rounded these already, and two tasks would be one
    with pytest.raises(
        InputError, match=r"row 1: column 'task' is the number 9\.0072e\+15, stored with a decimal .*dtype str or"
    ):
        read_table(pd.DataFrame({"task": [2**53 + 1, None], "text": ["a", "b"]}))
    assert read_table(pd.DataFrame({"task": [7, None], "text": ["a", "b"]}))[0]["task"][:] == ["7"]


def test_cells_of_a_folder_are_those_of_the_file_alone(tmp_path):
    text = "task,text\n007,NA\n1e5,null\nNA,true\n"
    alone, folder = write(tmp_path, "t.csv", text), tmp_path / "folder"
    write(folder, "data.csv", text)
    write(folder, "more.jsonl.gz", gzip.compress(b'{"task": "008", "text": "x"}\n'))
    expected = [{"task": "007", "text": "NA"}, {"task": "1e5", "text": "null"}, {"task": "NA", "text": "true"}]
    assert cells(alone) == expected
    assert cells(folder) == [*expected, {"task": "008", "text": "x"}]


def test_a_data_set_with_a_card_and_one_of_the_hub_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    write(folder, "a.csv", "task,text\n007,NA\n")
    write(folder, "b.csv", "task,text\n008,null\n")
    listed = "[{split: train, path: a.csv}, {split: dev, path: b.csv}]"
    write(folder, "README.md", f"---\nconfigs:\n- config_name: x\n  data_files: {listed}\n---\n")
    expected = [{"task": "007", "text": "NA", "split": "train"}, {"task": "008", "text": "null", "split": "validation"}]
    assert cells(folder) == expected
    builder = datasets.load_dataset_builder(str(folder))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    for whole in (True, False):
        raw = open_source("someone/corpus", whole=whole)
        assert [row for _, row in raw] == expected
        assert raw.has_splits
    assert [row for _, row in open_source("someone/corpus", hub_split="dev")] == [{"task": "008", "text": "null"}]


def test_structure_is_kept(tmp_path):
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi."}, {"type": "text", "text": None}]}]
    rows = [{"task": "a", "messages": chat, "meta": {"n": [1, None]}}]
    for source in (write(tmp_path, "t.parquet", parquet(rows)), write(tmp_path, "t.json", json.dumps(rows))):
        assert cells(source) == rows


def test_nested_columns(tmp_path):
    rows = [{"meta": {"speaker": {"name": n}, "a.b": 1}, "body.text": "exact", "body": {"text": "nested"}} for n in ("Ada", None)]
    path = write(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    table, notes = read_table(path, task_column="meta.speaker.name", text_column="body.text")
    assert table.to_list() == [{"task": "Ada", "text": "exact", "group": "row 1"}]
    assert notes == ["1 document with no task was dropped"]
    assert read_table(datasets.Dataset.from_list(rows), task_column="meta.speaker.name", text_column="body.text")[0]["task"][
        :
    ] == ["Ada"]
    with pytest.raises(InputError, match=r"line 1: column 'body\.text' is a str \('exact'\), in which 'body\.text\.x' is not"):
        read_table(path, task_column="meta.speaker.name", text_column="body.text.x")
    with pytest.raises(InputError, match=r"no column 'mta\.speaker' \(task_column\)"):
        read_table(path, task_column="mta.speaker", text_column="body.text")


# JSON


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.json", '[{"task": "a"}, {"text": "b"}]', [{"task": "a", "text": None}, {"task": None, "text": "b"}]),
        ("t.json", '{"task": "a"}\n{"text": "b"}\n', [{"task": "a", "text": None}, {"task": None, "text": "b"}]),
        ("t.json", ' {"version": 1, "data": [{"task": "a"}]} ', [{"task": "a"}]),
        ("t.ndjson", '{"task": true}\n', [{"task": True}]),
        ("t.json", "[]", []),
    ],
)
def test_json_of_every_shape(tmp_path, name, content, expected):
    assert cells(write(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"task": "a"}\n{"task": "a", "task": "b"}\n', "line 2: the key 'task' stands twice in one object"),
        ("t.json", '[{"task": "a"},\n{"text": {"b": 1, "b": 2}}]', "line 2: the key 'b' stands twice in one object"),
        ("t.jsonl", '[{"task": "a"}]', "a JSON list; write one JSON object a line"),
        ("t.jsonl", "[\n{}]", "line 1: not JSON (Expecting value); write one JSON object a line; for a list of objects name"),
        ("t.json", '[{"task": "a"}\n{"task": "b"}]', "the list is not closed after item 1 (line 1)"),
        ("t.json", '[{"task": "a"}', "the list is not closed after item 1"),
        ("t.json", "[1]", "line 1: item 1 is a JSON number"),
        ("t.json", '[{"a": 1}] x', "line 1: text follows the list"),
        ("t.json", '{"task": {"0": "a"}}', "is a JSON object with task; give a list of objects"),
        ("t.json", "x", "line 1: not JSON"),
        ("t.json", "", "is empty"),
    ],
)
def test_bad_json_gives_one_line(tmp_path, name, content, message):
    assert message in refusal(write(tmp_path, name, content))


# Spreadsheets


def test_cells_of_a_spreadsheet(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    for row in (["task", "text", "n"], ["007", 'Hi, "x"\ny', 7], [7, "NA", 7.5], [None, None, None], [8, "b", True]):
        sheet.append(row)
    sheet["A3"].number_format = "000"
    sheet["C6"] = pd.Timestamp("2001-02-03").to_pydatetime()
    book.create_sheet("more").append(["x"])
    book.save(tmp_path / "t.xlsx")
    raw = open_source(tmp_path / "t.xlsx")
    assert list(raw) == [
        ("row 2", {"task": "007", "text": 'Hi, "x"\ny', "n": "7"}),
        ("row 3", {"task": "007", "text": "NA", "n": "7.5"}),
        ("row 5", {"task": "8", "text": "b", "n": "TRUE"}),
        ("row 6", {"task": "", "text": "", "n": "2001-02-03"}),
    ]
    assert [note.partition(": ")[2] for note in raw.notes] == [
        "the first sheet, 'Sheet', is read; left out: more",
        "1 date is read as yyyy-mm-dd",
    ]
    sheet["B5"] = "=A5"
    book.save(tmp_path / "t.xlsx")
    assert "row 5: cell B5 is a formula without a stored value; open and save the file once" in refusal(tmp_path / "t.xlsx")


# Several files


def test_several_files_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.csv", "task,text\nada,one\n")
    write(tmp_path, "logs/x.jsonl", '{"text": "two", "task": "bo"}\n{"task": "bo"}\n')
    write(tmp_path, "logs/y.jsonl", '{"task": ["bo"], "text": "three"}\n')
    raw = open_source(["a.csv", "logs/x*.jsonl"])
    assert [place for place, _ in raw] == ["file 'a.csv', line 2", "file 'logs/x.jsonl', line 1", "file 'logs/x.jsonl', line 2"]
    with pytest.raises(InputError, match=r"file 'logs/y\.jsonl', line 1: column 'task' is a list"):
        read_table(["a.csv", "logs/*.jsonl"])
    assert read_table("logs/x.*")[0]["text"][:] == ["two"]
    write(tmp_path, "b.csv", "task,txt\nada,one\n")
    assert "file 'b.csv' has the column 'txt', which file 'a.csv' has not" in refusal(["a.csv", "b.csv"])
    write(tmp_path, "logs/z.jsonl", '{"task": "a", "txt": "b"}\n')
    with pytest.raises(InputError, match=r"file 'logs/z\.jsonl' has no column 'text'; it has task, txt; did you mean 'txt'"):
        read_table(["a.csv", "logs/z.jsonl"])
    for source, message in (
        ("logs/*.csv", "no file fits the pattern 'logs/*.csv'"),
        (["a.csv", "a.csv"], "names the file 'a.csv' twice"),
        (["a.csv", "builtin:documentation"], "among several sources"),
        (["a.csv", "c.csv"], "file 'c.csv' does not exist"),
        ("x" * 5000, "does not exist"),
        ("x/" * 5000, "does not exist"),
        ("a\0.csv", "does not exist"),
    ):
        assert message in refusal(source)


def test_a_file_or_a_folder_is_a_task(tmp_path):
    for name, text in (("ada/1.txt", "One.\nTwo."), ("ada/2.md", "Three."), ("bo/1.txt", "Four.")):
        write(tmp_path, f"speakers/{name}", text)
    write(tmp_path, "speakers/README.md", "No document.")
    write(tmp_path, "speakers/notes.docx", "x")
    raw = open_source(tmp_path / "speakers", ReadingOptions(task_from="file"))
    assert [row for _, row in raw] == [
        {"text": "One.\nTwo.", "task": "ada"},
        {"text": "Three.", "task": "ada"},
        {"text": "Four.", "task": "bo"},
    ]
    assert raw.notes == [f"{str(tmp_path / 'speakers')!r}: files of other kinds are left out: notes.docx"]
    write(tmp_path, "tables/eve.v2.jsonl", '{"text": "a", "task": "x"}\n')
    write(tmp_path, "tables/test.csv.gz", gzip.compress(b"text\nb\n"))
    table, notes = read_table(tmp_path / "tables", reading=ReadingOptions(task_from="file"))
    assert [(row["task"], row["text"]) for row in table] == [("eve.v2", "a"), ("test", "b")]
    assert len(notes) == 1
    assert "the column 'task' is not read, since task_from is file" in notes[0]
    assert read_table(tmp_path / "tables", reading=ReadingOptions(task_from="folder"))[0]["task"][:] == ["tables", "tables"]
    assert "holds no tables (if its .txt and .md files are documents, and their folders" in refusal(tmp_path / "speakers")
    assert "is plain text; if it is one document" in refusal(tmp_path / "speakers" / "ada" / "1.txt")
    assert cells(write(tmp_path, "t.txt", "task\ttext\na\tb\n"), separator="tab") == [{"task": "a", "text": "b"}]


def test_splits_in_the_names_of_files(tmp_path):
    for side in ("train", "dev", "test"):
        write(tmp_path, f"{side}/ada.csv", "text\na\n")
    raw = open_source(tmp_path, ReadingOptions(task_from="file"))
    assert [(row["task"], row["split"]) for _, row in raw] == [("ada", side) for side in ("train", "validation", "test")]
    assert raw.has_splits
    raw = open_source([tmp_path / "train" / "ada.csv", tmp_path / "test" / "ada.csv"])
    assert [row["split"] for _, row in raw] == ["train", "test"]
    write(tmp_path, "more.csv", "text\na\n")
    assert "has files named for a split, such as 'dev/ada.csv', and others, such as 'more.csv'" in refusal(tmp_path)
    (tmp_path / "one").mkdir()
    write(tmp_path, "one/train-00000.csv", "text\na\n")
    assert not open_source(tmp_path / "one").has_splits


# Names


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["true", True], None),
        (["True", True], "'True', 'true'"),
        (["\u00e9", "e\u0301"], r"'e\u0301', '\xe9'"),
        (["Ada", "ada"], "'Ada', 'ada'"),
        (["a b", "a  b", "a\u200b b"], r"'a  b', 'a b', 'a\u200b b'"),
        (["7", "007", 7.0], "'007', '7'"),
        (["7", "7.5"], None),
        (["ada", "bo"], None),
    ],
)
def test_tasks_whose_names_look_alike_are_named(names, note):
    frame = pd.DataFrame({"task": pd.Series(names, dtype=object), "text": "x"})
    table, notes = read_table(frame)
    assert notes == ([f"tasks whose names look alike are different tasks: {note}"] if note else [])
    assert len(set(table["task"])) == len({"true" if name is True else "7" if name == 7.0 else name for name in names})


def test_long_names_are_cut_short():
    long = "x" * 2600
    frame = pd.DataFrame({"task": [long, long.upper()], "text": ["a", "b"]})
    _, notes = read_table(frame)
    assert len(notes[0]) < 250
    with pytest.raises(InputError) as caught:
        read_table(pd.DataFrame({"task": [[long]], "text": ["a"]}))
    assert len(str(caught.value)) < 250
    with pytest.raises(InputError) as caught:
        read_table(pd.DataFrame({"a": [f"{long} / b", long], "b": ["c", "b / c"], "text": ["a", "b"]}), task_column=["a", "b"])
    assert len(str(caught.value)) < 600


def test_numbers_of_numpy_are_names():
    frame = pd.DataFrame({"task": pd.Series([np.int64(2**60 + 1), np.float32(2), np.bool_(True)], dtype=object), "text": "x"})
    assert read_table(frame)[0]["task"][:] == ["1152921504606846977", "2", "true"]


def test_small_tables_are_read_by_the_same_reader(tmp_path):
    path = write(tmp_path, "w.csv", "task;weight\n007;2\n")
    assert read_file(path).to_dict("records") == [{"task": "007", "weight": "2"}]


def test_reading_options_reach_a_fit(tmp_path):
    lines = "".join(f"{task}|{WORDS[n % 6]} {WORDS[n % 5]}\n" for n in range(6) for task in "ab")
    path = write(tmp_path, "t.txt", lines.encode("utf-16-le"))
    options = {"separator": "pipe", "encoding": "utf-16-le", "header": False, "task_column": "1", "text_column": "2"}
    for streaming in (True, False):
        data = load_tasks(path, word_tokenizer(), streaming=streaming, **options)
        assert (data.tasks, data.counts.rows) == (["a", "b"], 12)
    with pytest.raises(InputError, match="task_from is file and task_column is '1'; give one of them"):
        load_tasks(path, word_tokenizer(), task_from="file", **options)
