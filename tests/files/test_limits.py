"""Short files that stand for more than memory holds are not read."""

from __future__ import annotations

import gzip

import pandas as pd
import pytest

from bora_pyro.data.tables import read_table
from bora_pyro.errors import InputError
from bora_pyro.files import limits as bounds


@pytest.fixture
def small_memory(monkeypatch):
    """A machine on which a file may have a megabyte, expanded."""
    monkeypatch.setattr(bounds, "largest_text", lambda: 2**20)


ROW = b"a,b\n"


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv", "t.tsv.gz", "t.jsonl.gz"])
def test_a_file_that_expands_beyond_memory_is_not_read(tmp_path, small_memory, name):
    raw = b'{"task": "a", "text": "b"}\n' * 2**18 if "jsonl" in name else b"task,text\n" + (b"a," + b"b" * 100 + b"\n") * 2**16
    file = tmp_path / name
    file.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(InputError, match="has more than 1048576 bytes, the most that this machine's memory allows"):
        read_table(file)
    if name.endswith("gz"):
        assert file.stat().st_size < 30_000
        (tmp_path / "folder").mkdir()
        file.rename(tmp_path / "folder" / name)
        with pytest.raises(InputError, match="has more than 1048576 bytes, the most that this machine"):
            read_table(tmp_path / "folder")


def test_short_files_of_many_cells_are_not_read(tmp_path, small_memory):
    csv, jsonl, parquet = (tmp_path / name for name in ("t.csv", "t.jsonl", "t.parquet"))
    csv.write_text("task,text," + ",".join(map(str, range(998))) + "\n" + ("," * 999 + "\n") * 1000)
    jsonl.write_text("".join(f'{{"task": "a", "text": "b", "{n}": 1}}\n' for n in range(1000)))
    pd.DataFrame({"task": ["a"] * 200_000}).to_parquet(parquet)
    assert parquet.stat().st_size < 5000
    for file in (csv, jsonl, parquet):
        with pytest.raises(
            InputError, match=r"has more than 131072 cells \(\d+ rows of \d+ columns\), the most that this machine's memory"
        ):
            read_table(file)


def test_a_table_of_what_memory_holds_is_read(tmp_path, small_memory):
    file = tmp_path / "t.csv.gz"
    file.write_bytes(gzip.compress(b"task,text\n" + ROW * 10_000))
    assert len(read_table(file)[0]) == 10_000
