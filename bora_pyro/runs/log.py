"""The log of a run: a file with one JSON record for each epoch.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     log = Log(Path(folder) / "metrics.jsonl")
...     for epoch in (1, 2):
...         log.append({"epoch": epoch, "loss": float("nan")})
...     log.cut(1)
...     log.read()
[{'epoch': 1, 'loss': None}]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file, unwritable
from bora_pyro.files.regular import read_regular
from bora_pyro.runs.record import strange_record

#: Size limit of a log, a split or a result that is read; with 10,000 tasks they take some megabytes.
MAX_BYTES = 2**30


class Log:
    """The log of a run.

    Args:
        file: the file, which may be missing.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. NaN and infinity are written as null."""
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record), ensure_ascii=False) + "\n")
        except OSError as error:
            raise unwritable(self.file, error) from error

    def cut(self, records: int) -> None:
        """Keep the first ``records`` lines. A run that continues from a checkpoint writes the later ones again."""
        if self.file.exists():
            self._rewrite(lambda content: b"".join(content.splitlines(keepends=True)[:records]))

    def drop_half_line(self) -> None:
        """Remove a last line that a killed run left incomplete, so that the next record starts on a new line."""
        if self.file.exists():
            self._rewrite(lambda content: content[: content.rfind(b"\n") + 1])

    def read(self) -> list[dict[str, Any]]:
        """Read the records. An incomplete last line, left by a killed run, is ignored.

        Raises:
            InputError: the file is damaged.
        """
        try:
            content = read_regular(self.file, most=MAX_BYTES) if self.file.exists() else b""
        except OSError as error:
            raise InputError(f"{self.file} cannot be read ({error}); fit again") from None
        lines = content.split(b"\n")[:-1]  # the rest is empty or an incomplete line
        try:
            records = [json.loads(line.decode("utf-8")) for line in lines]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.file} is damaged ({error}); fit again") from None
        for number, record in enumerate(records, start=1):
            if problem := strange_record(record):
                raise InputError(f"{self.file} is damaged (line {number} {problem}); fit again")
        return records

    def _rewrite(self, change: Callable[[bytes], bytes]) -> None:
        """Replace the file by a new one. A hard link to the old file, as in a copy of the folder, keeps the old content."""
        try:
            content, names = read_regular(self.file, most=MAX_BYTES), self.file.stat().st_nlink
        except OSError as error:
            raise unwritable(self.file, error) from None
        if (kept := change(content)) != content or names > 1:
            replace_file(self.file, lambda temporary: temporary.write_bytes(kept))


def finite(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
