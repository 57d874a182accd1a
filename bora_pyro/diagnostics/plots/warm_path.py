"""A table and a plot of a warm-started path, on which τ is relaxed step by step."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import BLUE, LIGHT, tau_axis


def warm_summary(table: pd.DataFrame) -> str:
    """A Markdown table of means over seeds, and a line with the τ of lowest validation perplexity.

    Args:
        table: rows in the order of the path, with the columns tau (text), seed, validation_perplexity, test_perplexity and
            seconds_so_far.
    """
    means = table.drop(columns="seed").groupby("tau", sort=False).mean()
    lines = ["| τ | validation perplexity | test perplexity | seconds so far |", "|---|---|---|---|"]
    for tau, row in means.iterrows():
        perplexities = f"{row.validation_perplexity:.2f} | {row.test_perplexity:.2f}"
        lines.append(f"| {'∞' if tau == 'inf' else tau} | {perplexities} | {row.seconds_so_far:.0f} |")
    # rounded, so that the first τ is chosen among those whose perplexities differ only by rounding
    return "\n".join([*lines, f"validation chooses tau = {means.validation_perplexity.round(4).idxmin()}"])


def warm_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the mean perplexity over seeds against τ along the path, for the test split with its standard deviation.

    Args:
        table: columns tau (text), seed, validation_perplexity, test_perplexity.
        ax: the axis to draw on.
    """
    places, seeds = tau_axis(ax, table.tau.unique()), table.seed.nunique()
    validation: dict[str, Any] = {"color": LIGHT, "marker": "s", "linestyle": "--", "label": "validation"}
    test: dict[str, Any] = {"color": BLUE, "marker": "o", "label": "test" + f", mean ± sd of {seeds} seeds" * (seeds > 1)}
    for column, style in (("validation_perplexity", validation), ("test_perplexity", test)):
        points = sorted((places[str(tau)], values.mean(), values.std()) for tau, values in table.groupby("tau")[column])
        x, mean, spread = zip(*points, strict=True)
        ax.plot(x, mean, **style)
        if column == "test_perplexity" and seeds > 1:
            sd = [0.0 if math.isnan(value) else value for value in spread]  # NaN: only one seed has come as far as this τ
            ax.errorbar(x, mean, sd, fmt="none", ecolor=BLUE, capsize=3, elinewidth=1)
    ax.set_ylabel("perplexity")
    legend_above(ax, ncols=2)
    return ax
