"""The learning rate of each step, and the seeds of epochs and steps.

>>> [schedule(step, 4, 0.5) for step in range(4)]
[0.5, 1.0, 1.0, 0.5]
>>> [schedule(step, 4, 0.5, CONSTANT) for step in range(4)]
[0.5, 1.0, 1.0, 1.0]
"""

from __future__ import annotations

import math

#: The two schedules, by the name that a configuration gives them.
COSINE, CONSTANT = SCHEDULES = ("cosine", "constant")


def schedule(step: int, total: int, warmup: float, kind: str = COSINE) -> float:
    """The learning rate of a step, as a fraction of the largest one: a linear warm-up, then a cosine to 0, or a constant.

    Args:
        step: number of the step, from 0.
        total: number of steps of the fit.
        warmup: fraction of the steps in the warm-up, from 0 to 1.
        kind: what follows the warm-up, one of ``SCHEDULES``.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    if kind == CONSTANT:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of the order of documents in one epoch."""
    return (seed * 100_003 + epoch) % 2**32  # Pyro also seeds NumPy, which takes no larger seed


def step_seed(seed: int, epoch: int, number: int) -> int:
    """The seed of the draws in one step of an epoch."""
    return (epoch_seed(seed, epoch) * 65_537 + number) % 2**32
