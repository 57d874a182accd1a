"""Replace a file or a folder in one step. If the machine fails meanwhile, the old or the new version is there, complete.

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
    """Write a temporary file, flush it to the disk and rename it to ``file`` in one step.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "a.txt", lambda temporary: temporary.write_text("whole"))
        ...     [entry.name for entry in Path(folder).iterdir()], (Path(folder) / "a.txt").read_text()
        (['a.txt'], 'whole')

    Args:
        file: the file to write or replace; its folder is created if it does not exist.
        write: a function that writes the content to a given path.

    Raises:
        InputError: the file cannot be written, for example because the disk is full. The old file is then unchanged.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a killed run may have left one, and a link would be followed
        write(temporary)
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except OSError as error:
        raise unwritable(file, error) from error
    finally:
        with suppress(OSError):  # the disk may fail here too; the first error says why
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(file: Path, error: OSError) -> InputError:
    """The error to raise if a file cannot be written."""
    return InputError(f"{file} cannot be written ({error.strerror or error}); make room there, or make it writable, and go on")


def check_writable(path: str | Path, folders: Iterable[Path]) -> None:
    """Check that a folder can be created or written at a path.

    Args:
        path: the path of the folder.
        folders: the path itself and the folders above it, or the latter alone, from the inside out.

    Raises:
        OSError: the first of ``folders`` that exists is not a folder, or it cannot be written.
        ValueError: the path is not valid.
    """
    with suppress(FileNotFoundError):
        os.stat(path)  # raises for a NUL byte or a file among the parents, which Path.exists ignores
    above = next(folder for folder in folders if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{above} is not a folder that can be written")


def unusable(path: str | Path, error: Exception) -> InputError:
    """The error to raise if an output folder cannot be created or written; an ``InputError`` is returned as it is."""
    if isinstance(error, InputError):
        return error
    return InputError(
        f"output_dir {path} cannot be written ({getattr(error, 'strerror', None) or error}); give another --output_dir"
    )


# The key in a record that lists the other entries of its folder.
_ENTRIES = "entries"
_RECORD_BYTES = 2**26


@contextmanager
def whole_folder(path: str | Path, *, record: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that is renamed to ``path`` in one step if the ``with`` block ends without an error.

    If the block raises an error, the temporary folder is deleted and ``path`` stays as it was.

    Args:
        path: the folder to write. It may not exist yet, may be empty, or with ``overwrite`` may hold an earlier result.
        record: name of a JSON file, which the block writes last with :func:`write_record`. It identifies an earlier result.
        overwrite: replace an earlier result. A folder with entries that its record does not list is never replaced.

    Raises:
        InputError: the folder holds something else, holds an earlier result and ``overwrite`` is False, or cannot be written.
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
    """Raise the errors of ``whole_folder`` early, before a long computation. Nothing is written."""
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
            f"output_dir {path} holds {foreign[0]!r}, which is not part of an earlier result; give another --output_dir, or move "
            "it away"
        )
    if not overwrite:
        raise InputError(
            f"output_dir {path} holds an earlier result; give --overwrite true to replace it, or another --output_dir"
        )


def write_record(folder: Path, record: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file with ``content`` and with the names of all entries of the folder."""
    entries = sorted(entry.name for entry in folder.iterdir() if entry.name != record)
    text = json.dumps({**content, _ENTRIES: entries}, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / record).write_text(text + "\n", encoding="utf-8")


def _entries(file: Path) -> list[str]:
    try:
        content = json.loads(read_regular(file, most=_RECORD_BYTES).decode("utf-8"))
        return [str(name) for name in content[_ENTRIES]]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # not a record of `write_record`: no entry of the folder is ours
