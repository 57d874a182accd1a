"""A folder is read as one thing: no link in it is followed to somewhere else.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> (folder / "data.csv").symlink_to("/etc/passwd")
>>> check_links(folder, "folder")
Traceback (most recent call last):
bora_pyro.errors.InputError: folder ... has a link 'data.csv' that leads out of it; put a copy in its place
"""

from __future__ import annotations

import os
from pathlib import Path

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
