"""Files and folders that are replaced in one piece: a reader finds the old one or the new one, whenever a machine dies.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as above:
...     with whole_folder(f"{above}/result", record="made.json") as folder:
...         _ = (folder / "table.csv").write_text("x")
...         write_record(folder, "made.json", {"rows": 0})
...         before = [entry.name.startswith(".result.") for entry in Path(above).iterdir()]
...     before, sorted(entry.name for entry in (Path(above) / "result").iterdir())
([True], ['made.json', 'table.csv'])
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bora_pyro.errors import InputError
from bora_pyro.files.regular import read_regular


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


# The key of a record under which it names what else lies in its folder.
_ENTRIES = "entries"
_RECORD_BYTES = 2**26


@contextmanager
def whole_folder(path: str | Path, *, record: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, beside the place it is meant for, where it goes in one step when the block ends well.

    Where the block ends with an error, what was written is deleted, and what stood in the place stays.

    Args:
        path: the place: nothing, an empty folder, or with ``overwrite`` an earlier result.
        record: name of the JSON file that the block writes last, by :func:`write_record`; an earlier result is known by it.
        overwrite: replace an earlier result. It is deleted only where its record names everything in it.

    Raises:
        InputError: the place is taken, or cannot be written.
    """
    check_place(path, record=record, overwrite=overwrite)
    place = Path(os.path.abspath(path))
    aside, old = (place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("tmp", "old"))
    try:
        aside.mkdir(parents=True)
        yield aside
        if place.exists():
            os.rename(place, old)
        try:
            os.rename(aside, place)
        except OSError:
            if old.exists():
                os.rename(old, place)
            raise
    except (OSError, SafetensorError) as error:
        raise unusable(path, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_place(path: str | Path, *, record: str, overwrite: bool = False) -> None:
    """Raise what ``whole_folder`` would raise, and leave the disk alone: for a look before the long work begins."""
    try:
        place = Path(os.path.abspath(path))
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            raise InputError(f"output_dir {path} is a file or a link; give another --output_dir")
        names = sorted(entry.name for entry in place.iterdir()) if place.exists() else []
        check_writable(place, place.parents)
    except (OSError, ValueError) as error:
        raise unusable(path, error) from None
    if not names:
        return
    own = {record, *_entries(place / record)} if record in names else set()
    if foreign := [name for name in names if name not in own]:
        raise InputError(
            f"output_dir {path} holds {foreign[0]!r}, which is no part of an earlier result; give another --output_dir, or move "
            "it away"
        )
    if not overwrite:
        raise InputError(
            f"output_dir {path} holds an earlier result; give --overwrite true to replace it, or another --output_dir"
        )


def write_record(folder: Path, record: str, content: Mapping[str, Any]) -> None:
    """Write the JSON file that says what the folder holds, names of its entries included."""
    entries = sorted(entry.name for entry in folder.iterdir() if entry.name != record)
    text = json.dumps({**content, _ENTRIES: entries}, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / record).write_text(text + "\n", encoding="utf-8")


def _entries(file: Path) -> list[str]:
    try:
        content = json.loads(read_regular(file, most=_RECORD_BYTES).decode("utf-8"))
        return [str(name) for name in content[_ENTRIES]]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # no record of ours: everything in the folder is foreign
