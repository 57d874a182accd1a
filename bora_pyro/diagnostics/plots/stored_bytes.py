"""Plot of the test perplexity of kinds of adapters against the bytes that a task's adapter takes on the disk.

>>> import pandas as pd
>>> import matplotlib.pyplot as plt
>>> rows = [("lora@1", 0, 1000, 18.0), ("lora@8", 0, 8000, 17.0), ("nola@0.5", 0, 500, 18.5)]
>>> table = pd.DataFrame(rows, columns=["arm", "seed", "stored_bytes", "test_perplexity"])
>>> figure, ax = plt.subplots()
>>> _ = perplexity_by_bytes(table, ax)
>>> [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]
['LoRA', 'NOLA']
>>> plt.close(figure)
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots.style import LINES, MARKERS, PALETTE, plain_log_ticks

#: The adapters of ``scripts/experiments/compare_adapters.py`` and their labels, in the order of the legend.
ADAPTERS = {
    "lora": "LoRA",
    "lora_frozen_a": "LoRA, frozen A",
    "nola": "NOLA",
    "soka": "SoKA",
    "triadapt": "TriAdaptLoRA",
    "osft": "OSFT (LoRA)",
    "sara": "SaRA",
    "sara_random": "SaRA, random entries",
}
#: Adapters of one budget have nearly the same bytes. Each one is drawn further to the right by this factor.
SHIFT = 1.025


def perplexity_by_bytes(table: Any, ax: Axes) -> Axes:
    """Draw the mean and the range over seeds of each adapter at each of its sizes, and join the sizes of one adapter.

    Args:
        table: one row per fit with the columns arm (``<adapter>@<budget>``), seed, stored_bytes (of a task) and test_perplexity.
            Adapters that `ADAPTERS` does not name are left out.
        ax: the axis to draw on.
    """
    rows = table.assign(adapter=table["arm"].str.partition("@")[0])
    for n, (adapter, label) in enumerate(ADAPTERS.items()):
        own = rows[rows["adapter"] == adapter]
        if own.empty:
            continue
        sizes = own.groupby("arm").agg(
            kilobytes=("stored_bytes", lambda value: value.astype(float).mean() / 1000),
            mean=("test_perplexity", "mean"),
            low=("test_perplexity", "min"),
            high=("test_perplexity", "max"),
        )
        sizes = sizes.sort_values("kilobytes")
        x = sizes["kilobytes"] * SHIFT ** (n - len(ADAPTERS) // 2)
        line: dict[str, Any] = {"color": PALETTE[n], "linestyle": LINES[n], "marker": MARKERS[n], "label": label}
        ax.plot(x, sizes["mean"], **line)
        ax.vlines(x, sizes["low"], sizes["high"], color=PALETTE[n], linewidth=1, alpha=0.7)
    ax.set_xscale("log")
    plain_log_ticks(ax)
    ax.set_xlabel("stored kilobytes of a task's adapter")
    ax.set_ylabel("test perplexity")
    return ax
