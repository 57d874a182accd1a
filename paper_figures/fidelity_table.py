"""The effect of each difference between the paper and its released code, on one corpus.

The table has one row for each variant of ``scripts/experiments/compare_variants.py``, with mean ± sd over seeds. τ and the
learning rate are those of lowest validation perplexity at the lowest seed. All variants are scored in the same way. The ratio
to the first variant is computed for each seed, and shows the effect of the difference. The paper has no such table.

    python paper_figures/fidelity_table.py --fidelity results/fidelity.csv
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pandas as pd
from common import markdown, mean_sd, output_option, read_table, run, save_text

from bora_pyro.errors import InputError
from bora_pyro.options.field import option

COLUMNS = ["variant", "tau", "learning_rate", "seed", "validation_perplexity", "test_perplexity", "base_test_perplexity"]


@dataclass(kw_only=True)
class FidelityConfig:
    """Write the effect of each variant of the released code as a Markdown table."""

    fidelity: str = option("results/fidelity.csv", "the table of compare_variants.py")
    output: str = output_option("fidelity.md")


def draw(config: FidelityConfig) -> str:
    """Write the table and return its text."""
    table = read_table(config.fidelity, COLUMNS, made_by="make it with compare_variants.py")
    variants = list(table["variant"].unique())
    variants.sort(key=lambda name: name != "paper")  # the paper's own model first, then the order of the file
    rows, first = [], None
    for variant in variants:
        chosen = best_fits(table[table["variant"] == variant], variant).set_index("seed")
        first = chosen["test_perplexity"] if first is None else first
        ratio = (chosen["test_perplexity"] / first).dropna()  # of the seeds that both have
        numbers = [f"{chosen[name].iloc[0]:g}" for name in ("tau", "learning_rate")]
        perplexities = [mean_sd(chosen[f"{split}_perplexity"]) for split in ("validation", "test", "base_test")]
        rows.append([variant, *numbers, *perplexities, mean_sd(ratio, 3), str(len(chosen))])
    header = ["variant", "τ", "learning rate", "validation perplexity", "test perplexity", "base", f"to {variants[0]}", "fits"]
    return save_text(markdown(header, rows), config.output)


def best_fits(rows: pd.DataFrame, variant: str) -> pd.DataFrame:
    """The rows of one variant at its best τ and learning rate, those of lowest validation perplexity at the lowest seed."""
    scored = rows.dropna(subset="validation_perplexity")
    if scored.empty:
        raise InputError(f"variant {variant!r} has no validation perplexity, which is needed to choose its tau and learning rate")
    first = scored[scored["seed"] == scored["seed"].min()]
    best = first.loc[first["validation_perplexity"].idxmin()]
    return rows[(rows["tau"] == best["tau"]) & (rows["learning_rate"] == best["learning_rate"])]


if __name__ == "__main__":
    sys.exit(run(FidelityConfig, draw, sys.argv[1:], __file__))
