"""Pack documents into batches that hold a number of tokens, padding included.

>>> [part.tolist() for part in pack(np.array([3, 9, 4, 2]), np.array([3, 0, 2, 1]), 12)]
[[3, 0, 2], [1]]
"""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, order: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut ``order`` into consecutive parts, as long as possible, with rows times longest document at most ``token_budget``."""
    members: list[np.ndarray] = []
    start = longest = 0
    for position, length in enumerate(lengths[order]):
        widened = max(longest, int(length))
        if position > start and (position - start + 1) * widened > token_budget:
            members.append(order[start:position].copy())
            start, widened = position, int(length)
        longest = widened
    if len(order):
        members.append(order[start:].copy())
    return members
