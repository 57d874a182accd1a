"""How few documents a new task needs when it starts from Θ and τ of the other tasks.

Points are means over seeds, and bars show the range over seeds. The paper adapts no new tasks and has no such figure.

    python paper_figures/few_documents_figure.py --table results/few_documents.csv
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from common import output_option, read_table, run, save

from bora_pyro.diagnostics.plots import few_documents_curve, style
from bora_pyro.options.field import option

COLUMNS = ["arm", "documents", "seed", "split", "log_likelihood", "tokens"]


@dataclass(kw_only=True)
class FewDocumentsFigureConfig:
    """Draw the test perplexity of new tasks against their number of documents."""

    table: str = option("results/few_documents.csv", "the table of few_documents.py")
    output: str = output_option("few_documents.png")


def draw(config: FewDocumentsFigureConfig) -> str:
    """Draw the figure and return the path of its file."""
    rows = read_table(config.table, COLUMNS, made_by="make it with few_documents.py")
    rows = rows[rows["split"] == "test"].assign(documents=rows["documents"].astype(str))
    sums = rows.groupby(["arm", "documents", "seed"])[["log_likelihood", "tokens"]].sum().reset_index()
    sums["perplexity"] = np.exp(-sums["log_likelihood"] / sums["tokens"])
    with style():
        figure, ax = plt.subplots(figsize=(6.2, 4.2))
        few_documents_curve(sums, ax)
        return save(figure, config.output)


if __name__ == "__main__":
    sys.exit(run(FewDocumentsFigureConfig, draw, sys.argv[1:], __file__))
