"""Compressed files: one line for each method, and the first bytes by which files of other kinds are recognised.

>>> list(COMPRESSIONS)
['.gz', '.bz2', '.xz', '.zst', '.zip']
>>> what_begins_so(b"PAR1 and so on")
('a parquet file', '.parquet')
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, cast

import pyarrow

from bora_pyro.errors import InputError, shown


class Compression(NamedTuple):
    """A method of compression.

    Attributes:
        name: the name of the program.
        magic: the first bytes of its files.
        expand: opens the expanded bytes of an open file, whose name in errors is given too.
    """

    name: str
    magic: bytes
    expand: Callable[[BinaryIO, str], BinaryIO]


def _zip(raw: BinaryIO, label: str) -> BinaryIO:
    return cast(BinaryIO, zipfile.ZipFile(raw).open(zip_member(raw, label)))


def _xz(raw: BinaryIO, _: str) -> BinaryIO:
    return cast(BinaryIO, lzma.LZMAFile(raw, format=lzma.FORMAT_XZ))


def _zstandard(raw: BinaryIO, _: str) -> BinaryIO:
    return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))


#: The methods, by the ending of their files.
COMPRESSIONS: dict[str, Compression] = {
    ".gz": Compression("gzip", b"\x1f\x8b", lambda raw, _: cast(BinaryIO, gzip.GzipFile(fileobj=raw))),
    ".bz2": Compression("bzip2", b"BZh", lambda raw, _: cast(BinaryIO, bz2.BZ2File(raw))),
    ".xz": Compression("xz", b"\xfd7zXZ\x00", _xz),
    ".zst": Compression("zstd", b"\x28\xb5\x2f\xfd", _zstandard),
    ".zip": Compression("zip", b"PK\x03\x04", _zip),
}
# First bytes of files that are no text, with a name and the ending that they should have, if they can be read at all.
_OTHERS = [
    (b"PAR1", "a parquet file", ".parquet"), (b"\x04\x22\x4d\x18", "an lz4 file", ""),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", ""), (b"Rar!\x1a\x07", "a rar archive", ""), (b"%PDF-", "a PDF document", ""),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", ""),
    (b"ARROW1\0", "an Arrow file", ""), (b"SQLite format 3\0", "an SQLite database", ""), (b"{\\rtf", "an RTF document", ""),
]  # fmt: skip
# Names of the first part of an office file, which is a zip file.
_OFFICE = (b"[Content_Types].xml", b"_rels/", b"docProps/", b"xl/")


def what_begins_so(head: bytes) -> tuple[str, str] | None:
    """What kind of file begins with some bytes, and the ending for it; None if it may be text.

    Args:
        head: the first bytes of a file, 262 or more if it has so many.
    """
    if head.startswith(COMPRESSIONS[".zip"].magic):
        is_office = any(name in head[:64] for name in _OFFICE)
        return ("a spreadsheet or another office file", ".xlsx") if is_office else ("a zip file", ".zip")
    for ending, compression in COMPRESSIONS.items():
        if head.startswith(compression.magic) and (ending != ".bz2" or head[4:7] == b"1AY"):
            return f"a {compression.name} file" if compression.name != "xz" else "an xz file", ending
    if head[257:262] == b"ustar":
        return "a tar archive", ""
    return next(((what, ending) for magic, what, ending in _OTHERS if head.startswith(magic)), None)


def zip_member(raw: BinaryIO, label: str) -> zipfile.ZipInfo:
    """The only file in a zip file.

    Raises:
        InputError: there is none, there are several, or it is encrypted.
    """
    members = [
        member
        for member in zipfile.ZipFile(raw).infolist()
        if not member.is_dir() and not member.filename.startswith("__MACOSX/") and not member.filename.endswith(".DS_Store")
    ]
    if len(members) != 1:
        what = f"{len(members)} files, {', '.join(shown(m.filename) for m in members[:3])}..." if members else "no file"
        raise InputError(f"{label} holds {what}; give a zip file of one file, or unpack it")
    if members[0].flag_bits & 1:
        raise InputError(f"{label} is encrypted; unpack it")
    return members[0]
