"""Plot of the test perplexity of a new task against its number of training documents, for several ways to adapt.

>>> import pandas as pd
>>> import matplotlib.pyplot as plt
>>> rows = [("bora", "0", 0, 80.0), ("bora", "5", 0, 75.0), ("scratch", "0", 0, 200.0), ("scratch", "5", 0, 150.0)]
>>> table = pd.DataFrame(rows, columns=["arm", "documents", "seed", "perplexity"])
>>> figure, ax = plt.subplots()
>>> _ = few_documents_curve(table, ax)
>>> [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]
['BoRA: Θ and τ given', 'LoRA from scratch']
>>> plt.close(figure)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from bora_pyro.diagnostics.plots.style import LINES, MARKERS, PALETTE

#: The arms of ``scripts/experiments/few_documents.py`` and their labels, in the order of the legend.
ARMS = {
    "bora": "BoRA: Θ and τ given",
    "scratch": "LoRA from scratch",
    "pooled": "pooled adapter, as it is",
    "pooled_tuned": "pooled adapter, trained further",
}

_TICKS = (10, 15, 20, 30, 40, 50, 60, 70, 80, 100, 120, 150, 200, 300, 400, 600, 1000)


def few_documents_curve(table: Any, ax: Axes) -> Axes:
    """Draw the mean and the range over seeds of the test perplexity of each arm.

    Args:
        table: one row per run with the columns arm, documents (a whole number as text, or ``all``), seed, perplexity.
        ax: the axis to draw on.
    """
    numbers = sorted(table["documents"].unique(), key=lambda text: (text == "all", int(text) if text != "all" else 0))
    places = {number: place for place, number in enumerate(numbers)}
    for arm, label in ARMS.items():
        rows = table[table["arm"] == arm]
        if rows.empty:
            continue
        summary = rows.groupby("documents")["perplexity"].agg(["mean", "min", "max"])
        summary = summary.loc[[number for number in numbers if number in summary.index]]
        n = [*ARMS].index(arm)
        x = np.array([places[number] for number in summary.index]) + 0.04 * (n - 1.5)  # shifted, so that arms do not overlap
        style: dict[str, Any] = {"color": PALETTE[n], "linestyle": LINES[n]}
        ax.plot(x, summary["mean"], marker=MARKERS[n], label=label, **style)
        ax.vlines(x, summary["min"], summary["max"], color=PALETTE[n], linewidth=1, alpha=0.7)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    ax.set_yticks(ticks, [f"{tick}" for tick in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(range(len(numbers)), numbers)
    ax.set_xlabel("training documents of the new task")
    ax.set_ylabel("test perplexity of the new tasks")
    ax.legend()
    return ax
