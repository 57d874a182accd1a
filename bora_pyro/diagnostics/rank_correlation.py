"""Spearman's rank correlation over tasks, with a bootstrap interval: do tasks with few documents gain more?

>>> print(rank_correlation([4, 8, 16, 32, 64], [9.0, 7.0, 8.0, 2.0, 1.0]))
ρ = −0.90 (95 %: −1.00 to −0.11; 5 tasks)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from bora_pyro.errors import InputError

#: The fewest tasks whose ranks say anything.
FEWEST = 3
#: The largest share of the tasks that may have the same value. Above it ρ compares a few tasks with all others.
MOST_ALIKE = 0.75


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation and its interval.

    Attributes:
        rho: the correlation, from −1 to 1; NaN if more than ``MOST_ALIKE`` of the tasks have one value of one of the variables.
        low, high: the ends of the interval; NaN if ``rho`` is.
        tasks: the number of tasks.
        probability: that of the interval.
        alike: the largest number of tasks with the same value of one of the variables.
    """

    rho: float
    low: float
    high: float
    tasks: int
    probability: float = 0.95
    alike: int = 1

    def __str__(self) -> str:
        if np.isnan(self.rho):
            return f"ρ says nothing: {self.alike} of {self.tasks} tasks are alike"
        rho, low, high = (f"{value:.2f}".replace("-", "−") for value in (self.rho, self.low, self.high))
        return f"ρ = {rho} ({100 * self.probability:g} %: {low} to {high}; {self.tasks} tasks)"


def rank_correlation(
    x: Sequence[float] | Any, y: Sequence[float] | Any, *, probability: float = 0.95, draws: int = 10_000, seed: int = 0
) -> RankCorrelation:
    """Spearman's ρ: Pearson's correlation of the ranks (ties have their mean rank), with a percentile bootstrap over tasks.

        >>> rank_correlation([1, 2, 3], [5, 6, 9]).rho
        1.0

    Each draw of the bootstrap takes as many tasks as there are, with replacement, and ranks them anew. A draw in which one of
    the variables is constant has no correlation and is left out. The interval describes how much ρ depends on which tasks the
    corpus has. It does not contain the noise of fits and splits: give means over seeds.

    Args:
        x: (tasks,) one variable, such as N_d.
        y: (tasks,) the other, such as a gain. A task with a NaN in either is left out.
        probability: of the interval.
        draws: number of draws of the bootstrap.
        seed: seed of the bootstrap.

    Raises:
        InputError: there are fewer than three tasks, or the lengths differ.
    """
    values = [np.asarray(value, dtype=float) for value in (x, y)]
    if values[0].shape != values[1].shape or values[0].ndim != 1:
        raise InputError(f"x and y have the shapes {values[0].shape} and {values[1].shape}; give one number a task in both")
    whole = np.stack(values)
    whole = whole[:, np.isfinite(whole).all(0)]  # (2, tasks)
    tasks = whole.shape[1]
    if tasks < FEWEST:
        raise InputError(f"{tasks} tasks have both values; a rank correlation needs {FEWEST} or more")
    alike = max(int(np.unique(values, return_counts=True)[1].max()) for values in whole)
    if alike > MOST_ALIKE * tasks:
        return RankCorrelation(np.nan, np.nan, np.nan, tasks, probability, alike)
    rho = float(_spearman(whole[:, None])[0])
    index = np.random.default_rng(seed).integers(tasks, size=(draws, tasks))
    drawn = _spearman(whole[:, index])
    low, high = np.nanquantile(drawn, [(1 - probability) / 2, (1 + probability) / 2])
    return RankCorrelation(rho, float(low), float(high), tasks, probability, alike)


def _spearman(values: np.ndarray) -> np.ndarray:
    """(2, draws, tasks) -> (draws,) correlations of ranks; NaN where a variable is constant."""
    ranks = rankdata(values, axis=-1)
    x, y = ranks - ranks.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(len(scale), np.nan), where=scale > 0)
