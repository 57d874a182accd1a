"""Check a folder of data before ``datasets`` reads it: nothing leads out of it, and nothing expands to too large a size.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "README.md").write_text("---\\nconfigs:\\n- data_files: ../../secret.csv\\n---\\n")
>>> check_folder(folder)
Traceback (most recent call last):
bora_pyro.errors.InputError: folder ... names '../../secret.csv' in README.md, which is not in it; name only files of the folder
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

from bora_pyro.data.readers.compression import COMPRESSIONS
from bora_pyro.errors import InputError, shown
from bora_pyro.files.limits import read_bounded
from bora_pyro.files.regular import check_links
from bora_pyro.files.safe_yaml import YamlError, parse_mapping

# First bytes of the archives that `datasets` unpacks, whatever the name of the file is.
_ARCHIVES = {
    b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar",
}  # fmt: skip
_GZIP = b"\x1f\x8b"
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
_SAVED = ("dataset_dict.json", "state.json")
# Data set cards, which may list the data files: README.md in YAML front matter between two lines of hyphens, the other as YAML.
_CARDS = ("README.md", ".huggingface.yaml")
_FRONT_MATTER = re.compile(rb"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)


def check_folder(folder: Path) -> None:
    """Check that nothing in a folder leads out of it, and that it holds no archive.

    Raises:
        InputError: a link, or a file name in a data set card, dataset_dict.json or state.json, leads out of the folder; a file
            is an archive, or a gzip file that expands to more than :func:`~bora_pyro.files.limits.largest_text` bytes.
    """
    check_links(folder, "folder")
    for file in _files(folder):
        try:
            if not file.is_file():
                raise InputError(f"folder {str(folder)!r} holds {file.name!r}, which is not a regular file; move it away")
            if file.name in _CARDS:
                _check_names(folder, file, _names_in_card(file))
            elif file.name in _SAVED:
                _check_names(folder, file, _names_in_saved(file))
            elif not _is_packed_table(file):
                _check_not_archive(folder, file)
        except OSError as error:
            raise InputError(f"file {str(file)!r} could not be read ({error.strerror or error})") from None


def has_listed_files(folder: Path) -> bool:
    """Whether a data set card in the folder lists the data files."""
    return any(_names_in_card(folder / name) for name in _CARDS if (folder / name).is_file())


def _is_packed_table(file: Path) -> bool:
    """Whether a file is a compressed table by its name. Its reader limits the expanded size, and unpacks nothing on the disk."""
    return file.suffix.lower() == ".xlsx" or any(
        file.name.lower().endswith(f"{kind}{packed}") for kind in _TABLES for packed in COMPRESSIONS
    )


def _files(folder: Path) -> Iterator[Path]:
    """The files that `datasets` may read. It skips names that begin with a dot or with two underscores, except the cards."""
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from (Path(above, name) for name in sorted(files) if name in _CARDS or not name.startswith((".", "__")))


def _check_not_archive(folder: Path, file: Path) -> None:
    with file.open("rb") as opened:
        head = opened.read(262)
    kind = next((kind for magic, kind in _ARCHIVES.items() if head.startswith(magic)), "tar" if head[257:] == b"ustar" else None)
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
                f"folder {str(folder)!r} names {shown(name)} in {file.name}, which is not in it; name only files of the folder"
            )


def _names_in_card(file: Path) -> list[str]:
    """Names of the data files in a data set card."""
    with file.open("rb") as opened:
        raw = bytes(read_bounded(opened, file))
    head = _FRONT_MATTER.match(raw) if file.name == "README.md" else None
    try:
        content = parse_mapping(head.group(1) if head else raw if file.name == _CARDS[1] else b"", as_text=True)
    except YamlError as error:
        raise InputError(f"file {str(file)!r} has YAML that cannot be used ({error}); correct it, or remove it") from None
    configs = content.get("configs")
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    return _texts([[config.get("data_files"), config.get("data_dir")] for config in configs])


def _names_in_saved(file: Path) -> list[str]:
    """All texts in a JSON file of ``save_to_disk``. The names of the data files are among them."""
    try:
        return _texts(json.loads(file.read_bytes()))
    except (ValueError, RecursionError):
        raise InputError(f"file {str(file)!r} is damaged; save the data set again") from None


def _texts(content: Any) -> list[str]:
    """All texts in the values of nested lists and mappings."""
    if isinstance(content, dict):
        content = [*content.values()]
    if isinstance(content, list):
        return [text for value in content for text in _texts(value)]
    return [content] if isinstance(content, str) else []
