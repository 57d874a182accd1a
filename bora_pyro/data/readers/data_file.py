"""One file of data as a stream of bytes: whatever compresses it, and never more bytes than memory allows.

>>> import gzip, tempfile
>>> path = Path(tempfile.mkdtemp(), "speeches.csv.gz")
>>> _ = path.write_bytes(gzip.compress(b"task,text"))
>>> file = DataFile.of(path)
>>> file.kind, file.open().read()
('.csv', b'task,text')
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from bora_pyro.data.readers.compression import COMPRESSIONS, what_begins_so, zip_member
from bora_pyro.data.readers.texts import one_line
from bora_pyro.errors import InputError
from bora_pyro.files.limits import Budget
from bora_pyro.files.regular import open_regular

_BUFFER = 2**18


@dataclass(frozen=True)
class DataFile:
    """A file, on this machine or elsewhere.

    Attributes:
        name: its name in messages, as the user gave it.
        start: opens its bytes, as they are stored.
        ending: its ending in lower case, that of a compression included, such as ``.csv.gz``.
        whole: whether its table will be in memory as a whole; then its size is limited. A row is always limited.
        split: the split that the file belongs to, if its source says so.
    """

    name: str
    start: Callable[[], BinaryIO]
    ending: str
    whole: bool = True
    split: str | None = None

    @classmethod
    def of(cls, path: Path, *, name: str | None = None, whole: bool = True, split: str | None = None) -> DataFile:
        """A file on this machine. ``name`` is its name as the user gave it."""
        ending = "".join(suffix.lower() for suffix in path.suffixes[-2:])
        return cls(name or str(path), lambda: open_regular(path), ending, whole, split)

    @property
    def label(self) -> str:
        """The file in messages."""
        return f"file {self.name!r}"

    @property
    def packed(self) -> str:
        """The ending of the compression, or an empty text."""
        last = f".{self.ending.rpartition('.')[2]}"
        return last if last in COMPRESSIONS else ""

    @property
    def kind(self) -> str:
        """The last ending without that of the compression, such as ``.csv``. For a .zip file it may be that of its member."""
        ending = self.ending.removesuffix(self.packed)
        if not ending and self.packed == ".zip":
            with self.problems(), contextlib.closing(self.start()) as raw:
                ending = PurePosixPath(zip_member(raw, self.label).filename).suffix.lower()
        return f".{ending.rpartition('.')[2]}" if ending else ""

    @property
    def stem(self) -> str:
        """The file's name without its folders and its ending."""
        name = PurePosixPath(self.name.replace(os.sep, "/")).name
        name = name[: len(name) - len(self.packed)]
        return name[: len(name) - len(self.kind)] if name.lower().endswith(self.kind) else name

    def open(self) -> BinaryIO:
        """The expanded bytes. The caller closes the stream, and reads within :meth:`problems`."""
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(contextlib.closing(self.start()))
            inner = COMPRESSIONS[self.packed].expand(raw, self.label) if self.packed else raw
            stack.callback(inner.close)
            counted = _Counted(inner, Budget(self.label), stack.pop_all())
        return cast(BinaryIO, io.BufferedReader(counted, _BUFFER))

    def content(self) -> io.BytesIO:
        """All expanded bytes, in memory.

        Raises:
            InputError: they are more than memory allows, or the file is damaged.
        """
        with self.problems(), contextlib.closing(self.open()) as stream:
            return io.BytesIO(stream.read())

    @contextlib.contextmanager
    def problems(self) -> Iterator[None]:
        """Turn the errors of damaged files into ``InputError``."""
        try:
            yield
        # zipfile raises NotImplementedError for methods that it does not know, and RuntimeError for encrypted members
        except (zlib.error, lzma.LZMAError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise self.damaged(error) from error
        except OSError as error:
            if self.packed and error.errno is None:
                raise self.damaged(error) from error
            raise InputError(f"{self.label} could not be read ({error.strerror or error})") from error

    def damaged(self, error: Exception) -> InputError:
        """The error for a file that its compression's reader refuses."""
        if not self.packed:
            return InputError(f"{self.label} could not be read ({one_line(error)})")
        method = COMPRESSIONS[self.packed].name
        return InputError(f"{self.label} is not a whole {method} file ({one_line(error)}); compress it again with {method}")

    def check_is_text(self, head: bytes) -> None:
        """Raise ``InputError`` if the first bytes are those of a compressed file or of another known format."""
        if found := what_begins_so(head):
            what, ending = found
            name = PurePosixPath(self.name).name
            cure = (
                f"; name it {name + ending if ending in COMPRESSIONS else PurePosixPath(name).stem + ending!r}" if ending else ""
            )
            inside = ", inside its compression" if self.packed else ""
            raise InputError(f"{self.label} is no text: its first bytes are those of {what}{inside}{cure}")


class _Counted(io.RawIOBase):
    """A stream that counts what is read from another one, and closes it with all that belongs to it."""

    def __init__(self, inner: BinaryIO, budget: Budget, closing: contextlib.ExitStack) -> None:
        self.inner, self.budget, self.closing = inner, budget, closing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self.inner.read(len(buffer))
        self.budget.spend(len(chunk))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self.closing.close()
        super().close()
