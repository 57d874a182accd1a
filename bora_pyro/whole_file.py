"""Files that are replaced in one piece: whoever reads them, and whenever a machine dies, finds the old one or the new one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from bora_pyro.errors import InputError


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, see it onto the disk, then put it in the file's place in one step.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "a.txt", lambda temporary: temporary.write_text("whole"))
        ...     [entry.name for entry in Path(folder).iterdir()], (Path(folder) / "a.txt").read_text()
        (['a.txt'], 'whole')

    Args:
        file: what is replaced; its folder is made if need be.
        write: writes the content to the path that it is given.

    Raises:
        InputError: the disk is full, or the file cannot be written for another reason; the old one is as it was.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # what a killed run left, or a link to somewhere else
        write(temporary)
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except OSError as error:
        raise unwritable(file, error) from error
    finally:
        with suppress(OSError):  # a disk that takes nothing, not even this; the error above says so
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, onto the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(file: Path, error: OSError) -> InputError:
    """What to tell of a file that could not be written."""
    return InputError(f"{file} cannot be written ({error.strerror or error}); make room there, or make it writable, and go on")


def check_writable(path: str | Path, folders: Iterable[Path]) -> None:
    """Look whether a folder could be made or written at a path.

    Raises:
        OSError: the first of ``folders`` that exists, the path's own or one above it, is no folder or cannot be written.
        ValueError: the path is none.
    """
    with suppress(FileNotFoundError):
        os.stat(path)  # what Path.exists passes over: a NUL byte, a file among the folders above
    above = next(folder for folder in folders if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{above} is not a folder that can be written")


def unusable(path: str | Path, error: Exception) -> InputError:
    """What to tell of an output folder that could not be made or written."""
    if isinstance(error, InputError):
        return error
    return InputError(
        f"output_dir {path} cannot be written ({getattr(error, 'strerror', None) or error}); give another --output_dir"
    )
