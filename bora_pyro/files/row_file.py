"""A tensor with a row for each of many tasks, in memory or in a memory-mapped file.

>>> rows = RowTensor(torch.zeros(1, 3), 10_000)
>>> rows.write(torch.tensor([4, 7]), torch.ones(2, 3))
>>> rows.read(torch.tensor([3, 4])).tolist()
[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bora_pyro.files.atomic import unwritable

# Rows that are copied at one time.
_CHUNK = 64


class RowTensor:
    """Rows that are read and written a few at a time; on CPUs those never written take no memory.

    Args:
        first: what the rows hold before they are written: (1, *shape) for all of them, or (rows, *shape).
        num_rows: how many rows there are.
        folder: where a file holds them, on the CPU, that no other process sees and that goes with this one; None: in memory,
            on the device of ``first``.

    Raises:
        InputError: the folder cannot be written, or has no room for all rows.
    """

    def __init__(self, first: Tensor, num_rows: int, *, folder: Path | None = None) -> None:
        if len(first) not in (1, num_rows):
            raise ValueError(f"{len(first)} first rows for {num_rows}; give one, or one each")
        self.folder, self._map = folder, None
        self._first = first.detach()[:1].clone()
        shape = (num_rows, *first.shape[1:])
        self._written = torch.zeros(num_rows, dtype=torch.bool)
        if folder is None:
            self._values = torch.empty(shape, dtype=first.dtype, device=first.device)
        else:
            self._first = self._first.cpu()
            self._map = _mapped_file(math.prod(shape) * first.element_size(), folder)
            self._values = torch.frombuffer(self._map, dtype=first.dtype).view(shape)
        if len(first) == num_rows > 1:
            self.write(torch.arange(num_rows), first.detach())

    @property
    def shape(self) -> torch.Size:
        """Of all rows together."""
        return self._values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self._values.dtype

    def chunks(self) -> Iterator[Tensor]:
        """All rows in order, a few at a time, copied."""
        for index in torch.arange(len(self._values)).split(_CHUNK):
            yield self.read(index)
            self.forget()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._first.numel() * self._first.element_size()

    def read(self, index: Tensor) -> Tensor:
        """The rows ``index`` (n,), copied: (n, *shape)."""
        rows = self._values[index.to(self._values.device)]
        new = ~self._written[index.cpu()]
        if new.any():
            rows[new.to(rows.device)] = self._first
        return rows

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Put ``rows`` (n, *shape) into the places ``index`` (n,)."""
        self._values[index.to(self._values.device)] = rows.to(self._values)
        self._written[index.cpu()] = True

    def copy_from(self, other: RowTensor) -> None:
        """Hold what another one of the same shape holds."""
        for index in other.written().split(_CHUNK):
            self.write(index, other.read(index))
            self.forget()
            other.forget()
        missing = (self._written & ~other._written).nonzero()[:, 0]
        for index in missing.split(_CHUNK):
            self.write(index, other.read(index))

    def written(self) -> Tensor:
        """Which rows have been written: (n,) int64."""
        return self._written.nonzero()[:, 0]

    def all(self) -> Tensor:
        """All rows as one tensor, (rows, *shape), which stays the store's own."""
        missing = (~self._written).nonzero()[:, 0]
        for index in missing.split(_CHUNK):
            self.write(index, self._first.expand(len(index), *self._first.shape[1:]))
            self.forget()
        return self._values

    def forget(self) -> None:
        """Give the memory of what has been read and written back to the system: the file has it."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_file(size: int, folder: Path) -> mmap.mmap:
    """A file of zeros without a name, mapped: the system removes it when the mapping goes.

    Its space is taken at once where the system can: a page that found no room later would end the process without a word.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix="task-rows-")
        try:
            os.unlink(name)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, max(size, 1))
            else:
                os.truncate(handle, max(size, 1))
            return mmap.mmap(handle, max(size, 1))
        finally:
            os.close(handle)
    except OSError as error:
        raise unwritable(folder, error) from error
