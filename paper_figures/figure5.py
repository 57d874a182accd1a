"""Figure 5: the perplexity of each task against its number of training documents.

The original has a point for each speaker at τ = 100. It has no trend: a speaker with many documents is not predicted better.
Three speakers are far above the others. Here the paper's panel is from its Table 2, and the sweep's panel is at its best τ
between the limits.

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
)
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots import place_labels, style
from bora_pyro.diagnostics.plots.style import tau_text
from bora_pyro.diagnostics.plots.sweeps import documents_axis


@dataclass(kw_only=True)
class Figure5Config:
    """Draw each task's perplexity against its documents, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("figure5.png")


def draw(config: Figure5Config) -> str:
    """Draw the figure and return the path of its file."""
    table = read_sweep(config.sweep)
    best = best_between_limits(table)
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
        axes[0].set_title(f"BoRA paper: Talk of Norway, τ = {PAPER_BEST}")
        axes[1].set_title(f"this sweep: {corpus(config.sweep)}, τ = {tau_text(best)}")
        perplexity_by_documents(means_by_task(reported_sweep(), PAPER_BEST), axes[0])
        perplexity_by_documents(means_by_task(table, best), axes[1])
        return save(figure, config.output)


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
