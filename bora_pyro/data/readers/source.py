"""Open any source of documents: a path, several paths and patterns, a hub id, a built-in source, or a table in memory."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets
import pandas as pd

from bora_pyro.data.builtin import BUILTIN
from bora_pyro.data.folder_check import check_folder
from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.folders import files_in, open_folder, open_hub, open_named, table_of_dataset
from bora_pyro.data.readers.formats import table_ending
from bora_pyro.data.readers.memory import frame_part, rows_part
from bora_pyro.data.readers.options import FILE, ReadingOptions, check_reading
from bora_pyro.data.readers.raw import Part, RawTable
from bora_pyro.data.readers.splits import check_no_hub_split, splits_of_names, table_of_splits
from bora_pyro.errors import InputError, nearest, shown

Source: TypeAlias = str | Path | Sequence[str | Path] | pd.DataFrame | datasets.Dataset | datasets.DatasetDict

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LONGEST_ID = 200
_PATTERN = re.compile(r"[*?\[]")


def open_source(
    source: Source, reading: ReadingOptions | None = None, *, hub_split: str | None = None, whole: bool = True
) -> RawTable:
    """Open a source of documents.

    Args:
        source: as for :func:`~bora_pyro.data.tables.read_table`.
        reading: how files are read; default: ``ReadingOptions()``.
        hub_split: the split to read alone, of a source that has splits.
        whole: whether the table will be in memory as a whole; then the sizes of files are limited by this machine's memory.

    Raises:
        InputError: the source is missing, empty, or cannot be read.
    """
    reading = reading or ReadingOptions()
    check_reading(reading)
    if isinstance(source, pd.DataFrame):
        check_no_hub_split("the DataFrame", hub_split)
        return RawTable("the DataFrame", [frame_part(source, "the DataFrame")])
    if isinstance(source, datasets.Dataset | datasets.DatasetDict):
        return table_of_dataset(source, "the Dataset", hub_split)
    names = _names(source)
    for name in names:
        check_source(name)
    if len(names) > 1 or is_pattern(names[0]):
        return _open_several(names, reading, hub_split=hub_split, whole=whole)
    name, path = str(names[0]), Path(names[0]).expanduser()
    if name in BUILTIN:
        check_no_hub_split(f"data {name!r}", hub_split)
        return RawTable(f"data {name!r}", [rows_part(BUILTIN[name](), f"data {name!r}")])
    if _exists(path) and path.is_dir():
        return open_folder(path, name, reading, hub_split=hub_split, whole=whole)
    if _exists(path):
        check_no_hub_split(f"file {name!r}", hub_split)
        return RawTable(f"file {name!r}", [_open_path(path, name, reading, whole=whole)])
    return open_hub(name, reading, hub_split=hub_split, whole=whole)


def check_source(source: str | Path | Sequence[str | Path]) -> None:
    """Check early, before anything is read, that a source can exist.

        >>> check_source("builtin:documentation")
        >>> check_source("speeches.csv")
        Traceback (most recent call last):
        bora_pyro.errors.InputError: file 'speeches.csv' does not exist; check the path

    Raises:
        InputError: the source is a file that does not exist, a pattern that no file fits, or an unknown ``builtin:`` name.
    """
    if not isinstance(source, str | Path):
        for one in source:
            check_source(one)
        return
    name, path = str(source), Path(source).expanduser()
    if name in BUILTIN:
        return
    if name.startswith("builtin:"):
        raise InputError(f"data {name!r} is not built in; there is {', '.join(BUILTIN)}{nearest(name, BUILTIN)}")
    if is_pattern(source):
        if not _matches(name):
            raise InputError(f"no file fits the pattern {name!r}; check the path")
    elif not _exists(path) and (isinstance(source, Path) or not is_hub_id(name)):
        near = path.parent
        siblings = [sibling.name for sibling in near.iterdir()] if _exists(near) and near.is_dir() else []
        raise InputError(f"file {shown(name, characters=200)} does not exist; check the path{nearest(path.name, siblings)}")


def is_hub_id(name: str) -> bool:
    """Whether a text looks like a hub id and not like a file name."""
    return not table_ending(name) and len(name) <= _LONGEST_ID and _HUB_ID.fullmatch(name) is not None


def is_pattern(source: str | Path) -> bool:
    """Whether a source is a pattern of file names, such as ``logs/*.jsonl``, and not the name of a file."""
    return isinstance(source, str) and _PATTERN.search(source) is not None and not _exists(Path(source).expanduser())


def _names(source: object) -> list[str | Path]:
    if isinstance(source, str | Path):
        return [source]
    if isinstance(source, Sequence) and source and all(isinstance(one, str | Path) for one in source):
        return list(source)
    hint = " (table(rows) makes one of a list of dicts)" if isinstance(source, Sequence | Mapping) else ""
    raise InputError(
        f"data is a {type(source).__name__}; give a path, several paths, a hub id, {', '.join(BUILTIN)}, a pandas.DataFrame or a "
        f"datasets.Dataset{hint}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that holds a NUL byte
        return False


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(os.path.expanduser(pattern), recursive=True))


def _open_several(names: Sequence[str | Path], reading: ReadingOptions, *, hub_split: str | None, whole: bool) -> RawTable:
    label = f"data {' '.join(str(name) for name in names)!r:.80}"
    paths, notes = list[str](), list[str]()
    for name in names:
        if str(name) in BUILTIN or (not is_pattern(name) and not _exists(Path(name).expanduser())):
            raise InputError(f"{label} has {str(name)!r} among several sources; give a hub id or a built-in source alone")
        for one in _matches(str(name)) if is_pattern(name) else [str(name)]:
            path = Path(one).expanduser()
            if path.is_dir():
                check_folder(path)
                if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                    raise InputError(f"{label} has the saved data set {one!r} among several sources; give it alone")
                found, others = files_in(path, reading)
                paths, notes = paths + [str(Path(one, file.relative_to(path))) for file in found], notes + others
            else:
                paths.append(one)
    if not paths:
        raise InputError(f"{label} holds no files of data; check the paths")
    if len(set(paths)) < len(paths):
        twice = next(path for path, times in Counter(paths).items() if times > 1)
        raise InputError(f"{label} names the file {twice!r} twice; give it once")
    top = os.path.commonpath([os.path.dirname(os.path.abspath(os.path.expanduser(path))) for path in paths])
    inner = [os.path.relpath(os.path.abspath(os.path.expanduser(path)), top) for path in paths]
    sides = splits_of_names(inner, label, folders_only=reading.task_from == FILE)
    parts: dict[str, list[Part]] = {}
    for one, side in zip(paths, sides, strict=True):
        parts.setdefault(side or "", []).append(_open_path(Path(one).expanduser(), one, reading, whole=whole))
    return table_of_splits(label, parts, hub_split, notes)


def _open_path(path: Path, name: str, reading: ReadingOptions, *, whole: bool) -> Part:
    if not path.is_file():
        raise InputError(f"file {name!r} is not a regular file; give a file of documents, or a folder")
    return open_named(DataFile.of(path, name=name, whole=whole), reading)
