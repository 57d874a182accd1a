"""How glibc's allocator treats the memory of large tensors on CPUs."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

#: Blocks from this size on are mapped by themselves.
MAPPED_FROM = 2**22
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def give_back_freed_memory() -> None:
    """Let large blocks go back to the system when they are freed, in this process, for good; elsewhere than on glibc do nothing.

    By itself glibc raises the size from which it maps blocks up to 32 MiB and cuts what is smaller out of one heap, where blocks
    of a layer that is computed again find no gap that fits, and the heap grows: with gradient checkpointing by half as much
    again as is in use. Mapped blocks cost some time for each page.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
