"""What is freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Blocks of 8 MiB, every other of them freed: a heap would keep the gaps between the others.
PROGRAM = """
import sys, psutil, torch
from bora_pyro.backbone.allocator import give_back_freed_memory
if sys.argv[1] == "give":
    give_back_freed_memory()
big = torch.ones(7 * 2**20); del big  # by itself glibc now maps only blocks above 28 MiB
blocks = [torch.ones(2**21) for _ in range(40)]
held = psutil.Process().memory_info().rss
del blocks[::2]
print((held - psutil.Process().memory_info().rss) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")
def test_freed_blocks_go_back_where_they_would_stay_in_the_heap():
    freed = {
        how: float(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give")
    }
    assert freed["give"] > 150 > freed["keep"]
