"""Plots that check approximate posteriors: their scales against a gold standard, and the uniformity of their ranks.

Each function takes data and an axis, and returns the axis.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> ax = rank_histogram({"normal": [12, 8, 11, 9]}, ax)
>>> ax.get_xlabel()
'rank of the true value'
>>> plt.close(figure)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import binom

from bora_pyro.diagnostics.plots.style import GREY, LIGHT, LINES, MARKERS, PALETTE
from bora_pyro.errors import InputError

#: Labels of the quantities of ``scripts/experiments/gold_standard.py``.
_QUANTITIES = {"mean": "Θ", "deviation": "θ − Θ", "theta": "θ"}


def scale_scatter(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a guide's posterior standard deviations against those of NUTS, one point per entry.

    A guide is too narrow for the entries below the diagonal.

        >>> import matplotlib.pyplot as plt
        >>> table = {"quantity": ["mean", "theta"], "documents": [0, 4], "nuts_sd": [0.2, 0.3], "sd": [0.1, 0.3]}
        >>> figure, ax = plt.subplots()
        >>> [text.get_text() for text in scale_scatter(pd.DataFrame(table), ax).get_legend().get_texts()]
        ['Θ', 'θ, N = 4']
        >>> plt.close(figure)

    Args:
        ax: the axis to draw on; x and y become logarithmic, with the same limits.
        table: the rows of one guide from the table of ``scripts/experiments/gold_standard.py``, with the columns quantity,
            documents, nuts_sd and sd.

    Raises:
        InputError: if a column is missing, there is no row, or a standard deviation is not positive.
    """
    needed = ["quantity", "documents", "nuts_sd", "sd"]
    if missing := [name for name in needed if name not in table.columns]:
        raise InputError(f"the table lacks the column {', '.join(missing)}; give that of gold_standard.py")
    values = table[["nuts_sd", "sd"]].to_numpy(float)
    if not len(values) or not (np.isfinite(values).all() and (values > 0).all()):
        raise InputError(
            "the table has no row, or a standard deviation that is not a number above 0; give that of gold_standard.py"
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = values.min() / 1.2, values.max() * 1.2
    ax.axline((low, low), (high, high), color=GREY, linewidth=0.8, gid="diagonal")
    colors = dict(zip(_QUANTITIES, PALETTE, strict=False))
    seen: dict[str, int] = {}
    for (quantity, documents), rows in table.groupby(["quantity", "documents"], sort=False):
        kind = str(quantity)
        marker = MARKERS[seen.setdefault(kind, 0) % len(MARKERS)]
        seen[kind] += 1
        name = _QUANTITIES.get(kind, kind) + (f", N = {documents}" if documents else "")
        ax.plot(
            rows["nuts_sd"], rows["sd"], linestyle="none", marker=marker, markersize=3.5, color=colors.get(kind, GREY), alpha=0.7,
            label=name, gid=f"{kind} {documents}",
        )  # fmt: skip
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("posterior sd, NUTS")
    ax.set_ylabel("posterior sd, guide")
    ax.legend(handletextpad=0.1, labelspacing=0.2)
    return ax


def rank_histogram(counts: Mapping[str, Sequence[int]], ax: Axes, *, level: float = 0.95) -> Axes:
    """Draw histograms of the ranks of simulation-based calibration, relative to a uniform histogram (Talts et al., 2018).

    If the ranks are uniform, each bin lies in the grey band with probability ``level`` (for the largest number of simulations).
    Many ranks at both ends mean that the posterior is too narrow. Many in the middle mean that it is too wide. Many at one end
    mean a bias.

    Args:
        ax: the axis to draw on.
        counts: for each guide, the number of simulations in each bin. All bins have the same number of ranks.
        level: probability of the band, between 0 and 1.

    Raises:
        InputError: if there is no guide, one has no simulation, the numbers of bins differ, or the level is out of range.
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give a number between 0 and 1, nearest: 0.95")
    histograms = {name: np.asarray(values, float) for name, values in counts.items()}
    if len({len(values) for values in histograms.values()}) != 1 or not all(values.sum() for values in histograms.values()):
        raise InputError("the histograms must have the same number of bins, and a simulation each; give those of one table")
    bins = len(next(iter(histograms.values())))
    edges = np.linspace(0, 1, bins + 1)
    most = int(max(values.sum() for values in histograms.values()))
    low, high = (bound * bins / most for bound in binom.interval(level, most, 1 / bins))
    ax.axhspan(low, high, color=LIGHT, alpha=0.5, linewidth=0, gid="band")
    styles: Sequence[Any] = list(zip(PALETTE, LINES, strict=True))
    for n, (name, values) in enumerate(histograms.items()):
        color, line = styles[n % len(styles)]
        relative = values * bins / values.sum()
        ax.stairs(relative, edges, color=color, linestyle=line, linewidth=1.2, label=name, gid=name, baseline=None)
    ax.set_xlim(0, 1)
    ax.set_ylim(bottom=0)
    ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    ax.set_xlabel("rank of the true value")
    ax.set_ylabel("frequency / uniform")
    return ax
