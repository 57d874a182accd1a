"""Table 1: overall perplexity by τ, with its learning rate.

The original has six rows. The rate is 10⁻⁵ τ (10⁻⁴ at τ = 0), and the lowest perplexity is 12.82 at τ = 100. Here further
columns have a sweep's rates, chosen on the validation split, and its perplexities. The paper and the sweep have different
corpora, base models and ways of counting (the paper's perplexities include padding). So compare their dependence on τ, not
their values.

    python paper_figures/table1.py --sweep results/presidents.parquet
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from common import corpus, markdown, mean_sd, output_option, read_sweep, reported, run, save_text, sweep_option

from bora_pyro.diagnostics.sweep_table import at_best_rates, best_rates, runs, tau_order


@dataclass(kw_only=True)
class Table1Config:
    """Write perplexity by precision as a Markdown table, for the paper and for a sweep."""

    sweep: str = sweep_option()
    output: str = output_option("table1.md")


def draw(config: Table1Config) -> str:
    """Write the table and return its text."""
    table = read_sweep(config.sweep)
    paper, rates, chosen = reported("table1").set_index("tau"), best_rates(table), runs(at_best_rates(table))
    rows = []
    for tau in sorted({*paper.index, *rates}, key=tau_order):
        name = {"inf": "∞", "learned": "learned"}.get(tau, tau)
        theirs = [paper.learning_rate[tau], f"{paper.test_perplexity[tau]:.2f}"] if tau in paper.index else ["–", "–"]
        ours = chosen[chosen["tau"] == tau]
        if tau == "learned":
            name += f", {np.exp(np.log(ours['fitted_tau']).mean()):.3g}"
        ratio = ours["test_perplexity"] / ours["base_test_perplexity"]
        perplexities = [mean_sd(ours[f"{split}_perplexity"]) for split in ("validation", "test")]
        measured = [rates.get(tau, "–"), *perplexities, mean_sd(ratio, 3)]
        rows.append([name, *theirs, *measured, str(len(ours))])
    name = corpus(config.sweep)
    header = ["τ", "paper: rate", "paper: perplexity", f"{name}: rate", "validation", "test", "test, to the base's", "fits"]
    return save_text(markdown(header, rows), config.output)


if __name__ == "__main__":
    sys.exit(run(Table1Config, draw, sys.argv[1:], __file__))
