"""A setting of glibc's memory allocator for large tensors on CPUs."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

#: Blocks of at least this many bytes get a memory mapping of their own.
MAPPED_FROM = 2**22
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def give_back_freed_memory() -> None:
    """Make glibc return large blocks to the system when they are freed. Without glibc this does nothing.

    The setting holds for the whole process until it ends.

    By default glibc raises its threshold for mapped blocks to as much as 32 MiB, and takes smaller blocks from one heap. With
    gradient checkpointing, the blocks of a recomputed layer do not fit into the gaps of this heap. The heap then grows to one
    and a half times the memory in use. Mapped blocks avoid this but cost some time for each page.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
