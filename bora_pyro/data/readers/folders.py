"""Folders of data: those that ``save_to_disk`` wrote, folders of files, and repositories of the hub.

``datasets`` says which files a repository has, and loads what it has saved. The files themselves are read by the readers of this
package, so that a cell is the same in a folder as in a file alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import datasets
import fsspec

from bora_pyro.data.folder_check import check_folder, has_listed_files
from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.data.readers.formats import ENDINGS, PLAIN, open_file, table_ending
from bora_pyro.data.readers.memory import dataset_part
from bora_pyro.data.readers.options import COLUMN, FILE, FOLDER, ReadingOptions
from bora_pyro.data.readers.raw import Part, RawTable, listed
from bora_pyro.data.readers.splits import check_no_hub_split, splits_of_names, table_of_splits
from bora_pyro.data.readers.texts import one_line
from bora_pyro.errors import InputError

# Files beside the data that are no data.
_ABOUT = ("readme", "license", "licence", "changelog", "dataset_infos", "dataset_info")


def open_folder(path: Path, name: str, reading: ReadingOptions, *, hub_split: str | None, whole: bool) -> RawTable:
    """Open a folder.

    Raises:
        InputError: it has no data that can be read, or something in it leads out of it.
    """
    label = f"folder {name!r}"
    check_folder(path)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            saved = datasets.load_from_disk(path)
        except Exception as error:  # `datasets` raises many types of errors
            raise InputError(f"{label} could not be read ({one_line(error)}); save the data set again") from error
        return table_of_dataset(saved, label, hub_split)
    if has_listed_files(path):
        by_split, notes = _files_of_card(path, label), list[str]()
        files = {
            split: [DataFile.of(file, name=_within(file, path, name), whole=whole) for file in own]
            for split, own in by_split.items()
        }
    else:
        found, notes = files_in(path, reading)
        if not found:
            raise InputError(
                f"{label} holds no tables{_hint_of_texts(path)}; give a folder written by datasets' save_to_disk, or one that "
                f"holds {ENDINGS}"
            )
        sides = splits_of_names([str(file.relative_to(path)) for file in found], label, folders_only=reading.task_from == FILE)
        files = {}
        for file, side in zip(found, sides, strict=True):
            files.setdefault(side or "", []).append(DataFile.of(file, name=_within(file, path, name), whole=whole))
    if hub_split in files:
        files = {hub_split: files[hub_split]}
    parts = {split: [open_named(file, reading) for file in own] for split, own in files.items()}
    return table_of_splits(label, parts, hub_split, notes)


def _hint_of_texts(path: Path) -> str:
    """What to do about a folder of plain texts, if it is one."""
    texts = any(file.suffix.lower() in PLAIN and file.stem.lower() not in _ABOUT for file in path.rglob("*"))
    return " (if its .txt and .md files are documents, and their folders tasks: --task_from file)" if texts else ""


def files_in(path: Path, reading: ReadingOptions) -> tuple[list[Path], list[str]]:
    """The files of data in a folder, in the order of their names, and a note on what else it holds."""
    found, others = list[Path](), list[str]()
    for above, folders, names in os.walk(path):
        folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "__")))
        for name in sorted(names):
            if name.startswith((".", "__")) or name.partition(".")[0].lower() in _ABOUT:
                continue
            plain = Path(name).suffix.lower() in PLAIN
            is_data = plain and (reading.task_from != COLUMN or reading.separator is not None)
            if is_data or table_ending(name):
                found.append(Path(above, name))
            else:
                others.append(name)
    found.sort(key=lambda file: file.relative_to(path).parts)
    left_out = [f"{str(path)!r}: files of other kinds are left out: {listed(sorted(others), most=5)}"]
    return found, left_out if others and found else []


def open_named(file: DataFile, reading: ReadingOptions) -> Part:
    """Open a file, with a column ``task`` where its name or its folder is the task."""
    part = open_file(file, reading)
    if reading.task_from != COLUMN:
        path = PurePosixPath(file.name.replace(os.sep, "/"))
        folder = path.parent.name or Path(file.name).absolute().parent.name
        is_document = reading.task_from == FOLDER or file.kind in PLAIN
        part.fixed["task"] = folder if is_document else file.stem
        if "task" in part.columns:
            part.notes.append(f"{file.label}: the column 'task' is not read, since task_from is {reading.task_from}")
    return part


def table_of_dataset(data: datasets.Dataset | datasets.DatasetDict, label: str, hub_split: str | None) -> RawTable:
    """The rows of a ``Dataset`` or a ``DatasetDict``."""
    if isinstance(data, Mapping):
        parts = {str(name): [dataset_part(part, f"split {str(name)!r}")] for name, part in data.items()}
        return table_of_splits(label, parts, hub_split, [])
    check_no_hub_split(label, hub_split)
    return RawTable(label, [dataset_part(data, label)])


def open_hub(name: str, reading: ReadingOptions, *, hub_split: str | None, whole: bool) -> RawTable:
    """Open a data set of the Hugging Face hub.

    The files of tables are downloaded (or, if the table is not kept in memory, read from the hub as they come). A data set of
    other files is loaded by ``datasets``.

    Raises:
        InputError: the hub has no such data set, or it cannot be read.
    """
    label = f"hub data set {name!r}"
    try:
        builder = datasets.load_dataset_builder(name)
        by_split = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
        if not by_split or any(table_ending(file) is None for files in by_split.values() for file in files):
            return table_of_dataset(datasets.load_dataset(name), label, hub_split)
        if hub_split in by_split:
            by_split = {hub_split: by_split[hub_split]}
        opened = {split: [*_remote(files, whole=whole)] for split, files in by_split.items()}
    except InputError:
        raise
    except Exception as error:  # no network, no such id, or a script: one message for all
        raise InputError(
            f"data {name!r} is not a file or folder here, and the Hugging Face hub gave no data set of that name "
            f"({one_line(error)}); give a path of {ENDINGS}, a saved folder, or a hub id that this machine can reach"
        ) from error
    return table_of_splits(
        label, {split: [open_named(file, reading) for file in own] for split, own in opened.items()}, hub_split, []
    )


def _remote(files: Sequence[str], *, whole: bool) -> Iterator[DataFile]:
    """The files of a repository, downloaded if the whole table is read."""
    local = datasets.DownloadManager().download(list(files)) if whole else files
    for address, place in zip(files, local, strict=True):
        ending = "".join(PurePosixPath(address).suffixes[-2:]).lower()
        short = address.partition("@")[2].partition("/")[2] or address
        yield DataFile(short, _opener(str(place)), ending, whole)


def _opener(place: str) -> Callable[[], BinaryIO]:
    def start() -> BinaryIO:
        if "://" not in place:
            return open(place, "rb")
        filesystem, path = fsspec.core.url_to_fs(place)
        return cast(BinaryIO, filesystem.open(path, "rb"))

    return start


def _files_of_card(path: Path, label: str) -> dict[str, list[Path]]:
    """The files that the card of a data set lists, by split."""
    try:
        found: Any = datasets.load_dataset_builder(str(path)).config.data_files or {}
    except Exception as error:  # `datasets` raises many types of errors
        raise InputError(f"{label} could not be read as its card says ({one_line(error)}); correct README.md") from error
    for files in found.values():
        for file in files:
            if table_ending(str(file)) is None:
                raise InputError(f"{label} lists {Path(file).name!r} in its card, which is no table; list files of {ENDINGS}")
    return {str(split): [Path(file) for file in files] for split, files in found.items()}


def _within(file: Path, folder: Path, name: str) -> str:
    """The name of a file in a folder, beginning with the folder's name as the user gave it."""
    return str(Path(name) / os.path.relpath(file, folder))
