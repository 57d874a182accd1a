"""Figure 2: test perplexity against the precision τ of the prior.

The original has a thick black line for all tasks together and a thin grey line for each of the 25 speakers, on a symmetric
logarithmic axis from 0 to 10⁴. Its minimum is at τ = 100. Here the limits τ = 0 and τ = ∞ are beyond breaks in the axis. The
first panel is the paper's, from its Tables 1 and 2. The second shows a sweep's means and seeds, the third the sweep's tasks.

The paper's two tables disagree at τ = 10: the geometric mean of Table 2's column is 13.77, but Table 1 has 12.85. At every
other τ they agree within 0.7 %. So the thick line may be too low at τ = 10.

    python paper_figures/figure2.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from common import corpus, output_option, read_sweep, reported_sweep, run, save, sweep_option
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots import style, tau_curve
from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import plain_log_ticks, tau_axis
from bora_pyro.diagnostics.sweep_table import at_best_rates, runs

#: The perplexities of single tasks have a logarithmic axis if the largest is more than so many times the smallest.
WIDE = 10


@dataclass(kw_only=True)
class Figure2Config:
    """Draw perplexity against the precision of the prior, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("figure2.png")


def draw(config: Figure2Config) -> str:
    """Draw the figure and return the path of its file."""
    table = read_sweep(config.sweep)
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
        tasks_and_all(reported_sweep(), axes[0])
        tau_curve(table, axes[1])
        tasks_and_all(table, axes[2])
        axes[0].set_title("BoRA paper: Talk of Norway")
        axes[1].set_title(f"this sweep: {corpus(config.sweep)}")
        axes[2].set_title(f"{corpus(config.sweep)}, by task")
        return save(figure, config.output)


def tasks_and_all(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw mean test perplexity by τ at the best learning rates: a thick line for all tasks, a thin line for each task."""
    best = at_best_rates(table)
    best = best[best["tau"] != "learned"]
    places = tau_axis(ax, best["tau"].unique())
    taus = list(places)
    by_task = best.pivot_table(index="task", columns="tau", values="task_test_perplexity")
    overall = runs(best).groupby("tau")["test_perplexity"].mean()
    taus = [tau for tau in taus if tau in by_task.columns and tau in overall.index]
    x = [places[tau] for tau in taus]
    for n, (task, line) in enumerate(by_task[taus].iterrows()):
        ax.plot(x, line, color="#A8A8A8", linewidth=0.8, label="one task" if n == 0 else None, gid=f"task {task}")
    ax.plot(x, overall[taus], color="black", linewidth=2.2, marker="o", label="all tasks", gid="all")
    ax.set_ylabel("test perplexity")
    if by_task[taus].max().max() > WIDE * by_task[taus].min().min():  # else one task with few documents hides all others
        ax.set_yscale("log")
        plain_log_ticks(ax, axis="y")
    legend_above(ax, ncols=2)
    return ax


if __name__ == "__main__":
    sys.exit(run(Figure2Config, draw, sys.argv[1:], __file__))
