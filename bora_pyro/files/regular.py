r"""Files and folders that anybody may have named: regular files alone are read, and no link leads out of a folder.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp(), "a.txt")
>>> _ = file.write_text("whole")
>>> read_regular(file, most=5)
b'whole'
>>> read_regular(Path("/dev/zero"), most=5)
Traceback (most recent call last):
OSError: it is no regular file
>>> (file.parent / "data.csv").symlink_to("/etc/passwd")
>>> check_links(file.parent, "folder")
Traceback (most recent call last):
bora_pyro.errors.InputError: folder ... has a link 'data.csv' that leads out of it; put a copy in its place

Opening a pipe would wait for a writer, and a device such as ``/dev/zero`` never ends. Whatever is wrong with a file is an
``OSError``, as for a file that cannot be opened.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from bora_pyro.errors import InputError

#: The files and folders that are looked at; what holds more of them is no folder of a run or of data.
MOST_ENTRIES = 2**20


def check_links(folder: Path, what: str) -> None:
    """Refuse a folder with a link, at any depth, to something that is not in it.

    A folder of the hub's cache (``.../snapshots/<revision>``) consists of links into the ``blobs`` beside it: those are its own.

    Args:
        folder: the folder; it may be a link itself, for whoever names it means what it leads to.
        what: how the error calls it.

    Raises:
        InputError: there is such a link, or one that cannot be followed; there are more than ``MOST_ENTRIES`` files and folders.
    """
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":
        root = root.parent.parent
    found = 0
    for above, folders, files in os.walk(folder):
        found += len(folders) + len(files)
        if found > MOST_ENTRIES:
            raise InputError(
                f"{what} {str(folder)!r} holds more than {MOST_ENTRIES} files and folders; give one that holds nothing else"
            )
        for name in sorted((*folders, *files)):
            entry = os.path.join(above, name)
            if not os.path.islink(entry):
                continue
            link = f"{what} {str(folder)!r} has a link {os.path.relpath(entry, folder)!r}"
            try:
                if not Path(os.path.realpath(entry)).is_relative_to(root):
                    raise InputError(f"{link} that leads out of it; put a copy in its place")
            except OSError as error:  # those of other users' processes in /proc
                raise InputError(
                    f"{link} that cannot be followed ({error.strerror or error}); give a folder that holds nothing else"
                ) from None


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
