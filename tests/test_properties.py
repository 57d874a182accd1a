"""What holds for any input: tables come back as they were written, names become safe, a configuration is itself again."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import string
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from bora_pyro.data.files import read_file
from bora_pyro.data.tables import read_table
from bora_pyro.errors import InputError
from bora_pyro.files.safe_yaml import dump_mapping, parse_mapping
from bora_pyro.files.slugs import task_slugs
from bora_pyro.options.command_line import parse_config, to_yaml
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig

# the same examples on every machine, however slow it is
quick = settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

# Tables

texts = st.text(st.characters(codec="utf-8"), max_size=12)
# no reader of csv can tell a NUL byte's place, nor a lone carriage return from a line's end
csv_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)
COLUMN = 'ö, "x"'


def tables_of(cells):
    return st.lists(st.fixed_dictionaries({"task": cells, "text": cells, COLUMN: cells}), min_size=1, max_size=4)


tables, csv_tables = tables_of(texts), tables_of(csv_texts)


def read_back(name, raw):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return read_file(file).to_dict("records")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
@quick
@given(csv_tables)
@example([{"task": "\ufeff", "text": "\x1a", COLUMN: "NA"}])
@example([{"task": "", "text": "", COLUMN: ""}])
def test_csv_comes_back(name, rows):
    separator = "\t" if "tsv" in name else ","
    raw = pd.DataFrame(rows).to_csv(index=False, sep=separator, quoting=1, lineterminator="\n").encode()
    assert read_back(name, raw) == rows


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
@quick
@given(tables, st.booleans())
@example([{"task": "\u2028", "text": "\0", COLUMN: "\r\n"}], False)
def test_json_lines_come_back(name, rows, ascii_only):
    raw = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
    assert read_back(name, raw) == rows


@quick
@given(tables)
def test_parquet_comes_back(rows):
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    assert read_back("t.parquet", buffer.getvalue()) == rows


@quick
@given(tables)
def test_a_table_keeps_its_documents(rows):
    kept = [row for row in rows if row["text"].strip() and row["task"].strip()]
    assume(kept)
    table, notes = read_table(pd.DataFrame(rows))
    assert [(row["task"], row["text"]) for row in table.to_list()] == [(row["task"].strip(), row["text"]) for row in kept]
    assert bool(notes) == (len(kept) < len(rows))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet"])
@quick
@given(st.binary(max_size=60))
@example(b'{"task": "a", "text": "\\ud800"}')
@example(b"[" * 10_000)
@example(b'{"text": 1' + b"0" * 5000 + b"}")
@example(b"task,text,task\na,b,c\n")
@example(b'"\n"')
def test_any_bytes_are_a_table_or_an_input_error(name, raw):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        with contextlib.suppress(InputError):
            assert len(read_table(file)[0])


# Names of tasks

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
names = st.one_of(
    st.text(max_size=20),
    st.text(string.ascii_letters + " -./\\", max_size=6),
    st.sampled_from(
        ["con", "NUL", "Aux.", "com1", "LPT9", "COM\u00b9", "..", "/", "", "a", "A", "a-2", "x" * 300, "\ud800", "global-mean"]
    ),
)


@quick
@given(st.lists(names, max_size=12), st.lists(st.sampled_from(["global-mean", "a", "task"]), max_size=3))
def test_names_become_safe_folders(given_names, reserved):
    slugs = task_slugs(given_names, reserved=reserved)
    assert list(slugs) == list(dict.fromkeys(given_names))
    assert len(set(slugs.values())) == len(slugs)
    for slug in slugs.values():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
        assert len(slug) <= 80
        assert slug not in RESERVED | set(reserved)
    assert task_slugs(given_names, reserved=reserved) == slugs
    # a task more changes the name of no other
    assert slugs.items() <= task_slugs([*given_names, "one more"], reserved=reserved).items()


@pytest.mark.parametrize("name", ["CON", "nul", "Aux", "prn", "com1", "LPT9", "con."])
def test_what_windows_keeps_for_devices_gets_a_number(name):
    assert task_slugs([name]) == {name: f"{name.lower().strip('.')}-2"}


def test_ten_thousand_names_that_slug_alike():
    slugs = task_slugs([chr(0x4E00 + n) for n in range(10_000)])
    assert list(slugs.values())[:3] == ["task", "task-2", "task-3"]
    assert len(set(slugs.values())) == 10_000


# Configurations

printed = st.text(min_size=1, max_size=12).filter(str.strip)
words = st.sampled_from("none|null|~|no|On|1:30|1e3|.inf|010|2020-01-01|=|- a|a: b|# a|'|&a|*a|!a|? a|[a".split("|"))
a_text = st.one_of(printed, words)
positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
configs = st.builds(
    MapFitConfig,
    data=a_text | st.lists(a_text, min_size=2, max_size=3),
    separator=st.sampled_from([None, "tab", "|"]),
    quoting=st.sampled_from([None, "minimal", "none"]),
    encoding=st.sampled_from([None, "utf-8", "latin-1"]),
    header=st.booleans(),
    task_column=a_text,
    text_column=a_text,
    group_column=st.none() | a_text,
    small_tasks=st.sampled_from(["error", "drop"]),
    num_tasks=st.none() | st.integers(1, 10**6),
    max_tokens=st.integers(2, 4096),
    alpha=st.none() | positive,
    targets=st.none() | st.lists(a_text, min_size=1, max_size=3),
    tau=st.sampled_from(["learned", 0.0, float("inf")]) | st.floats(1e-30, 1e30),
    learning_rate=positive,
    warmup=st.floats(0, 1),
    gradient_clip=st.floats(min_value=0, exclude_min=True, allow_nan=False),
    task_subsampling=st.none() | st.booleans(),
    gradient_checkpointing=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    output_dir=a_text,
    overwrite=st.booleans(),
)


@pytest.mark.parametrize("comments", [False, True])
@settings(quick, max_examples=25)
@given(configs)
@example(MapFitConfig(group_column="none", targets=["a,b", " c"], data="\ud800"))
def test_a_valid_configuration_is_itself_again(comments, config):
    config.validate()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(to_yaml(config, comments=comments), encoding="utf-8")
        assert parse_config(MapFitConfig, ["--config", str(file)]) == config


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | a_text | st.just(""),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(a_text, children, max_size=3),
    max_leaves=6,
)


@quick
@given(st.dictionaries(a_text.filter(lambda key: key != "<<"), values, max_size=4))
def test_a_mapping_is_itself_again(mapping):
    assert parse_mapping(dump_mapping(mapping).encode()) == mapping


options = st.sampled_from([f"--{name}" for name in MapFitConfig.__dataclass_fields__])
tokens = st.one_of(
    options, st.text(max_size=8), words, st.sampled_from(["--", "-", "--x", "--rank=", "--config", "-1", "4", "--help", "-h"])
)


def ending(call):
    """What a call gives: its result, the message of its InputError, or the code of its exit."""
    try:
        return call()
    except InputError as error:
        return str(error)
    except SystemExit as ended:
        return ended.code


def is_configuration_or_one_line(found):
    # a printable message is one line, and says nothing to the terminal
    return found.isprintable() if isinstance(found, str) else found == 0 or found.validate() is None


@pytest.mark.parametrize("cls", [MapFitConfig, PosteriorFitConfig])
@settings(quick, max_examples=100)
@given(argv=st.lists(st.one_of(tokens, st.builds("{}={}".format, options, tokens)), max_size=5))
def test_any_line_is_a_configuration_or_an_input_error(cls, argv):
    with contextlib.redirect_stdout(io.StringIO()):
        assert is_configuration_or_one_line(ending(lambda: parse_config(cls, argv, prog="fit.py")))


@quick
@given(st.text(max_size=60))
@example("rank: 1\nrank: 1")
@example('data: "\\Uffffffff"')
@example("data: !!bool maybe")
@example("? a")
@example("{[]: 1}")
def test_any_file_is_a_configuration_or_an_input_error(text):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_bytes(text.encode(errors="surrogatepass"))
        assert is_configuration_or_one_line(ending(lambda: parse_config(MapFitConfig, ["--config", str(file)])))
