"""Ratios of the test perplexities of two arms of ``compare_peers.py``, paired by seed or by task, with 95 % intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
from scipy import stats

#: Draws of the bootstrap.
BOOTSTRAP = 10_000


def by_seed(rows: pd.DataFrame, reference: pd.DataFrame) -> str:
    """The ratio of test perplexities, paired by seed: its geometric mean, with Student's 95 % interval over seeds.

    >>> table = pd.DataFrame({"test_perplexity": [11.0, 12.1]}, index=[0, 1])
    >>> by_seed(table, pd.DataFrame({"test_perplexity": [10.0, 11.0]}, index=[0, 1]))
    '+10.0 % (+10.0 to +10.0)'
    """
    logs = np.log((rows.test_perplexity / reference.test_perplexity).dropna().astype(float).to_numpy())
    if not len(logs):
        return ""
    middle = logs.mean()
    if len(logs) < 2:
        return _percent(middle)
    reach = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return f"{_percent(middle)} % ({_percent(middle - reach)} to {_percent(middle + reach)})".replace("% %", "%")


def by_task(rows: pd.DataFrame, reference: pd.DataFrame) -> str:
    """The ratio of the tasks' test perplexities, paired by seed and task: its geometric mean, with a bootstrap 95 % interval.

    The bootstrap draws tasks. A task's value is its mean over the seeds.
    """
    logs: dict[str, list[float]] = {}
    for seed in rows.index.intersection(reference.index):
        ours, theirs = (json.loads(str(table.tasks[seed])) for table in (reference, rows))
        for task, of_task in ours.items():
            if of_task["test"] is not None and theirs[task]["test"] is not None:
                logs.setdefault(task, []).append(math.log(theirs[task]["test"] / of_task["test"]))
    if not logs:
        return ""
    values = np.array([np.mean(of_task) for of_task in logs.values()])
    draws = np.random.default_rng(0).choice(values, (BOOTSTRAP, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{_percent(values.mean())} % ({_percent(low)} to {_percent(high)})"


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f}"


def mean_sd(values: pd.Series, digits: int = 2) -> str:
    """Mean and standard deviation, as ``1.50 ± 0.71``; the mean alone of one value."""
    values = values.astype(float)
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")
