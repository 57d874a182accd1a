"""Figure 4: the distance of each task's adapter from the global one, against its number of training documents.

The original has a point for each speaker, the Euclidean distance between the task's weights and Θ. The distance rises from
about 0.43 to 0.96 with the number of documents. Four speakers (with 128, 128, 129 and 234 documents) are far above the trend.
The paper reports no numbers for this figure, so there is no panel of the paper here. The released script draws it for τ = 10,
which is not the best τ.

The first panel shows a sweep's best τ between the limits, the second all τ. A stronger prior keeps the tasks nearer to Θ.
Are tasks with many documents farther away? The title has Spearman's rank correlation ρ of distance and N_d over tasks, with a
bootstrap interval. The script prints it for every τ.

    python paper_figures/figure4.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
from common import (
    best_between_limits,
    corpus,
    means_by_task,
    output_option,
    read_sweep,
    run,
    save,
    sweep_option,
    trend,
    with_trends,
)

from bora_pyro.diagnostics.plots import deviation_by_documents, style
from bora_pyro.diagnostics.plots.style import tau_text
from bora_pyro.diagnostics.sweep_table import at_best_rates, tau_order


@dataclass(kw_only=True)
class Figure4Config:
    """Draw the distance of each task's adapter from the global one against its documents."""

    sweep: str = sweep_option()
    output: str = output_option("figure4.png")


def draw(config: Figure4Config) -> str:
    """Draw the figure and return the path of its file."""
    table, name = read_sweep(config.sweep), corpus(config.sweep)
    best, chosen, trends = best_between_limits(table), at_best_rates(table), dict[str, str]()
    for tau in sorted(set(chosen["tau"]) - {"inf"}, key=tau_order):
        tasks = means_by_task(table, tau)
        trends[tau] = trend(tasks["task_train_documents"], tasks["deviation_norm"])
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
        axes[0].set_title(f"{name}, τ = {tau_text(best)}\n{trends[best]}", fontsize="small")
        axes[1].set_title(f"{name}, every τ", fontsize="small")
        deviation_by_documents(chosen, axes[1])
        deviation_by_documents(chosen[chosen["tau"] == best], axes[0])
        path = save(figure, config.output)
    return with_trends(path, {f"{name}, τ = {tau}, distance against N_d": text for tau, text in trends.items()})


if __name__ == "__main__":
    sys.exit(run(Figure4Config, draw, sys.argv[1:], __file__))
