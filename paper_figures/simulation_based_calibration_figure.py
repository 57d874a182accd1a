"""Rank histograms of simulation-based calibration: one row for each case, one column for each quantity, one line for each guide.

A correct posterior has flat histograms; 95 % of the bins are within the grey band. A posterior that is too narrow has high bins
at both ends. The height is relative to a flat histogram, and each panel has an axis of its own. The paper has no such figure.

    python paper_figures/simulation_based_calibration_figure.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from common import output_option, read_table, run, save

from bora_pyro.diagnostics.plots import rank_histogram, style
from bora_pyro.options.field import option

COLUMNS = ["case", "guide", "quantity", "bin", "count"]
_SYMBOLS = {"mean": "Θ", "theta": "θ", "deviation": "θ − Θ", "distance": "‖θ − Θ‖", "tau": "τ"}
_CASES = {"known": "τ known"}
# If τ is known, Laplace's approximation with the exact curvature is the exact posterior.
_EXACT = "exact posterior (where τ is known: laplace)"


@dataclass(kw_only=True)
class CalibrationFigureConfig:
    """Draw the rank histograms of simulation-based calibration."""

    calibration: str = option("results/simulation_based_calibration.csv", "the table of simulation_based_calibration.py")
    output: str = output_option("simulation_based_calibration.png")


def draw(config: CalibrationFigureConfig) -> str:
    """Draw the figure and return the path of its file."""
    table = read_table(config.calibration, COLUMNS, made_by="make it with simulation_based_calibration.py")
    cases, quantities = list(table["case"].unique()), list(table["quantity"].unique())
    looks: dict[str, Any] = {}
    with style():
        figure, axes = plt.subplots(
            len(cases), len(quantities), figsize=(1.75 * len(quantities), 1.9 * len(cases)), squeeze=False
        )
        for case, row in zip(cases, axes, strict=True):
            of_case = table[table["case"] == case].sort_values("bin", kind="stable")
            guides = list(of_case["guide"].unique())
            row[0].set_ylabel(f"{_CASES.get(case, f'τ ~ {case}')}\nfrequency / uniform")
            for quantity, ax in zip(quantities, row, strict=True):
                rows = of_case[of_case["quantity"] == quantity]
                if case == cases[0]:
                    ax.set_title(title(quantity))
                if rows.empty:
                    ax.set_axis_off()
                    continue
                label = ax.get_ylabel()
                rank_histogram({_label(guide): rows.loc[rows["guide"] == guide, "count"].tolist() for guide in guides}, ax)
                ax.set_ylabel(label)
                if case != cases[-1]:
                    ax.set_xlabel("")
                looks |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(looks.values(), looks, loc="outside upper center", ncols=len(looks))
        return save(figure, config.output)


def _label(guide: str) -> str:
    return _EXACT if guide in ("laplace", "exact") else guide


def title(quantity: str) -> str:
    """The title of a panel.

    >>> title("theta_16"), title("tau")
    ('θ, N = 16', 'τ')
    """
    name, _, documents = quantity.partition("_")
    return _SYMBOLS.get(name, name) + (f", N = {documents}" if documents else "")


if __name__ == "__main__":
    sys.exit(run(CalibrationFigureConfig, draw, sys.argv[1:], __file__))
