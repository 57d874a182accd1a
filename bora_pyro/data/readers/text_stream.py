"""The lines of a text file, decoded and counted. Errors name the line.

>>> import tempfile
>>> from pathlib import Path
>>> path = Path(tempfile.mkdtemp(), "a.csv")
>>> _ = path.write_bytes(b"task,text\\nAda,caf\\xe9\\n")
>>> with TextStream(DataFile.of(path, name="a.csv")) as stream:
...     list(stream)
Traceback (most recent call last):
bora_pyro.errors.InputError: file 'a.csv' is not UTF-8: byte 0xe9 in line 2 (position 17 of the file); save the file as UTF-8, ...
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator

from bora_pyro.data.readers.data_file import DataFile
from bora_pyro.errors import InputError

# Marks at the start of a file that say how it is encoded; the longer ones first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_HEAD, _CHUNK = 300, 2**20


class TextStream:
    """An open text file, for a ``with`` block.

    Iterating gives its lines with their ends; a line ends at LF, CR or both. The errors of damaged files become ``InputError``.

    Args:
        file: the file.
        encoding: its encoding; None: UTF-8, or what a mark at its start says.

    Attributes:
        notes: one line if the file is not UTF-8.
        pending: the lines since :meth:`renew`.
    """

    def __init__(self, file: DataFile, encoding: str | None = None) -> None:
        self.file, self.given, self.notes, self.pending = file, encoding, list[str](), list[str]()

    def __enter__(self) -> TextStream:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.file.problems())
            self._bytes = stack.enter_context(contextlib.closing(self.file.open()))
            head = self._bytes.peek(_HEAD)[:_HEAD]  # type: ignore[attr-defined]  # a BufferedReader
            mark = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
            self.encoding = self._encoding(mark)
            if self.given is None and mark not in (None, "utf-8-sig"):
                self.notes.append(f"{self.file.label} is read as {str(mark).upper()}, as the mark at its start says")
            if mark is None:
                self.file.check_is_text(head)
            self._text = io.TextIOWrapper(self._bytes, encoding=self.encoding, newline="")
            self._closing = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool | None:
        if isinstance(error, UnicodeError):
            with contextlib.suppress(OSError):
                self._bytes.close()
            raise self._undecodable() from None
        return self._closing.__exit__(kind, error, trace)  # type: ignore[arg-type]  # the types of an exit are exact in contextlib

    def __iter__(self) -> Iterator[str]:
        pending = self.pending
        for line in self._text:
            if "\0" in line:
                raise InputError(
                    f"{self.file.label} has a NUL byte in its text; write it without, or give its encoding, as in "
                    "--encoding utf-16-le"
                )
            pending.append(line)
            yield line

    def renew(self) -> None:
        """Say that the row of the pending lines is done: its bytes no longer count, unless the whole table is kept."""
        self.pending.clear()
        if not self.file.whole:
            self._bytes.raw.budget.renew()  # type: ignore[attr-defined]  # its raw stream counts bytes

    def read(self) -> str:
        """The whole text."""
        return self._text.read()

    def _encoding(self, mark: str | None) -> str:
        """The encoding to read with; a mark at the start of the file is no part of its text."""
        name = codecs.lookup(self.given or mark or "utf-8").name
        family = name.removesuffix("-le").removesuffix("-be").removesuffix("-sig")
        if mark is not None and family != mark.removesuffix("-sig"):
            says = f"the mark at its start says {mark.removesuffix('-sig').upper()}"
            raise InputError(f"{self.file.label}: encoding is {self.given}, but {says}; leave encoding out")
        return "utf-8-sig" if family == "utf-8" else mark or name

    def _undecodable(self) -> InputError:
        """The error for the first bytes that cannot be decoded."""
        decoder, place, line = codecs.getincrementaldecoder(self.encoding)(), 0, 1
        with self.file.problems(), contextlib.closing(self.file.open()) as stream:
            while chunk := stream.read(_CHUNK):
                try:
                    line += decoder.decode(chunk).count("\n")
                    place += len(chunk)
                    continue
                except UnicodeDecodeError as error:
                    line += error.object[: error.start].count(b"\n")
                    place += error.start - (len(error.object) - len(chunk))
                    byte = f"byte 0x{error.object[error.start]:02x} in line {line} (position {place} of the file)"
                except UnicodeError as error:
                    byte = str(error)
                return self._not_so(byte)
        return self._not_so(f"it ends within a character, in line {line}")

    def _not_so(self, byte: str) -> InputError:
        if self.encoding == "utf-8-sig":
            what, cure = "UTF-8", "save the file as UTF-8, or give its encoding, as in --encoding latin-1"
        else:
            what, cure = self.encoding, "give the encoding that the file has"
        return InputError(f"{self.file.label} is not {what}: {byte}; {cure}")
