"""A folder of data is looked through before ``datasets`` reads it: everything in it is its own, and unpacks to a bounded size.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "README.md").write_text("---\\nconfigs:\\n- data_files: ../../secret.csv\\n---\\n")
>>> check_folder(folder)
Traceback (most recent call last):
bora_pyro.errors.InputError: folder ... names '../../secret.csv' in README.md, which is not in it; name files of the folder alone
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bora_pyro.errors import InputError, shown
from bora_pyro.files.limits import read_bounded
from bora_pyro.files.regular import check_links
from bora_pyro.files.safe_yaml import YamlError, parse_mapping

# How the files begin that `datasets` would unpack, whatever their names are.
_PACKED = {
    b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar",
}  # fmt: skip
_GZIP = b"\x1f\x8b"
_SAVED = ("dataset_dict.json", "state.json")
# Where a data set's card says which files are the data: at the head of the one, between two lines of hyphens, and in the other.
_CARDS = ("README.md", ".huggingface.yaml")
_HEAD = re.compile(rb"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)


def check_folder(folder: Path) -> None:
    """Refuse what would lead a reader out of the folder, and archives.

    Raises:
        InputError: a link, or a name in README.md, dataset_dict.json or state.json, leads out of the folder; a file is an
            archive, or a gzip file that expands to more than :func:`~bora_pyro.files.limits.largest_text`.
    """
    check_links(folder, "folder")
    for file in _files(folder):
        try:
            if not file.is_file():
                raise InputError(f"folder {str(folder)!r} holds {file.name!r}, which is not a regular file; move it away")
            if file.name in _CARDS:
                _check_names(folder, file, _of_card(file))
            elif file.name in _SAVED:
                _check_names(folder, file, _of_saved(file))
            else:
                _check_packed(folder, file)
        except OSError as error:
            raise InputError(f"file {str(file)!r} could not be read ({error.strerror or error})") from None


def _files(folder: Path) -> Iterator[Path]:
    """The files that `datasets` may read: it passes over names that begin with a point or two underscores."""
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (Path(above, name) for name in sorted(files) if name in _CARDS or not name.startswith((".", "__")))


def _check_packed(folder: Path, file: Path) -> None:
    with file.open("rb") as opened:
        head = opened.read(262)
    kind = next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), "tar" if head[257:] == b"ustar" else None)
    if kind:
        raise InputError(f"folder {str(folder)!r} holds {file.name!r}, a {kind} archive; unpack it, or move it away")
    if head.startswith(_GZIP):
        try:
            with gzip.open(file) as expanded:
                read_bounded(expanded, file, keep=False)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise InputError(f"file {str(file)!r} is not a whole gzip file; compress it again with gzip") from None


def _check_names(folder: Path, file: Path, names: list[Any]) -> None:
    for name in names:
        parts = PurePosixPath(name), PureWindowsPath(name)
        if "://" in name or any(path.anchor or ".." in path.parts for path in parts):
            raise InputError(
                f"folder {str(folder)!r} names {shown(name)} in {file.name}, which is not in it; name files of the folder alone"
            )


def _of_card(file: Path) -> list[str]:
    """The files that the YAML at the head of a data set's card says are the data."""
    with file.open("rb") as opened:
        raw = bytes(read_bounded(opened, file))
    head = _HEAD.match(raw) if file.name == "README.md" else None
    try:
        content = parse_mapping(head.group(1) if head else raw if file.name == _CARDS[1] else b"", as_text=True)
    except YamlError as error:
        raise InputError(f"file {str(file)!r} has YAML that is not used ({error}); mend it, or remove it") from None
    configs = content.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    return _texts([[config.get("data_files"), config.get("data_dir")] for config in configs])


def _of_saved(file: Path) -> list[str]:
    """The texts in what ``save_to_disk`` wrote of a data set's parts; among them are its files."""
    try:
        return _texts(json.loads(file.read_bytes()))
    except (ValueError, RecursionError):
        raise InputError(f"file {str(file)!r} is damaged; save the data set again") from None


def _texts(content: Any) -> list[str]:
    """All texts among the values of nested lists and mappings."""
    if isinstance(content, dict):
        content = [*content.values()]
    if isinstance(content, list):
        return [text for value in content for text in _texts(value)]
    return [content] if isinstance(content, str) else []
