"""Figure 3: what each task gains by the hierarchy, against its number of training documents.

The original has two points a speaker, 100 (1 − perplexity at τ = 100 / perplexity at the limit): blue over independent
adapters (τ = 0), red over one shared adapter (its τ = 10⁴). All are above 0, and those over τ = 0 fall with the number of
documents. Here the paper's panel is computed from its Table 2; a sweep's uses its own best τ between the limits, chosen on
the validation split, and τ = ∞ itself.

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
    """Draw each task's gain by the hierarchy against its documents, the paper's beside a sweep's."""

    sweep: str = sweep_option()
    output: str = output_option("figure3.png")


def draw(config: Figure3Config) -> str:
    """Draw the figure; returns where it went."""
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
