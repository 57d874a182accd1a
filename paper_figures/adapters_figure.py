"""Test perplexity of kinds of adapters against the bytes of a task's adapter. The paper has LoRA alone and no such figure.

Each adapter has its own best learning rate, chosen on validation documents with the first seed. Points are means over seeds, and
bars show the range over seeds.

    python paper_figures/adapters_figure.py --tables results/adapters_documentation.csv
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from common import output_option, read_table, run, save

from bora_pyro.diagnostics.plots import perplexity_by_bytes, style
from bora_pyro.options.field import option

COLUMNS = ["arm", "learning_rate", "seed", "validation_perplexity", "test_perplexity", "stored_bytes"]


@dataclass(kw_only=True)
class AdaptersFigureConfig:
    """Draw the test perplexity of kinds of adapters against the bytes of a task's adapter."""

    tables: list[str] = option(["results/adapters_documentation.csv"], "tables of compare_adapters.py, one panel each")
    output: str = output_option("adapters.png")


def at_best_rate(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each arm at the learning rate of lowest validation perplexity with the first seed."""
    first = table[table["seed"] == table["seed"].min()]
    best = first.loc[first.groupby("arm")["validation_perplexity"].idxmin(), ["arm", "learning_rate"]]
    return table.merge(best, on=["arm", "learning_rate"])


def draw(config: AdaptersFigureConfig) -> str:
    """Draw the figure and return the path of its file."""
    tables = {path: read_table(path, COLUMNS, made_by="make it with compare_adapters.py") for path in config.tables}
    with style():
        figure, axes = plt.subplots(1, len(tables), figsize=(4.4 * len(tables) + 1.6, 3.8), squeeze=False)
        for ax, (path, table) in zip(axes[0], tables.items(), strict=True):
            perplexity_by_bytes(at_best_rate(table), ax)
            ax.set_title(Path(path).stem.removeprefix("adapters_"))
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", handlelength=3)
        return save(figure, config.output)


if __name__ == "__main__":
    sys.exit(run(AdaptersFigureConfig, draw, sys.argv[1:], __file__))
