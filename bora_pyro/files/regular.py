r"""Read files and folders from unknown sources: regular files only, and no link that leads out of a folder.

>>> import tempfile
>>> file = Path(tempfile.mkdtemp(), "a.txt")
>>> _ = file.write_text("whole")
>>> read_regular(file, most=5)
b'whole'
>>> read_regular(Path("/dev/zero"), most=5)
Traceback (most recent call last):
OSError: it is not a regular file
>>> (file.parent / "data.csv").symlink_to("/etc/passwd")
>>> check_links(file.parent, "folder")
Traceback (most recent call last):
bora_pyro.errors.InputError: folder ... has a link 'data.csv' that leads out of it; put a copy in its place

Opening a pipe would wait for a writer, and a device such as ``/dev/zero`` never ends. The functions that read a file raise
``OSError`` for every problem with it.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from bora_pyro.errors import InputError

#: The largest number of files and folders in a folder of data or of a run.
MOST_ENTRIES = 2**20


def check_links(folder: Path, what: str) -> None:
    """Check that no link in a folder, at any depth, leads out of it.

    A snapshot in the hub's cache (``.../snapshots/<revision>``) consists of links into the folder ``blobs`` beside it. These
    links are allowed.

    Args:
        folder: the folder; the folder itself may be a link.
        what: what the error calls the folder, for example ``folder``.

    Raises:
        InputError: a link leads out of the folder or cannot be followed, or the folder holds more than ``MOST_ENTRIES`` files
            and folders.
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
                if not _target(entry).is_relative_to(root):
                    raise InputError(f"{link} that leads out of it; put a copy in its place")
            except OSError as error:  # for example links of other users' processes in /proc
                raise InputError(
                    f"{link} that cannot be followed ({error.strerror or error}); give a folder that holds nothing else"
                ) from None


def _target(link: str) -> Path:
    """Where a link leads, by all the links on the way; ``OSError`` if one of them cannot be followed."""
    try:
        return Path(os.path.realpath(link, strict=True))  # without strict, Python 3.13 returns a link that it cannot read
    except (FileNotFoundError, NotADirectoryError):  # nothing is there, but its place is known
        return Path(os.path.realpath(link))


_CHUNK = 2**20


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: the file cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open(file, "rb", opener=_open_nonblocking))
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError("it is not a regular file")
        stack.pop_all()  # the caller closes the file
        return opened


def check_regular(file: Path) -> None:
    """Raise the errors of :func:`open_regular`, for a file that another library will open by its name."""
    open_regular(file).close()


def read_regular(file: Path, *, most: int) -> bytes:
    """All bytes of a regular file.

    Args:
        file: the file.
        most: the largest number of bytes that the file may have.

    Raises:
        OSError: as for :func:`open_regular`, or the file has more bytes.
    """
    content = bytearray()
    with open_regular(file) as opened:
        while chunk := opened.read(_CHUNK):  # do not trust the file's size: in /proc it is 0
            content += chunk
            if len(content) > most:
                raise OSError(f"it has more than {most} bytes")
    return bytes(content)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # otherwise opening a pipe waits for a writer
