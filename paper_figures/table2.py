"""Table 2: perplexity of each task by τ, with the lowest value of each task in bold.

The original has 25 speakers and six values of τ. Every speaker has the lowest perplexity at τ = 100. Here it follows a sweep's
table, which has means over seeds with the best learning rate for each τ.

    python paper_figures/table2.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pandas as pd
from common import corpus, markdown, output_option, read_sweep, reported_sweep, run, save_text, sweep_option

from bora_pyro.diagnostics.sweep_table import at_best_rates, tau_order


@dataclass(kw_only=True)
class Table2Config:
    """Write each task's perplexity by precision as Markdown tables, for a sweep and for the paper."""

    sweep: str = sweep_option()
    output: str = output_option("table2.md")


def draw(config: Table2Config) -> str:
    """Write the tables and return their text."""
    ours, paper = by_task(read_sweep(config.sweep)), by_task(reported_sweep())
    parts = [f"### This sweep: {corpus(config.sweep)}", ours, "### BoRA paper: Talk of Norway", paper]
    return save_text("\n\n".join(parts), config.output)


def by_task(table: pd.DataFrame) -> str:
    """A Markdown table with one row for each task and one column for each τ."""
    best = at_best_rates(table)
    documents = best.groupby("task")["task_train_documents"].mean()
    perplexity = best.pivot_table(index="task", columns="tau", values="task_test_perplexity")
    taus = sorted(perplexity.columns, key=tau_order)
    rows = []
    for task, line in perplexity[taus].iterrows():
        cells = ["–" if value != value else f"**{value:.2f}**" if value == line.min() else f"{value:.2f}" for value in line]
        rows.append([str(task), f"{documents[str(task)]:.4g}", *cells])
    return markdown(["task", "$N_d$", *("∞" if tau == "inf" else tau for tau in taus)], rows)


if __name__ == "__main__":
    sys.exit(run(Table2Config, draw, sys.argv[1:], __file__))
