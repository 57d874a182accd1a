"""What is freed goes back to the system."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from bora_pyro.backbone.allocator import give_back_freed_memory
from tests.forked import Forked


def free_blocks(give):
    """Print how many MiB the process shrinks by where every other block of 8 MiB is freed: a heap would keep the gaps."""
    if give:
        give_back_freed_memory()
    big = torch.ones(7 * 2**20)
    del big  # by itself glibc now maps only blocks above 28 MiB
    blocks = [torch.ones(2**21) for _ in range(40)]
    held = psutil.Process().memory_info().rss
    del blocks[::2]
    print((held - psutil.Process().memory_info().rss) / 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")
def test_freed_blocks_go_back_where_they_would_stay_in_the_heap(tmp_path):
    kept, given = (float(Forked(tmp_path / str(give), free_blocks, give).end().out) for give in (False, True))
    assert given > 150 > kept
