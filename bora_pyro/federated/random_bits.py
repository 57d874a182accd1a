"""Random numbers for private steps: of the operating system's cryptographic generator, or of a seed.

>>> RandomBits(seed=1, name="ada").normal((2, 3)).shape
torch.Size([2, 3])

torch's generator is not cryptographic, and on CPUs it uses 32 bits of its seed: whoever sees a noisy sum could try all of them.
So nothing private comes from it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor


class RandomBits:
    """Uniform and Normal numbers that nobody else can know, or that a seed decides.

    Args:
        seed: the seed; None: every bit is of ``os.urandom``. Seeded bits are those of NumPy's PCG64, which is not cryptographic.
        name: clients with one seed and different names have different numbers.
    """

    def __init__(self, seed: int | None = None, name: str = "") -> None:
        if seed is None:
            self._bytes = os.urandom
            return
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        self._bytes = np.random.default_rng([seed, *np.frombuffer(digest, dtype="<u4").tolist()]).bytes

    def uniform(self, number: int) -> Tensor:
        """(number,) float64, strictly between 0 and 1: 53 bits each."""
        words = np.frombuffer(self._bytes(8 * number), dtype="<u8") >> np.uint64(11)
        # the largest word would be rounded up to 1
        return torch.from_numpy(np.minimum((words + 0.5) * 2.0**-53, 1 - 2.0**-53))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent Normal(0, 1) numbers, float64, by the inverse of the distribution function."""
        return torch.from_numpy(ndtri(self.uniform(math.prod(shape)).numpy())).view(tuple(shape))
