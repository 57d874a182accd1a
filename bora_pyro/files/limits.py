"""How much of a file is read: no more than this machine can hold as a table, however little of the disk it takes.

>>> largest_text() > 2**20
True
"""

from __future__ import annotations

import os
from io import BufferedIOBase
from pathlib import Path

from bora_pyro.errors import InputError

#: The share of this machine's memory that the bytes of one file may take, expanded; as a table they take several times that.
MEMORY_SHARE = 0.25
#: Bytes of a cell of a table, at least: a reference to what it holds.
CELL_BYTES = 8
_CHUNK = 2**20


def largest_text() -> int:
    """The most bytes that are read of a file, expanded: ``MEMORY_SHARE`` of this machine's memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        memory = 2**33
    return int(MEMORY_SHARE * memory)


def read_bounded(file: BufferedIOBase, path: Path, *, keep: bool = True) -> bytearray:
    """All bytes of an open file; a gzip file expands as it is read.

    Args:
        file: the open file.
        path: how the error calls it.
        keep: False only counts them, and returns none.

    Raises:
        InputError: there are more than ``largest_text``.
    """
    most, size, content = largest_text(), 0, bytearray()
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        if size > most:
            raise _too_large(path, "bytes", most)
        if keep:
            content += chunk
    return content


def check_cells(path: Path, rows: int, columns: int) -> None:
    """Refuse a table of more cells than memory has references for: a short file can be all separators."""
    if rows * columns * CELL_BYTES > largest_text():
        raise _too_large(path, f"cells ({rows} rows of {columns} columns)", largest_text() // CELL_BYTES)


def _too_large(path: Path, what: str, most: int) -> InputError:
    return InputError(
        f"file {str(path)!r} has more {what} than a table may have here, {most} by this machine's memory; "
        "leave out rows and columns that are not needed, or use a machine with more memory"
    )
