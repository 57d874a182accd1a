"""Plots of a fit's learning curves: how well documents are predicted, or how large rewards are, by epoch.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> ax = learning_curves([{"epoch": 1, "loss": 3.0, "validation_perplexity": 22.0}], ax, best_epoch=1)
>>> ax.get_ylabel()
'perplexity'
>>> plt.close(figure)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import BLACK, BLUE, VERMILLION
from bora_pyro.errors import InputError
from bora_pyro.likelihoods import PERPLEXITY, Measure


def learning_curves(
    history: Sequence[Mapping[str, Any]],
    ax: Axes,
    *,
    unit: str = "tokens",
    measure: Measure = PERPLEXITY,
    best_epoch: int | None = None,
) -> Axes:
    """Draw the measure of the training documents (mean during the epoch) and the validation documents (after the epoch).

    Args:
        history: the records of ``metrics.jsonl``, one per epoch: epoch, loss (nats per training observation), and
            validation_perplexity, or validation_ and the name of another measure, if there are validation documents.
        ax: the axis to draw on. Its y axis becomes logarithmic if the values differ by more than a factor of 10.
        unit: the observation of a likelihood of tokens. The training curve is drawn only for ``tokens``, because the loss per
            document is not a perplexity.
        measure: the measure of the likelihood; its values are the y axis.
        best_epoch: the epoch whose state was kept, marked with a ring; None: no ring.

    Raises:
        InputError: if no record has a value to draw.
    """
    losses = [(record["epoch"], record["loss"]) for record in history if record.get("loss") is not None]
    curves = {"training, mean of the epoch": [(epoch, measure.of(-loss, 1) or 0.0) for epoch, loss in losses]}
    if unit != "tokens":
        curves.clear()
    curves["validation, after the epoch"] = [
        (record["epoch"], record[f"validation_{measure.name}"])
        for record in history
        if record.get(f"validation_{measure.name}") is not None
    ]
    if not any(curves.values()):
        raise InputError(f"no record has a training loss per token or a validation {measure.title}; give those of metrics.jsonl")
    _draw(curves, ax, best_epoch)
    values = [value for points in curves.values() for _, value in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    ax.set_ylabel(measure.unit)
    return ax


def reward_curves(history: Sequence[Mapping[str, Any]], ax: Axes, *, best_epoch: int | None = None) -> Axes:
    """Draw the mean reward of the training texts (during the epoch) and of the validation prompts (after the epoch).

    Args:
        history: the records of a fit from rewards, one per epoch: epoch, reward, and validation_reward, if there are validation
            prompts.
        ax: the axis to draw on.
        best_epoch: the epoch whose state was kept, marked with a ring; None: no ring.

    Raises:
        InputError: if no record has a reward.
    """
    names = {"reward": "training, mean of the epoch", "validation_reward": "validation, after the epoch"}
    curves = {
        title: [(record["epoch"], record[name]) for record in history if record.get(name) is not None]
        for name, title in names.items()
    }
    if not any(curves.values()):
        raise InputError("no record has a reward; give those of metrics.jsonl of a fit from rewards")
    _draw(curves, ax, best_epoch)
    ax.set_ylabel("mean reward")
    return ax


def _draw(curves: Mapping[str, Sequence[tuple[int, float]]], ax: Axes, best_epoch: int | None) -> None:
    """Draw curves over the epochs. Of two the first is of training; the last is of validation, with a ring at the best epoch."""
    styles = ((BLUE, "o", "-"), (VERMILLION, "s", "--")) if len(curves) == 2 else ((VERMILLION, "s", "--"),)
    for (name, points), (color, marker, line) in zip(curves.items(), styles, strict=True):
        if not points:
            continue
        ax.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=name, gid=name)
        kept = [point for point in points if point[0] == best_epoch]
        if kept and name.startswith("validation"):
            ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "color": BLACK}
            ax.plot(*zip(*kept, strict=True), linestyle="none", label=f"kept: epoch {best_epoch}", gid="kept", **ring)
    epochs = [epoch for points in curves.values() for epoch, _ in points]
    ax.set_xlim(min(epochs) - 0.3, max(epochs) + 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("epoch")
    legend_above(ax, ncols=2)
