r"""Files that anybody may have named: regular ones alone are read, and no more of them than is said.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp(), "a.txt")
>>> _ = file.write_text("whole")
>>> read_regular(file, most=5)
b'whole'
>>> read_regular(Path("/dev/zero"), most=5)
Traceback (most recent call last):
OSError: it is no regular file

A pipe would be waited for, and a device such as ``/dev/zero`` never ends. Whatever is wrong is an ``OSError``, as it is of a file
that cannot be opened.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

_CHUNK = 2**20


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file to be read.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open(file, "rb", opener=_without_waiting))
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError("it is no regular file")
        stack.pop_all()  # from here on it is the caller's to close
        return opened


def check_regular(file: Path) -> None:
    """Raise what :func:`open_regular` would raise, for files that another library opens by their name."""
    open_regular(file).close()


def read_regular(file: Path, *, most: int) -> bytes:
    """All bytes of a regular file.

    Args:
        file: the file.
        most: the largest number of bytes that it may have.

    Raises:
        OSError: as for :func:`open_regular`, or there are more bytes.
    """
    content = bytearray()
    with open_regular(file) as opened:
        while chunk := opened.read(_CHUNK):  # not by its size: what a file of /proc says of it is 0
            content += chunk
            if len(content) > most:
                raise OSError(f"it has more than {most} bytes")
    return bytes(content)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # else opening a pipe waits for somebody who writes into it
