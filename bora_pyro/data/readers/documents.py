"""Plain text files (.txt, .md): a file is one document. The task is named by its folder, with ``task_from``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.delimited import open_delimited
from bora_pyro.data.readers.options import COLUMN, ReadingOptions
from bora_pyro.data.readers.raw import Part, Row
from bora_pyro.data.readers.text_stream import TextStream
from bora_pyro.errors import InputError


def open_text(file: DataFile, reading: ReadingOptions) -> Part:
    """Read the whole text as one document, or a table if there is a separator.

    Raises:
        InputError: neither a separator nor ``task_from`` is given, or the file is no text.
    """
    if reading.delimiter is not None:
        return open_delimited(file, reading)
    if reading.task_from == COLUMN:
        raise InputError(
            f"{file.label} is plain text; if it is one document of the task that its folder names, give --task_from file; "
            "if it is a table, give its separator, as in --separator tab"
        )
    with TextStream(file, reading.encoding) as stream:
        text = stream.read()
    if "\0" in text:
        raise InputError(f"{file.label} has a NUL byte; write it without, or give its encoding, as in --encoding utf-16-le")

    def rows(_: Sequence[str] | None, notes: list[str]) -> Iterator[Row]:
        yield "its text", {"text": text}

    return Part(file.label, ["text"], rows, stream.notes)
