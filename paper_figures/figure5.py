"""Figure 5: the perplexity of each task against its number of training documents.

The original has a point for each speaker at τ = 100. It has no trend: a speaker with many documents is not predicted better.
Three speakers are far above the others. Here the paper's panel is from its Table 2, and the sweep's panel is at its best τ
between the limits. The titles have Spearman's rank correlation ρ of perplexity and N_d over tasks, with a bootstrap interval. The
script also prints that of a learned τ, where the sweep has one.

    python paper_figures/figure5.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from common import (
    PAPER_BEST,
    best_between_limits,
    corpus,
    means_by_task,
    output_option,
    read_sweep,
    reported_sweep,
    run,
    save,
    sweep_option,
    trend,
    with_trends,
)
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots import place_labels, style
from bora_pyro.diagnostics.plots.style import tau_text
from bora_pyro.diagnostics.plots.sweeps import documents_axis
from bora_pyro.diagnostics.sweep_table import LEARNED


@dataclass(kw_only=True)
class Figure5Config:
    """Draw each task's perplexity against its documents, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("figure5.png")


def draw(config: Figure5Config) -> str:
    """Draw the figure and return the path of its file."""
    table, trends = read_sweep(config.sweep), dict[str, str]()
    best, name = best_between_limits(table), corpus(config.sweep)
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
        for ax, title, sweep, tau in (
            (axes[0], "BoRA paper: Talk of Norway", reported_sweep(), PAPER_BEST),
            (axes[1], f"this sweep: {name}", table, best),
        ):
            tasks = means_by_task(sweep, tau)
            trends[f"{title}, τ = {tau}"] = text = perplexity_trend(tasks)
            ax.set_title(f"{title}, τ = {tau_text(tau)}\n{text}", fontsize="small")
            perplexity_by_documents(tasks, ax)
        path = save(figure, config.output)
    if LEARNED in set(table["tau"]):
        trends[f"this sweep: {name}, learned τ"] = perplexity_trend(means_by_task(table, LEARNED))
    return with_trends(path, {f"{title}, perplexity against N_d": text for title, text in trends.items()})


def perplexity_trend(tasks: pd.DataFrame) -> str:
    """The rank correlation of the tasks' perplexities with their numbers of documents."""
    return trend(tasks["task_train_documents"], tasks["task_test_perplexity"])


def perplexity_by_documents(tasks: pd.DataFrame, ax: Axes) -> Axes:
    """Draw a point for each task, with its name if there is room."""
    tasks = tasks.dropna(subset="task_test_perplexity")
    x, y = tasks["task_train_documents"], tasks["task_test_perplexity"]
    ax.plot(x, y, linestyle="none", marker="o", color="#0072B2", alpha=0.85, gid="tasks")
    documents_axis(ax, x)
    ax.set_ylabel("test perplexity of the task")
    ax.margins(y=0.12)
    place_labels(ax, x, y, [str(task) for task in tasks.index])
    return ax


if __name__ == "__main__":
    sys.exit(run(Figure5Config, draw, sys.argv[1:], __file__))
