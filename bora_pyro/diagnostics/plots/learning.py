"""How a fit learned: perplexity of the training and the validation documents, epoch by epoch.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> ax = learning_curves([{"epoch": 1, "loss": 3.0, "validation_perplexity": 22.0}], ax, best_epoch=1)
>>> ax.get_ylabel()
'perplexity'
>>> plt.close(figure)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import BLACK, BLUE, VERMILLION
from bora_pyro.errors import InputError


def learning_curves(
    history: Sequence[Mapping[str, Any]], ax: Axes, *, unit: str = "tokens", best_epoch: int | None = None
) -> Axes:
    """Perplexity by epoch: of the training documents, the mean while the epoch ran, and of the validation documents, after it.

    Args:
        history: the records of ``metrics.jsonl``, one an epoch: epoch, loss (nats a training observation), and
            validation_perplexity where there are validation documents.
        ax: where to draw. It becomes logarithmic where the values differ more than tenfold.
        unit: the observation of the likelihood; a loss a document is no perplexity, and is left out.
        best_epoch: the epoch whose state was kept gets a ring; None: no ring.

    Raises:
        InputError: no record has anything to draw.
    """
    losses = [(record["epoch"], record["loss"]) for record in history if record.get("loss") is not None]
    curves = {"training, mean of the epoch": [(epoch, math.exp(min(loss, 700.0))) for epoch, loss in losses]}
    if unit != "tokens":
        curves.clear()
    curves["validation, after the epoch"] = [
        (record["epoch"], record["validation_perplexity"])
        for record in history
        if record.get("validation_perplexity") is not None
    ]
    looks = ((BLUE, "o", "-"), (VERMILLION, "s", "--")) if len(curves) == 2 else ((VERMILLION, "s", "--"),)
    values = [value for points in curves.values() for _, value in points]
    if not values:
        raise InputError("no record has a training loss a token or a validation perplexity; give those of metrics.jsonl")
    for (name, points), (color, marker, line) in zip(curves.items(), looks, strict=True):
        if not points:
            continue
        ax.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=name, gid=name)
        kept = [point for point in points if point[0] == best_epoch]
        if kept and name.startswith("validation"):
            ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "color": BLACK}
            ax.plot(*zip(*kept, strict=True), linestyle="none", label=f"kept: epoch {best_epoch}", gid="kept", **ring)
    if max(values) > 10 * min(values):
        ax.set_yscale("log")
    epochs = [epoch for points in curves.values() for epoch, _ in points]
    ax.set_xlim(min(epochs) - 0.3, max(epochs) + 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("epoch")
    ax.set_ylabel("perplexity")
    legend_above(ax, ncols=2)
    return ax
