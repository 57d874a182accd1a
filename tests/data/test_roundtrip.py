"""Small tables of known contents, written in every way: what is read is what was written, or a line says which row and why."""

from __future__ import annotations

import csv
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bora_pyro.data.readers import ReadingOptions, open_source
from bora_pyro.errors import InputError
from tests.data.written import COMPRESS, dataset, delimited, excel, frame, json_lines, json_list, parquet

# the same tables on every machine
tables_of = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

# Cells that readers change: names that look like numbers, truth values, missing values, and texts that look like rows.
NAMES = st.sampled_from(
    ["ada", "Bo", "007", "7", "NA", "null", "true", "True", "1e5", "-0", "1.0", "nan", "2001-02-03", "\u00e9", "e\u0301"]
)
PIECES = st.sampled_from(
    [",", ";", "\t", "|", '"', '""', "'", "\\", "\n", "\r\n", "a", "b c", "ada,Hi", "Bo;", "7\tx", "#", "é", "東", "\u2028",
     "\u200b", " ", "=1+1", "NA", "{", "[", "\ufeff"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=5).map("".join)
ROWS = st.lists(st.fixed_dictionaries({"id": NAMES, "task": NAMES, "text": TEXTS}), min_size=1, max_size=5)
COLUMNS = ["id", "task", "text"]


def read(source, **options):
    raw = open_source(source, ReadingOptions(**options))
    found = [cells for _, cells in raw]
    assert raw.num_rows == len(found)
    return found, raw.notes


def read_bytes(raw, name, **options):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(raw)
        return read(file, **options)


@settings(tables_of, max_examples=400)
@given(
    rows=ROWS,
    separator=st.sampled_from([",", ";", "\t", "|"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    packed=st.sampled_from(list(COMPRESS)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    stated=st.booleans(),
)
@example([{"id": "7", "task": "ada", "text": "Hi,\nBo,x,y"}], ",", csv.QUOTE_ALL, "\n", "", "utf-8", False)
def test_delimited_tables(rows, separator, quoting, line_end, packed, encoding, stated):
    text = delimited(rows, COLUMNS, separator, quoting, line_end)
    raw = COMPRESS[packed](text.encode(encoding), "t.csv")
    options = {"separator": separator} if stated else {}  # else it is found by the header
    found, notes, refused = None, [], ""
    try:
        found, notes = read_bytes(raw, f"t.csv{packed}", **options)
    except InputError as error:
        refused = str(error)
    if found is None:
        # a cell that holds a line like a row is refused by its line; if it holds other separators, the separator is asked for
        assert re.search(
            r"line \d+: a quote opens a cell that holds line \d+, which looks like a row|give the separator", refused
        )
        assert any("\n" in row["text"] for row in rows) or not stated
        found, notes = read_bytes(raw, f"t.csv{packed}", separator=separator, quoting="minimal")
    assert found == rows
    assert ("UTF-16" in " ".join(notes)) == (encoding == "utf-16")


@settings(tables_of, max_examples=200)
@given(rows=ROWS, separator=st.sampled_from(["\t", "|"]), packed=st.sampled_from(list(COMPRESS)))
def test_tables_without_quoting(rows, separator, packed):
    """Cells without line ends and separators need no quotes: every quote is text."""
    rows = [{name: re.sub(r"[\t|\r\n]", "", cell) for name, cell in row.items()} for row in rows]
    raw = COMPRESS[packed](delimited(rows, COLUMNS, separator, csv.QUOTE_NONE).encode(), "t.tsv")
    found, _ = read_bytes(raw, f"t.tsv{packed}", separator=separator, quoting="none")
    assert found == rows


@settings(tables_of, max_examples=200)
@given(rows=ROWS, separator=st.sampled_from([",", "\t"]), data=st.data())
def test_a_stray_quote_swallows_nothing(rows, separator, data):
    """A bare quote opens one cell and another one closes a later cell: a line names the place; as text both are read."""
    rows = [{**row, "text": re.sub(r'["\t,\r\n]', "", row["text"]) + "."} for row in [*rows, *rows]]
    first = data.draw(st.integers(0, len(rows) - 2))
    last = data.draw(st.integers(first + 1, len(rows) - 1))
    rows[first]["text"] = '"' + rows[first]["text"]
    rows[last]["text"] += data.draw(st.sampled_from(['"', '" x', ' ""', ""]))
    raw = delimited(rows, COLUMNS, separator, csv.QUOTE_NONE).encode()
    name = "t.tsv" if separator == "\t" else "t.csv"
    assert read_bytes(raw, name, quoting="none")[0] == rows
    with pytest.raises(InputError, match="--quoting none") as caught:
        read_bytes(raw, name)
    places = [int(place) for place in re.findall(r"lines? (\d+)", str(caught.value))]
    assert min(places) == 2 + first if "opens" in str(caught.value) else 2 + first in places


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


@settings(tables_of, max_examples=200)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["id", "task", "text", "meta"]), VALUES, min_size=1), min_size=1, max_size=4),
    form=st.sampled_from(["jsonl", "ndjson", "json", "lines in json"]),
    packed=st.sampled_from(list(COMPRESS)),
)
def test_json_tables(rows, form, packed):
    text = json_list(rows) if form == "json" else json_lines(rows)
    ending = "json" if "json" in form.split()[-1:] else form
    raw = COMPRESS[packed](text.encode(), f"t.{ending}")
    if form == "lines in json" and len(rows) == 1:  # one object alone may be anything
        with pytest.raises(InputError, match="give a list of objects") if not _has_rows(rows[0]) else nullcontext():
            read_bytes(raw, f"t.{ending}{packed}")
        return
    columns = dict.fromkeys(name for row in rows for name in row)
    assert read_bytes(raw, f"t.{ending}{packed}")[0] == [{**dict.fromkeys(columns), **row} for row in rows]


def _has_rows(row):
    lists = [value for value in row.values() if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)]
    return len(lists) == 1


TYPED = st.fixed_dictionaries(
    {
        "id": st.none() | st.integers(-(2**63), 2**63 - 1),
        "task": NAMES,
        "text": TEXTS,
        "score": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "parts": st.none() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.none() | TEXTS}), max_size=2),
    }
)


@settings(tables_of, max_examples=100)
@given(rows=st.lists(TYPED, min_size=1, max_size=5), packed=st.sampled_from(["", ".gz", ".zip"]))
@example([{"id": 2**60 + 1, "task": "a", "text": "b", "score": None, "parts": None}] * 2, "")
def test_tables_with_types(rows, packed):
    """Parquet, saved data sets and tables in memory keep types and structure; a missing cell changes no other one."""
    raw = COMPRESS[packed](parquet(rows), "t.parquet")
    assert read_bytes(raw, f"t.parquet{packed}")[0] == rows
    assert read(frame(rows))[0] == rows
    assert read(dataset(rows))[0] == rows


@settings(tables_of, max_examples=60)
@given(rows=ROWS)
def test_spreadsheets(rows):
    rows = [{name: re.sub(r"[\r\ufeff]", "", cell) for name, cell in row.items()} for row in rows]
    for row in rows:
        row["text"] = row["text"].lstrip("=").strip() or "x"  # a formula, and what a spreadsheet trims
    assert read_bytes(excel(rows, COLUMNS), "t.xlsx")[0] == rows


@settings(tables_of, max_examples=100)
@given(
    parts=st.lists(ROWS, min_size=2, max_size=3),
    forms=st.lists(st.sampled_from(["csv", "tsv.gz", "jsonl", "json", "parquet", "ndjson.zst"]), min_size=3, max_size=3),
    container=st.sampled_from(["paths", "pattern", "folder", "several folders"]),
    task_from=st.sampled_from(["column", "file", "folder"]),
)
def test_several_files(parts, forms, container, task_from):
    writers = {
        "csv": lambda rows: delimited(rows, COLUMNS, quoting=csv.QUOTE_ALL).encode(),
        "tsv": lambda rows: delimited(rows, COLUMNS, "\t", quoting=csv.QUOTE_ALL).encode(),
        "jsonl": lambda rows: json_lines(rows).encode(),
        "ndjson": lambda rows: json_lines(rows).encode(),
        "json": lambda rows: json_list(rows).encode(),
        "parquet": parquet,
    }
    with tempfile.TemporaryDirectory() as name:
        files, expected = [], []
        for number, (rows, form) in enumerate(zip(parts, forms, strict=False)):
            kind, _, packed = form.partition(".")
            file = Path(name, f"group{number % 2}", f"f{number}.{form}")
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(COMPRESS[f".{packed}" if packed else ""](writers[kind](rows), "x"))
            files.append(file)
            task = {"column": {}, "file": {"task": f"f{number}"}, "folder": {"task": file.parent.name}}[task_from]
            expected.append((file, [{**row, **task} for row in rows]))
        sources = {
            "paths": files,
            "pattern": f"{name}/*/f*",
            "folder": name,
            "several folders": sorted({str(file.parent) for file in files}),
        }
        if container != "paths":
            expected.sort(key=lambda pair: pair[0])
        found, _ = read(sources[container], quoting="minimal", task_from=task_from)
        assert found == [row for _, rows in expected for row in rows]


@settings(tables_of, max_examples=20)
@given(rows=ROWS, others=ROWS)
def test_saved_data_sets(rows, others):
    with tempfile.TemporaryDirectory() as name:
        dataset(rows).save_to_disk(Path(name, "one"))
        assert read(Path(name, "one"))[0] == rows
        datasets.DatasetDict({"dev": dataset(rows), "train": dataset(others)}).save_to_disk(Path(name, "two"))
        expected = [{**row, "split": "train"} for row in others] + [{**row, "split": "validation"} for row in rows]
        assert read(Path(name, "two"))[0] == expected
