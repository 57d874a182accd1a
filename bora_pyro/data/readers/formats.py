"""The formats of files, by ending: one line registers a format.

>>> format_of(DataFile.of(Path("speeches.ndjson.zst"))) is open_json_lines
True
>>> table_ending("Speeches.CSV.gz"), table_ending("speeches.exe")
('.csv.gz', None)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bora_pyro.data.readers.compression import COMPRESSIONS
from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.delimited import open_delimited
from bora_pyro.data.readers.documents import open_text
from bora_pyro.data.readers.excel import open_excel
from bora_pyro.data.readers.json_rows import open_json, open_json_lines
from bora_pyro.data.readers.options import ReadingOptions
from bora_pyro.data.readers.parquet import open_parquet
from bora_pyro.data.readers.raw import Part
from bora_pyro.errors import InputError, nearest

#: Functions that open a file and read the names of its columns, by the ending of the file.
FORMATS: dict[str, Callable[[DataFile, ReadingOptions], Part]] = {
    ".csv": open_delimited,
    ".tsv": open_delimited,
    ".jsonl": open_json_lines,
    ".ndjson": open_json_lines,
    ".json": open_json,
    ".parquet": open_parquet,
    ".xlsx": open_excel,
    ".txt": open_text,
    ".md": open_text,
}
#: Endings of plain text, which is a document and not a table.
PLAIN = (".txt", ".md")
#: The endings of tables, for messages.
ENDINGS = ", ".join(ending for ending in FORMATS if ending not in PLAIN) + f" (each also with {', '.join(COMPRESSIONS)})"


def table_ending(path: Path | str) -> str | None:
    """The ending of a file name, with that of a compression, if files with it are tables; otherwise None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if suffixes and suffixes[-1] in FORMATS and suffixes[-1] not in PLAIN:
        return suffixes[-1] + packed
    return packed if packed == ".zip" else None


def format_of(file: DataFile) -> Callable[[DataFile, ReadingOptions], Part]:
    """The function that opens a file.

    Raises:
        InputError: its ending is not known.
    """
    kind = file.kind
    if kind not in FORMATS:
        known = list(FORMATS)
        raise InputError(
            f"{file.label} has an ending that is not known; use one of {ENDINGS}{nearest(kind, known) if kind else ''}"
        )
    return FORMATS[kind]


def open_file(file: DataFile, reading: ReadingOptions) -> Part:
    """Open one file: its columns are then known, and its rows can be read.

    Raises:
        InputError: the file cannot be read, or its ending is not known.
    """
    return format_of(file)(file, reading)
