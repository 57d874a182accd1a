"""Compare the posterior standard deviations and the predictions of each guide with those of NUTS.

There is one panel for each guide. A point is an entry of Θ, of a task's deviation θ_d − Θ, or of θ_d itself. Below the diagonal
the guide is too narrow. Two more panels compare predictions on held-out documents with those of NUTS: the mean absolute
difference of next-token probabilities, and the difference of the mean log density of a token. The row ``nuts`` compares two
chains of NUTS and shows the noise of the comparison. The paper has no such figure.

    python paper_figures/gold_standard_figure.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from common import output_option, read_table, run, save
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots import scale_scatter, style
from bora_pyro.diagnostics.plots.style import BLUE, GREY
from bora_pyro.errors import InputError
from bora_pyro.options.field import option

COLUMNS = ["guide", "quantity", "documents", "nuts_sd", "sd"]
SUMMARY_COLUMNS = ["guide", "log_density", "probability_difference"]
MADE_BY = "make it with gold_standard.py"


@dataclass(kw_only=True)
class GoldStandardFigureConfig:
    """Draw the guides' standard deviations and predictions against those of NUTS."""

    gold_standard: str = option("results/gold_standard.csv", "the table of entries of gold_standard.py")
    summary: str = option("results/gold_standard_summary.csv", "the table of guides of gold_standard.py")
    output: str = output_option("gold_standard.png")


def draw(config: GoldStandardFigureConfig) -> str:
    """Draw the figure and return the path of its file."""
    table = read_table(config.gold_standard, COLUMNS, made_by=MADE_BY)
    summary = read_table(config.summary, SUMMARY_COLUMNS, made_by=MADE_BY).set_index("guide")
    if "nuts" not in summary.index:
        raise InputError(f"table {config.summary} has no row 'nuts'; {MADE_BY}")
    guides = list(table["guide"].unique())
    columns = len(guides) // 2 + 1  # at least one cell stays free for the legend
    values = table[["nuts_sd", "sd"]].to_numpy()
    ends = values.min() / 1.2, values.max() * 1.2
    with style():
        figure = plt.figure(figsize=(3.3 * (columns + 1), 6.6))
        grid = figure.add_gridspec(2, columns + 1)
        for n, guide in enumerate(guides):
            ax = scale_scatter(table[table["guide"] == guide], figure.add_subplot(grid[n // columns, n % columns]))
            ax.set(title=guide, xlim=ends, ylim=ends)
            if (legend := ax.get_legend()) is not None:
                legend.remove()
        free = figure.add_subplot(grid[1, columns - 1])
        free.set_axis_off()
        free.legend(*ax.get_legend_handles_labels(), loc="center", title="entries of")
        rows = summary.loc[[name for name in ("truth", "nuts", "map", *guides) if name in summary.index]]
        dots(figure.add_subplot(grid[0, columns]), rows["probability_difference"], "mean |p − p of NUTS|, next token")
        difference = 1000 * (rows["log_density"] - float(rows["log_density"]["nuts"]))
        dots(figure.add_subplot(grid[1, columns]), difference, "log density − NUTS, $10^{-3}$ nats a token")
        return save(figure, config.output)


def dots(ax: Axes, values: pd.Series, label: str) -> None:
    """Draw one dot for each value, the first on top, joined by a line to 0."""
    places = range(len(values))[::-1]
    ax.hlines(places, 0, values, color=GREY, linewidth=0.8)
    ax.plot(values, places, linestyle="none", marker="o", color=BLUE)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(list(places), list(values.index))
    ax.set_xlabel(label)


if __name__ == "__main__":
    sys.exit(run(GoldStandardFigureConfig, draw, sys.argv[1:], __file__))
