"""The model as a plate diagram. The paper gives it as equations 1 to 6 and has no such figure.

python paper_figures/model_figure.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
from common import output_option, run, save
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

from bora_pyro.diagnostics.plots import style


@dataclass(kw_only=True)
class ModelConfig:
    """Draw the model as a plate diagram."""

    output: str = output_option("model.png")


# name: (centre, label, whether the variable is known)
_NODES = {
    "tau": ((0.7, 1.4), "τ", False),
    "mean": ((0.7, 3.0), "Θ", False),
    "theta": ((2.7, 2.2), r"$\theta_d$", False),
    "text": ((4.7, 2.2), r"$w_{d,n}$", True),
    "base": ((6.9, 2.2), r"$W_{\mathrm{full}}$", True),
}
_EDGES = (("tau", "theta"), ("mean", "theta"), ("theta", "text"), ("base", "text"))
_RADIUS = 0.42


def draw(config: ModelConfig) -> str:
    """Draw the figure and return the path of its file."""
    with style():
        figure, ax = plt.subplots(figsize=(7.6, 4.2))
        plate_diagram(ax)
        return save(figure, config.output)


def plate_diagram(ax: Axes) -> Axes:
    """Draw variables as circles (shaded if known), dependencies as arrows, and plates around what is repeated."""
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_xlim(-0.1, 7.7)
    ax.set_ylim(-1.35, 4.0)
    for x, y, width, height, label in ((1.8, 0.7, 4.1, 2.9, "tasks d = 1 … D"), (3.8, 1.2, 1.9, 1.8, "documents n = 1 … $N_d$")):
        ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.15", fill=False, linewidth=1))
        ax.text(x + width - 0.08, y + 0.08, label, ha="right", va="bottom", fontsize=8)
    for start, end in _EDGES:
        ends = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0, "linewidth": 1}
        (x0, y0), (x1, y1) = _NODES[start][0], _NODES[end][0]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        step = ((x1 - x0) * _RADIUS / length, (y1 - y0) * _RADIUS / length)
        ax.annotate("", (x1 - step[0], y1 - step[1]), (x0 + step[0], y0 + step[1]), arrowprops=ends)
    for (x, y), text, known in _NODES.values():
        ax.add_patch(Circle((x, y), _RADIUS, facecolor="#D9D9D9" if known else "white", edgecolor="black", linewidth=1.2))
        ax.text(x, y, text, ha="center", va="center", fontsize=12)
    lines = (
        r"$p(\Theta) \propto 1$,   $\theta_d \sim \mathrm{Normal}(\Theta,\, I/\tau)$",
        r"$W = W_{\mathrm{full}} + \frac{\alpha}{r}\, B_d A_d$,   $\theta_d = (A_d, B_d)$ of all adapted layers",
        r"$\log p(w_{d,n}) = \sum_i \log \mathrm{LLM}(w_{d,n,i+1} \mid w_{d,n,1:i};\, \theta_d)$",
    )
    for row, line in enumerate(lines):
        ax.text(0.2, 0.1 - 0.5 * row, line, ha="left", va="center", fontsize=10)
    return ax


if __name__ == "__main__":
    sys.exit(run(ModelConfig, draw, sys.argv[1:], __file__))
