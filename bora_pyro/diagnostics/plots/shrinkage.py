"""Plots of the container of a fit (``bora_pyro.diagnostics.shrinkage``): how far the tasks lie from Θ, and in which weights.

Each function takes the container and an axis, and returns the axis. A MAP fit has one draw, so no intervals are drawn. With
several draws (chain x draw) the points are medians, and the intervals contain 50 % and 90 % of the draws.

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
    """Draw ‖θ_d − Θ‖ of each task, the farthest task at the top, with N_d in parentheses.

    Args:
        container: its group ``posterior`` has ``distance`` (chain, draw, task), and ``constant_data`` has ``train_documents``
            (task). If ``posterior`` also has ``displacement``, as it does with draws, this is drawn instead, because the
            distances of draws hardly differ between tasks.
        ax: the axis to draw on, with a height of at least 0.2 inches per task.
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
    """Draw a density of each task's deviations from Θ, one ridge per task, the farthest task at the top.

    With one draw, the density is that of the root mean square deviations of the task's groups of weights (layer x module x
    factor), and each group has a mark. With several draws, it is the density of the draws of the variable that
    :func:`shrinkage_forest` draws.

    Args:
        container: its group ``posterior`` has ``rms_deviation`` (chain, draw, task, layer, module, factor). With several draws
            it also has ``distance`` or ``displacement`` (chain, draw, task).
        ax: the axis to draw on, with a height of at least 0.25 inches per task.
    """
    rms = _draws(container, "rms_deviation")
    tasks, factors = _names(container, "rms_deviation", "task"), _names(container, "rms_deviation", "factor")
    many = len(rms) > 1
    # for one draw: (task, factor, groups of that factor), so that each factor has its own kind of mark
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
    """Draw a density of height 0.9 above the line ``row``; nothing if the values do not differ."""
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
    """Draw ‖θ_d − Θ‖ against N_d, as in Figure 4 of the BoRA paper: tasks with more data deviate more.

    Args:
        container_or_table: a container as for :func:`shrinkage_forest`, or rows of a sweep table. In a table each τ is one
            series, with means over seeds. τ = ∞ is left out, because its deviations are 0. A single series has the names of the
            tasks beside its points; several series have a logarithmic y axis.
        ax: the axis to draw on.

    Raises:
        InputError: if the table has no τ below ∞.
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
    """The tasks, their N_d and their mean ‖θ_d − Θ‖ over seeds, by label of τ."""
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
    """Draw the deviations from Θ by layer and task: the mean over draws of √(mean of rms² over modules and factors).

    Args:
        container: its group ``posterior`` has ``rms_deviation`` (chain, draw, task, layer, module, factor). If
            ``constant_data`` has ``centre_rms_deviation`` (task, layer, module, factor), as it does with draws, this is drawn
            instead.
        ax: the axis to draw on. A colour bar is added beside it.
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
    """Draw the pooling factor of each group of weights by layer. 1 means one adapter for all tasks, 0 means separate adapters.

    Colour and marker show the module, the line style shows the factor. With several draws, bars contain 50 % and 90 % of them.

    Args:
        container: its group ``posterior`` has ``pooling_factor`` (chain, draw, layer, module, factor), or ``constant_data`` has
            one value for all draws together (layer, module, factor).
        ax: the axis to draw on.
    """
    draws = _draws(container, "pooling_factor")  # (draws, layer, module, factor)
    layers, modules, factors = (_names(container, "pooling_factor", name) for name in ("layer", "module", "factor"))
    places = np.arange(len(layers))
    width = 0.5 / (len(modules) * len(factors))  # the groups are drawn side by side, so that they do not overlap
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
    """The variable that measures how far the tasks lie from Θ, and its axis label, which mentions intervals if there are any."""
    name = "displacement" if "displacement" in container["posterior"] else "distance"
    many = len(_draws(container, name)) > 1
    return name, (_DISTANCE if name == "distance" else _DISPLACEMENT) + (interval if many else "")


def _variable(container: Any, name: str) -> Any:
    """A variable of the group ``posterior``, or of ``constant_data`` if it has one value for all draws together."""
    return container["posterior" if name in container["posterior"] else "constant_data"][name]


def _draws(container: Any, name: str) -> np.ndarray:
    """A variable with the dimensions chain and draw combined into the first axis: (draws, ...)."""
    values = _variable(container, name)
    if "draw" not in values.dims:
        return np.asarray(values, float)[None]
    values = values.transpose("chain", "draw", ...)
    return np.asarray(values, float).reshape(-1, *values.shape[2:])


def _names(container: Any, name: str, dim: str) -> list[str]:
    return [str(value) for value in np.asarray(_variable(container, name)[dim])]


def _intervals(ax: Axes, draws: np.ndarray, places: np.ndarray, *, along: str, color: str) -> None:
    """Draw lines that contain 90 % and 50 % of the draws (draws, items) at ``places``; nothing for one draw."""
    if len(draws) == 1:
        return
    lines = ax.hlines if along == "x" else ax.vlines
    for probability, width in _INTERVALS:
        low, high = np.quantile(draws, [(1 - probability) / 2, (1 + probability) / 2], axis=0)
        lines(places, low, high, colors=color, linewidth=width, alpha=0.7)
