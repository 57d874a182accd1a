"""Folders that appear whole or not at all.

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

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bora_pyro.errors import InputError
from bora_pyro.regular_file import read_regular
from bora_pyro.whole_file import check_writable, unusable

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
