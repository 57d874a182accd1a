"""Figure 3: each task's gain from the hierarchy, against its number of training documents.

The original has two points for each speaker, the gain 100 (1 − perplexity at τ = 100 / perplexity at the limit). Blue points
compare with independent adapters (τ = 0), red points with one shared adapter (τ = 10⁴ there). All gains are above 0. Those over
τ = 0 fall with the number of documents. Here the paper's panel is computed from its Table 2. The sweep's panel uses the sweep's
best τ between the limits, chosen on the validation split, and the limit τ = ∞ itself.

Do tasks with few documents gain more? The titles have Spearman's rank correlation ρ of gain and N_d over tasks, with a bootstrap
interval. The script also prints that of a learned τ, where the sweep has one.

    python paper_figures/figure3.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from common import (
    PAPER_BEST,
    PAPER_INDEPENDENT,
    PAPER_POOLED,
    best_between_limits,
    corpus,
    output_option,
    read_sweep,
    reported_sweep,
    run,
    save,
    sweep_option,
    trend,
    with_trends,
)

from bora_pyro.diagnostics.plots import style, task_gain
from bora_pyro.diagnostics.plots.style import tau_text
from bora_pyro.diagnostics.plots.sweeps import gain_by_task
from bora_pyro.diagnostics.sweep_table import LEARNED


@dataclass(kw_only=True)
class Figure3Config:
    """Draw each task's gain from the hierarchy against its documents, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("figure3.png")


def draw(config: Figure3Config) -> str:
    """Draw the figure and return the path of its file."""
    table, paper = read_sweep(config.sweep), reported_sweep()
    best, trends = best_between_limits(table), dict[str, str]()
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.9))
        for ax, title, sweep, tau, references in (
            (axes[0], "BoRA paper: Talk of Norway", paper, PAPER_BEST, (PAPER_INDEPENDENT, PAPER_POOLED)),
            (axes[1], f"this sweep: {corpus(config.sweep)}", table, best, ("0", "inf")),
        ):
            found = {reference: gain_trend(sweep, tau, reference) for reference in references}
            for reference, text in found.items():
                task_gain(sweep, ax, tau=tau, reference=reference)
                trends[f"{title}, gain of τ = {tau} over τ = {reference} against N_d"] = text
            ax.set_title(
                "\n".join([title, *(f"over τ = {tau_text(name)}: {text}" for name, text in found.items())]), fontsize="small"
            )
        path = save(figure, config.output)
    for reference in ("0", "inf") if LEARNED in set(table["tau"]) else ():
        text = gain_trend(table, LEARNED, reference)
        trends[f"this sweep: {corpus(config.sweep)}, gain of a learned τ over τ = {reference} against N_d"] = text
    return with_trends(path, trends)


def gain_trend(table: pd.DataFrame, tau: str, reference: str) -> str:
    """The rank correlation of the tasks' gains with their numbers of documents."""
    gains = gain_by_task(table, tau=tau, reference=reference)
    return trend(gains["documents"], gains["gain"])


if __name__ == "__main__":
    sys.exit(run(Figure3Config, draw, sys.argv[1:], __file__))
