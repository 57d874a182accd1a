"""The learning rate of each step, and the seeds of epochs and steps.

>>> [schedule(step, 4, 0.5) for step in range(4)]
[0.5, 1.0, 1.0, 0.5]
"""

from __future__ import annotations

import math


def schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over ``warmup`` of the steps, then a cosine to 0: a factor of the largest rate.

    Args:
        step: number of the step, from 0.
        total: number of steps of the fit.
        warmup: fraction of the steps, from 0 to 1.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of the order of documents in one epoch."""
    return (seed * 100_003 + epoch) % 2**32  # NumPy, which Pyro seeds too, takes no larger one


def step_seed(seed: int, epoch: int, number: int) -> int:
    """The seed of the draws in one step of an epoch."""
    return (epoch_seed(seed, epoch) * 65_537 + number) % 2**32
