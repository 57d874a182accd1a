"""The centred form of the prior beside the non-centred one: how fast each comes down, a row a τ.

The paper samples θ_d itself (centred) and takes a learning rate proportional to τ, as a remedy for a global mean that moves
slowly: only the prior's gradient reaches it. In the non-centred form, θ_d = Θ + z_d / √τ, every task's gradient reaches Θ.
The paper has no such figure. The rates are AdamW's largest: where the table of ``scripts/experiments/compare_forms.py`` has a
factor of τ, as it has for the centred form, the figure has the product.

    python paper_figures/forms_figure.py --forms results/forms.csv
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
from common import output_option, read_table, run, save

from bora_pyro.diagnostics.plots import form_curves, style
from bora_pyro.diagnostics.plots.style import tau_text
from bora_pyro.options.field import option

VALUES = ["objective", "test_perplexity"]
COLUMNS = ["form", "tau", "learning_rate", "step", *VALUES]


@dataclass(kw_only=True)
class FormsConfig:
    """Draw the objective and the test perplexity of both forms against the step."""

    forms: str = option("results/forms.csv", "the table of compare_forms.py")
    output: str = output_option("forms.png")


def draw(config: FormsConfig) -> str:
    """Draw the figure; returns where it went."""
    table = read_table(config.forms, COLUMNS, made_by="make it with compare_forms.py")
    factor = table["tau"].where(table["form"] == "centered", 1.0)
    table = table.assign(learning_rate=table["learning_rate"] * factor)
    taus = sorted(table["tau"].unique())
    with style():
        figure, axes = plt.subplots(len(taus), len(VALUES), figsize=(4.8 * len(VALUES), 4.2 * len(taus)), squeeze=False)
        for tau, row in zip(taus, axes, strict=True):
            for value, ax in zip(VALUES, row, strict=True):
                form_curves(table[table["tau"] == tau], ax, value=value)
                ax.set_title(f"τ = {tau_text(str(tau))}")
        return save(figure, config.output)


if __name__ == "__main__":
    sys.exit(run(FormsConfig, draw, sys.argv[1:], __file__))
