"""Figure 3: each task's gain from the hierarchy, against its number of training documents.

The original has two points for each speaker, the gain 100 (1 − perplexity at τ = 100 / perplexity at the limit). Blue points
compare with independent adapters (τ = 0), red points with one shared adapter (τ = 10⁴ there). All gains are above 0. Those over
τ = 0 fall with the number of documents. Here the paper's panel is computed from its Table 2. The sweep's panel uses the sweep's
best τ between the limits, chosen on the validation split, and the limit τ = ∞ itself.

    python paper_figures/figure3.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
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
)

from bora_pyro.diagnostics.plots import style, task_gain


@dataclass(kw_only=True)
class Figure3Config:
    """Draw each task's gain from the hierarchy against its documents, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("figure3.png")


def draw(config: Figure3Config) -> str:
    """Draw the figure and return the path of its file."""
    table, paper = read_sweep(config.sweep), reported_sweep()
    best = best_between_limits(table)
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
        for reference in (PAPER_INDEPENDENT, PAPER_POOLED):
            task_gain(paper, axes[0], tau=PAPER_BEST, reference=reference)
        for reference in ("0", "inf"):
            task_gain(table, axes[1], tau=best, reference=reference)
        axes[0].set_title("BoRA paper: Talk of Norway")
        axes[1].set_title(f"this sweep: {corpus(config.sweep)}")
        return save(figure, config.output)


if __name__ == "__main__":
    sys.exit(run(Figure3Config, draw, sys.argv[1:], __file__))
