"""Plots of one fit's container (``bora_pyro.diagnostics.shrinkage``): how far the tasks stand from Θ, and where.

Each takes the container and an axis and returns the axis. A MAP fit has one draw, hence no intervals; with many draws
(chain x draw) points are medians and intervals hold 50 % and 90 % of the draws.

>>> import matplotlib.pyplot as plt, numpy as np, xarray as xr
>>> distance = xr.DataArray(np.ones((1, 1, 2)), dims=("chain", "draw", "task"), coords={"task": ["ada", "bo"]})
>>> documents = xr.DataArray([8, 16], dims="task", coords={"task": ["ada", "bo"]})
>>> container = {"posterior": {"distance": distance}, "constant_data": {"train_documents": documents}}
>>> figure, ax = plt.subplots()
>>> [label.get_text() for label in shrinkage_forest(container, ax).get_yticklabels()]
['ada (8)', 'bo (16)']
>>> plt.close(figure)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import gaussian_kde

from bora_pyro.diagnostics.plots.labels import legend_above, place_labels
from bora_pyro.diagnostics.plots.style import BLUE, GREY, LIGHT_BLUE, LINES, MARKERS, PALETTE, plain_log_ticks, tau_text
from bora_pyro.diagnostics.plots.sweeps import documents_axis
from bora_pyro.diagnostics.sweep_table import tau_order
from bora_pyro.errors import InputError

_INTERVALS = ((0.9, 1.2), (0.5, 3.2))  # probability, width of the line
_DISTANCE = "distance to the global mean, ‖$\\theta_d$ − Θ‖"
_DISPLACEMENT = "component of $\\theta_d$ − Θ along its posterior mean"
_SPREAD = "\n(median, 50 % and 90 % of the draws)"


def shrinkage_forest(container: Any, ax: Axes) -> Axes:
    """‖θ_d − Θ‖ of each task, the farthest on top, N_d in parentheses.

    Args:
        container: the posterior has ``distance`` (chain, draw, task), the constant data ``train_documents`` (task). Where the
            posterior has ``displacement`` too, as with draws, it is drawn instead: the distances of draws are nearly one.
        ax: where to draw; a fifth of an inch a task is high enough.
    """
    name, label = _measure(container)
    draws, tasks = _draws(container, name), _names(container, name, "task")
    middle = np.median(draws, axis=0)
    order = np.argsort(middle, kind="stable")
    rows = np.arange(len(tasks))
    _intervals(ax, draws[:, order], rows, along="x", color=BLUE)
    ax.plot(middle[order], rows, linestyle="none", marker="o", color=BLUE, gid="distance")
    documents = np.asarray(container["constant_data"]["train_documents"])
    ax.set_yticks(rows, [f"{tasks[task]} ({documents[task]})" for task in order])
    ax.set_ylim(-0.7, len(tasks) - 0.3)
    ax.set_xlim(min(0.0, 1.05 * float(draws.min())), 1.05 * float(draws.max()) or 1.0)  # room for the farthest marker
    ax.grid(axis="y", linewidth=0.3)
    ax.set_xlabel(label)
    ax.set_ylabel("task ($N_d$)")
    return ax


def shrinkage_ridge(container: Any, ax: Axes) -> Axes:
    """Densities of the deviations from Θ, a ridge a task, the farthest on top.

    Of one draw: how the root mean square deviations of a task's groups (layer x module x factor) are spread, a mark a group.
    Of many: the draws of what :func:`shrinkage_forest` draws.

    Args:
        container: the posterior has ``rms_deviation`` (chain, draw, task, layer, module, factor), and for many draws
            ``distance`` or ``displacement`` (chain, draw, task).
        ax: where to draw; a quarter of an inch a task is high enough.
    """
    rms = _draws(container, "rms_deviation")
    tasks, factors = _names(container, "rms_deviation", "task"), _names(container, "rms_deviation", "factor")
    many = len(rms) > 1
    # one draw: (task, factor, groups of that factor); the rug tells the factors apart
    groups = np.moveaxis(rms[0], -1, 1).reshape(len(tasks), len(factors), -1)
    name, label = _measure(container, interval="")
    values = _draws(container, name).T if many else groups.reshape(len(tasks), -1)
    order = np.argsort(np.nanmedian(values, axis=1), kind="stable")
    logarithmic = bool((values[np.isfinite(values)] > 0).all())
    if logarithmic:
        ax.set_xscale("log")
    for row, task in enumerate(order):
        _ridge(ax, values[task], row, logarithmic=logarithmic)
        if not many:
            for n, _ in enumerate(factors):
                marks = groups[task, n][np.isfinite(groups[task, n])]
                ax.plot(
                    marks, np.full(len(marks), row), linestyle="none", marker="|" if n == 0 else ".", markersize=5 - n,
                    color=PALETTE[n % len(PALETTE)], label=factors[n] if row == 0 else None, gid=f"marks {tasks[task]}",
                )  # fmt: skip
    ax.set_yticks(np.arange(len(tasks)), [tasks[task] for task in order])
    ax.set_ylim(-0.5, len(tasks) + 0.4)
    ax.set_ylabel("task")
    if logarithmic:
        plain_log_ticks(ax)
    ax.set_xlabel(label if many else "root mean square deviation of an entry from Θ\n(a mark a layer, module and factor)")
    if not many:
        legend_above(ax, ncols=len(factors))
    return ax


def _ridge(ax: Axes, values: np.ndarray, row: float, *, logarithmic: bool) -> None:
    """A density of height 0.9 that stands on ``row``; none where the values do not differ."""
    values = values[np.isfinite(values)]
    scaled = np.log10(values) if logarithmic else values
    if len(scaled) < 3 or np.ptp(scaled) <= 1e-9 * max(1.0, np.abs(scaled).max()):
        return
    reach = 0.15 * np.ptp(scaled)
    grid = np.linspace(scaled.min() - reach, scaled.max() + reach, 200)
    density = gaussian_kde(scaled)(grid)
    x, top = 10**grid if logarithmic else grid, row + 0.9 * density / density.max()
    ax.fill_between(x, row, top, color=LIGHT_BLUE, alpha=0.6, linewidth=0)
    ax.plot(x, top, color=BLUE, linewidth=0.8)


def deviation_by_documents(container_or_table: Any, ax: Axes) -> Axes:
    """‖θ_d − Θ‖ against N_d: tasks with more data stray farther (the BoRA paper's Figure 4); of many draws with their intervals.

    Args:
        container_or_table: a container as for :func:`shrinkage_forest`, or rows of a sweep table. Of a table each τ is a
            series of its own, means over seeds; ∞ is left out, as nothing deviates there. One series has its tasks' names
            beside it, several stand on a logarithmic axis.
        ax: where to draw.

    Raises:
        InputError: the table has no τ below ∞.
    """
    label = _DISTANCE
    if isinstance(container_or_table, pd.DataFrame):
        series = _series_of_table(container_or_table)
    else:
        measure, label = _measure(container_or_table)
        tasks, draws = _names(container_or_table, measure, "task"), _draws(container_or_table, measure)
        documents = np.asarray(container_or_table["constant_data"]["train_documents"], float)
        _intervals(ax, draws, documents, along="y", color=BLUE)
        series = {"": (tasks, documents, np.median(draws, axis=0))}
    for n, (name, (_, x, y)) in enumerate(series.items()):
        ax.plot(
            x, y, linestyle="none", marker=MARKERS[n % len(MARKERS)], color=PALETTE[n % len(PALETTE)], alpha=0.85,
            label=name, gid=f"distance {name}",
        )  # fmt: skip
    documents_axis(ax, np.concatenate([x for _, x, _ in series.values()]))
    ax.set_ylabel(label)
    if len(series) > 1:
        ax.set_yscale("log", nonpositive="mask")
        legend_above(ax, ncols=3)
    else:
        ((tasks, x, y),) = series.values()
        ax.margins(y=0.12)
        place_labels(ax, x, y, tasks)
    return ax


def _series_of_table(table: pd.DataFrame) -> dict[str, tuple[list[str], np.ndarray, np.ndarray]]:
    """By τ: tasks, N_d and the mean ‖θ_d − Θ‖ over seeds."""
    table = table[(table["tau"] != "inf") & table["deviation_norm"].notna()]
    if table.empty:
        raise InputError("the table has no deviation_norm of a tau below inf; give a sweep with such a tau")
    means = table.groupby(["tau", "task"])[["task_train_documents", "deviation_norm"]].mean()
    taus = sorted(table["tau"].unique(), key=tau_order)
    return {
        "learned τ" if tau == "learned" else f"τ = {tau_text(tau)}": (
            list(means.loc[tau].index),
            means.loc[tau]["task_train_documents"].to_numpy(float),
            means.loc[tau]["deviation_norm"].to_numpy(float),
        )
        for tau in taus
    }


def deviation_heatmap(container: Any, ax: Axes) -> Axes:
    """Where the tasks deviate from Θ: layer x task, the mean over draws of √(mean of rms² over modules and factors).

    Args:
        container: the posterior has ``rms_deviation`` (chain, draw, task, layer, module, factor). Where the constant data have
            ``centre_rms_deviation`` (task, layer, module, factor), as with draws, that of the posterior's centre is drawn.
        ax: where to draw; a colour bar is put beside it.
    """
    name = "centre_rms_deviation" if "centre_rms_deviation" in container["constant_data"] else "rms_deviation"
    rms = _draws(container, name)
    square = np.sqrt(np.nanmean(rms**2, axis=(-2, -1))).mean(0)  # (task, layer)
    tasks, layers = _names(container, "rms_deviation", "task"), _names(container, "rms_deviation", "layer")
    image = ax.imshow(square.T, cmap="cividis", aspect="auto", origin="lower", vmin=0, vmax=square.max() or 1)
    ax.set_xticks(np.arange(len(tasks)), tasks, rotation=90)
    ax.set_yticks(np.arange(len(layers)), layers)
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label="root mean square deviation\nof an entry from Θ (units of weight)")
    return ax


def pooling_factors(container: Any, ax: Axes) -> Axes:
    """How strongly each group of weights is pooled, by layer: 1 is one adapter for all, 0 one each.

    Args:
        container: the posterior has ``pooling_factor`` (chain, draw, layer, module, factor), or the constant data have one
            for all draws together (layer, module, factor). Colour and marker are the module, the line the factor; with many
            draws the bars hold 90 % of them.
        ax: where to draw.
    """
    draws = _draws(container, "pooling_factor")  # (draws, layer, module, factor)
    layers, modules, factors = (_names(container, "pooling_factor", name) for name in ("layer", "module", "factor"))
    places = np.arange(len(layers))
    width = 0.5 / (len(modules) * len(factors))  # side by side, so that bars and markers stay apart
    for m, module in enumerate(modules):
        for f, factor in enumerate(factors):
            values = draws[:, :, m, f]
            if not np.isfinite(values).any():
                continue
            x = places + (m * len(factors) + f) * width - 0.25 + width / 2
            _intervals(ax, values, x, along="y", color=PALETTE[m % len(PALETTE)])
            ax.plot(
                x, np.median(values, axis=0), color=PALETTE[m % len(PALETTE)], marker=MARKERS[m % len(MARKERS)],
                linestyle=LINES[f % len(LINES)], linewidth=1, markerfacecolor="white" if f else PALETTE[m % len(PALETTE)],
                label=f"{module} {factor}", gid=f"{module} {factor}",
            )  # fmt: skip
    ax.set_xticks(places, layers)
    ax.set_xlabel("layer")
    ax.set_ylabel("pooling factor")
    ax.axhline(1, color=GREY, linewidth=0.8)
    legend_above(ax, ncols=len(modules))
    return ax


def _measure(container: Any, *, interval: str = _SPREAD) -> tuple[str, str]:
    """What says how far the tasks lie from Θ, and the label of its axis, of many draws with that of their interval."""
    name = "displacement" if "displacement" in container["posterior"] else "distance"
    many = len(_draws(container, name)) > 1
    return name, (_DISTANCE if name == "distance" else _DISPLACEMENT) + (interval if many else "")


def _variable(container: Any, name: str) -> Any:
    """A variable of the posterior, or of the constant data where it is one for all draws together."""
    return container["posterior" if name in container["posterior"] else "constant_data"][name]


def _draws(container: Any, name: str) -> np.ndarray:
    """A variable with chain and draw as one axis, the first: (draws, ...)."""
    values = _variable(container, name)
    if "draw" not in values.dims:
        return np.asarray(values, float)[None]
    values = values.transpose("chain", "draw", ...)
    return np.asarray(values, float).reshape(-1, *values.shape[2:])


def _names(container: Any, name: str, dim: str) -> list[str]:
    return [str(value) for value in np.asarray(_variable(container, name)[dim])]


def _intervals(ax: Axes, draws: np.ndarray, places: np.ndarray, *, along: str, color: str) -> None:
    """Lines that hold 90 % and 50 % of the draws (draws, items) at ``places``; nothing for one draw."""
    if len(draws) == 1:
        return
    lines = ax.hlines if along == "x" else ax.vlines
    for probability, width in _INTERVALS:
        low, high = np.quantile(draws, [(1 - probability) / 2, (1 + probability) / 2], axis=0)
        lines(places, low, high, colors=color, linewidth=width, alpha=0.7)
