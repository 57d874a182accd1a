"""Limits on the size of files that are read into tables. Compressed files count with their expanded size.

>>> largest_text() > 2**20
True
"""

from __future__ import annotations

import os
from io import BufferedIOBase
from pathlib import Path

from bora_pyro.errors import InputError

#: The share of this machine's memory that the expanded bytes of one file may take. The table takes several times as much.
MEMORY_SHARE = 0.25
#: The least number of bytes that a cell of a table takes: one reference.
CELL_BYTES = 8
_CHUNK = 2**20


def largest_text() -> int:
    """The largest number of expanded bytes that are read from a file: ``MEMORY_SHARE`` of this machine's memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not tell
        memory = 2**33
    return int(MEMORY_SHARE * memory)


def read_bounded(file: BufferedIOBase, path: Path, *, keep: bool = True) -> bytearray:
    """All bytes of an open file, with a limit on their number.

    Args:
        file: the open file; a file from ``gzip.open`` counts with its expanded bytes.
        path: the file's name in the error.
        keep: False only checks the size and returns no bytes.

    Raises:
        InputError: the file has more than ``largest_text()`` bytes.
    """
    most, size, content = largest_text(), 0, bytearray()
    while chunk := file.read(_CHUNK):
        size += len(chunk)
        if size > most:
            raise _too_large(f"file {str(path)!r}", "bytes", most)
        if keep:
            content += chunk
    return content


class Budget:
    """The number of bytes that may still be read.

    >>> budget = Budget("file 'a.csv'")
    >>> budget.spend(100)
    >>> budget.renew()

    Attributes:
        label: what is read, for the error.
        spent: the bytes since the start, or since it was renewed.
    """

    def __init__(self, label: str) -> None:
        self.label, self.spent, self.most = label, 0, largest_text()

    def spend(self, size: int) -> None:
        """Count bytes, and raise ``InputError`` if they are more than ``largest_text()``."""
        self.spent += size
        if self.spent > self.most:
            raise _too_large(self.label, "bytes", self.most)

    def renew(self) -> None:
        """Forget what was read: its memory is free again."""
        self.spent = 0


def check_cells(label: str, rows: int, columns: int) -> None:
    """Raise ``InputError`` if a table has too many cells for this machine: a small file of separators can have very many."""
    if rows * columns * CELL_BYTES > largest_text():
        raise _too_large(label, f"cells ({rows} rows of {columns} columns)", largest_text() // CELL_BYTES)


def _too_large(label: str, what: str, most: int) -> InputError:
    return InputError(
        f"{label} has more than {most} {what}, the most that this machine's memory allows; "
        "leave out rows and columns that are not needed, or use a machine with more memory"
    )
