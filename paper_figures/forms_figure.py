"""How fast the centred and the non-centred form of the prior converge, with one row of panels for each τ.

The paper samples θ_d itself (centred). Then only the prior's gradient reaches Θ, which moves slowly. As a remedy, the paper
makes the learning rate proportional to τ. In the non-centred form, θ_d = Θ + z_d / √τ, the gradient of every task reaches Θ.
The paper has no such figure.

The learning rates in the figure are AdamW's largest ones. For the centred form, the table of
``scripts/experiments/compare_forms.py`` has a factor of τ, and the figure shows the factor times τ.

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
    """Draw the figure and return the path of its file."""
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
