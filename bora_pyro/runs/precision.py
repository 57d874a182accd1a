"""Find out by a short measurement whether a base runs faster in bfloat16 on this processor.

>>> precision, ratio = faster_precision(torch.device("cpu"))
>>> precision == ("bfloat16" if ratio >= PAYS else "float32")
True
"""

from __future__ import annotations

import time

import torch

#: How many times as fast matrix products must be in bfloat16. With AVX512-BF16 the products of SmolLM2, and a training step of
#: it, are about 1.7 times as fast; with AMX products are about four times as fast; without either they are slower.
PAYS = 1.3
#: The product that is timed: a batch of tokens through the feed-forward layer of a small model.
_ROWS, _IN, _OUT = 1024, 576, 1536


def faster_precision(device: torch.device) -> tuple[str, float]:
    """The precision for a base, and how many times as fast bfloat16 multiplies as float32.

    The measurement takes about a tenth of a second.

    Args:
        device: the device of the base. On others than CPUs nothing is measured: float32, with ratio 1.

    Returns:
        ``bfloat16`` or ``float32``, and the ratio of the two speeds.
    """
    if device.type != "cpu":
        return "float32", 1.0
    ratio = _seconds(torch.float32) / _seconds(torch.bfloat16)
    return ("bfloat16" if ratio >= PAYS else "float32"), ratio


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of some products: what else runs on the machine can only make one longer."""
    x, weight = torch.ones(_ROWS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(x, weight.mT)
        times.append(time.perf_counter() - begin)
    return min(times)
