"""Figure 1: the number of training documents of each task.

The original is a bar chart of the 25 speakers, with 110 to 477 speeches each. Here the bars are horizontal and sorted by size.
The first panel has the paper's numbers, the second those of a sweep's corpus.

    python paper_figures/figure1.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from common import corpus, output_option, read_sweep, reported, run, save, sweep_option
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots import style


@dataclass(kw_only=True)
class Figure1Config:
    """Draw the number of training documents of each task, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("figure1.png")


def draw(config: Figure1Config) -> str:
    """Draw the figure and return the path of its file."""
    paper = reported("tasks").set_index("task")["train_documents"]
    # one value for each seed: the first seed has more rows, because only it tries all learning rates
    of_seed = read_sweep(config.sweep).groupby(["task", "seed"])["task_train_documents"].first()
    ours = of_seed.groupby("task").mean()
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(8, 0.8 + 0.18 * max(len(paper), len(ours))))
        bars(paper, axes[0])
        bars(ours, axes[1])
        axes[0].set_title("BoRA paper: Talk of Norway")
        axes[1].set_title(f"this sweep: {corpus(config.sweep)}")
        return save(figure, config.output)


def bars(documents: pd.Series, ax: Axes) -> Axes:
    """Draw one bar for each task, the longest on top, with its number."""
    documents = documents.sort_values(kind="stable")
    rows = np.arange(len(documents))
    ax.barh(rows, documents, color="#0072B2", height=0.7)
    for row, value in zip(rows, documents, strict=True):
        ax.annotate(f"{value:.3g}", (value, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_yticks(rows, list(documents.index))
    ax.set_ylim(-0.7, len(documents) - 0.3)
    ax.margins(x=0.12)
    ax.set_xlabel("training documents, $N_d$")
    return ax


if __name__ == "__main__":
    sys.exit(run(Figure1Config, draw, sys.argv[1:], __file__))
