"""A tensor with one row for each task, in memory or in a memory-mapped file.

>>> rows = RowTensor(torch.zeros(1, 3), 10_000)
>>> rows.write(torch.tensor([4, 7]), torch.ones(2, 3))
>>> rows.read(torch.tensor([3, 4])).tolist()
[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.files.atomic import unwritable

# The number of rows that are copied at a time.
_CHUNK = 64


class RowTensor:
    """A tensor of rows that are read and written a few at a time. On CPUs, rows that were never written take no memory.

    Args:
        first: the initial values, of shape (1, *shape) for all rows alike, or (num_rows, *shape).
        num_rows: the number of rows.
        folder: keep the rows in a memory-mapped file in this folder, on the CPU. The file has no name, so no other process sees
            it, and it ends with this process. None keeps the rows in memory, on the device of ``first``.

    Raises:
        InputError: the folder cannot be written, or has too little space for all rows.
        ValueError: ``first`` has neither one row nor ``num_rows``.
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
        """The shape of all rows together: (num_rows, *shape)."""
        return self._values.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self._values.dtype

    def chunks(self) -> Iterator[Tensor]:
        """Copies of all rows in order, a few at a time."""
        for index in torch.arange(len(self._values)).split(_CHUNK):
            yield self.read(index)
            self.release_memory()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._first.numel() * self._first.element_size()

    def read(self, index: Tensor) -> Tensor:
        """A copy of the rows at positions ``index`` (n,): (n, *shape)."""
        rows = self._values[index.to(self._values.device)]
        new = ~self._written[index.cpu()]
        if new.any():
            rows[new.to(rows.device)] = self._first
        return rows

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Store ``rows`` (n, *shape) at positions ``index`` (n,)."""
        self._values[index.to(self._values.device)] = rows.to(self._values)
        self._written[index.cpu()] = True

    def copy_from(self, other: RowTensor) -> None:
        """Copy all rows from another ``RowTensor`` of the same shape."""
        for index in other.written().split(_CHUNK):
            self.write(index, other.read(index))
            self.release_memory()
            other.release_memory()
        missing = (self._written & ~other._written).nonzero()[:, 0]
        for index in missing.split(_CHUNK):
            self.write(index, other.read(index))

    def written(self) -> Tensor:
        """Positions of the rows that have been written: (n,) int64."""
        return self._written.nonzero()[:, 0]

    def all(self) -> Tensor:
        """All rows as one tensor, (num_rows, *shape). It is not a copy: changing it changes the rows."""
        missing = (~self._written).nonzero()[:, 0]
        for index in missing.split(_CHUNK):
            self.write(index, self._first.expand(len(index), *self._first.shape[1:]))
            self.release_memory()
        return self._values

    def release_memory(self) -> None:
        """Release the memory pages of the mapped file; the values stay in the file. Rows in memory are not affected."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def check_space(folder: Path, size: int) -> None:
    """Check that a disk has room for mapped files. Writing to a mapped file on a full disk kills the process without a message.

    Raises:
        InputError: the disk has fewer than ``size`` free bytes.
    """
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(above).free
    if size > free:
        raise InputError(
            f"the tasks' state takes {size / 2**30:.1f} GiB in files, and {above} has {free / 2**30:.1f} GiB free; give a larger "
            "task_memory, or a folder on another disk"
        )


def _mapped_file(size: int, folder: Path) -> mmap.mmap:
    """Map a file of zeros that has no name; the system removes it together with the mapping.

    Its disk space is reserved now if the system can do that. Otherwise a full disk would later kill the process without an
    error message.
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
