"""Plot of how often the gates of a routed model are right, by layer.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> _ = gate_accuracy({"fc1.0": 0.5, "fc1.1": 0.9, "q_proj.0": 0.4}, {"fc1": (2, 3), "q_proj": (3,)}, ax, chance=0.25)
>>> [(line.get_label(), [int(x) for x in line.get_xdata()]) for line in ax.lines if not line.get_label().startswith("_")]
[('fc1', [2, 3]), ('q_proj', [3]), ('by chance', [0, 1])]
>>> plt.close(figure)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import GREY, MARKERS, PALETTE


def gate_accuracy(by_layer: Mapping[str, float], blocks: Mapping[str, Sequence[int]], ax: Axes, *, chance: float) -> Axes:
    """Draw the share of tokens at which the largest gate is that of the task of the text.

    Args:
        by_layer: the shares by ``<slot>.<layer>``, as in :class:`~bora_pyro.predict.gates.GateReadings`.
        blocks: the numbers of the layers of each slot.
        ax: the axis to draw on.
        chance: the share that a random choice of a task would have.
    """
    for n, (slot, numbers) in enumerate(blocks.items()):
        shares = [by_layer[f"{slot}.{layer}"] for layer in range(len(numbers)) if f"{slot}.{layer}" in by_layer]
        if not shares:
            continue
        color, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        ax.plot(list(numbers), shares, color=color, marker=marker, linewidth=1, label=slot, gid=slot)
    ax.axhline(chance, color=GREY, linestyle="--", linewidth=0.8, label="by chance")
    ax.set_xlabel("layer")
    ax.set_ylabel("tokens at which\nthe gate is right")
    ax.set_ylim(0, 1.03)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])  # no more, also in the room of the legend
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(ax, ncols=3)
    return ax
