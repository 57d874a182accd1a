"""Plot of a posterior of τ.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> ax = tau_intervals({"q_proj.lora_A": [80.0, 90.0, 100.0]}, {"q_proj.lora_A": 95.0}, ax)
>>> ax.get_xlabel()
'precision of the prior, τ'
>>> plt.close(figure)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from bora_pyro.diagnostics.plots.style import BLUE, VERMILLION, plain_log_ticks


def tau_intervals(draws: Mapping[str, Sequence[float] | np.ndarray], learned: Mapping[str, float], ax: Axes) -> Axes:
    """Median and central 90 % interval of τ by group, next to a point estimate.

    Args:
        draws: draws of τ for each group.
        learned: point estimate of τ for each of these groups.
        ax: axes to draw on.
    """
    names = sorted(draws)
    places = np.arange(len(names))
    low, middle, high = (np.array([np.quantile(draws[name], share) for name in names]) for share in (0.05, 0.5, 0.95))
    ax.hlines(places, low, high, color=BLUE)
    ax.plot(middle, places, "|", color=BLUE, markersize=9, label="τ random: median and middle 90 %")
    ax.plot([learned[name] for name in names], places, "s", color=VERMILLION, label="τ learned by the MAP fit")
    ax.set_xscale("log")
    ax.set_yticks(places, names)
    ax.set_ylim(-0.7, len(names) - 0.3)
    plain_log_ticks(ax)
    ax.set_xlabel("precision of the prior, τ")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax
