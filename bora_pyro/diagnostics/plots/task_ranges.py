"""Plot of each task's perplexity at one τ and of its range over all τ.

>>> import matplotlib.pyplot as plt, pandas as pd
>>> perplexity = pd.DataFrame({"0": [20.0, 30.0], "inf": [25.0, 28.0]}, index=["ada (3)", "bo (9)"])
>>> figure, ax = plt.subplots()
>>> task_ranges(perplexity, "0", ax).get_xlabel()
'test perplexity of the task'
>>> plt.close(figure)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots.style import LIGHT

_TICKS = (2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)


def task_ranges(perplexity: pd.DataFrame, tau: str, ax: Axes) -> Axes:
    """Each task's perplexity at one τ as a point, and its range over all fixed τ as a line. All τ have the same limits.

    Args:
        perplexity: a row for each task, labelled as the axis should be, and a column for each τ, among them ``learned`` or not.
        tau: the column of the points.
        ax: axes to draw on.
    """
    rows, fixed = np.arange(len(perplexity)), perplexity.drop(columns="learned", errors="ignore")
    ax.hlines(rows, fixed.min(axis=1), fixed.max(axis=1), colors=LIGHT, linewidth=2)
    ax.plot(perplexity[tau], rows, "o")
    ax.set_yticks(rows, list(perplexity.index))
    ax.set_ylabel("task ($N_d$)")
    ax.set_xscale("log")
    values = perplexity.to_numpy(float)
    low, high = float(np.nanmin(values)) * 0.93, float(np.nanmax(values)) * 1.07
    ax.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low < tick < high]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.minorticks_off()
    ax.set_xlabel("test perplexity of the task")
    return ax
