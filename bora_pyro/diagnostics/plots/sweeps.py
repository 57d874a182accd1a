"""Plots of several fits: perplexity against τ, gain of each task, centred and non-centred prior, path of a learned τ.

Each function takes data and an axis, and returns the axis. A sweep table is that of ``bora_pyro.diagnostics.sweep_table``, with
one row per run and task.

>>> import matplotlib.pyplot as plt
>>> figure, ax = plt.subplots()
>>> tau_path([{"step": 10, "tau": {"q_proj.lora_A": 90.0}}, {"step": 20, "tau": {"q_proj.lora_A": 120.0}}], ax).get_yscale()
'log'
>>> plt.close(figure)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from bora_pyro.diagnostics.plots.labels import legend_above
from bora_pyro.diagnostics.plots.style import (
    BLACK,
    BLUE,
    GREY,
    LIGHT,
    LINES,
    MARKERS,
    PALETTE,
    VERMILLION,
    plain_log_ticks,
    tau_axis,
    tau_text,
)
from bora_pyro.diagnostics.sweep_table import at_best_rates, runs
from bora_pyro.errors import InputError, nearest

_NEAR = 1.25  # the base model's line is drawn only if it is below this multiple of the highest point


def tau_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw perplexity against τ, each τ at its best learning rate, as in Figure 2 of the BoRA paper.

    The blue line is the mean test perplexity over seeds, with its standard deviation and the values of the single seeds. The grey
    line is the mean validation perplexity. The values 0 and ∞ are at the ends, behind a break of the axis. A learned τ is a star
    at its fitted value, and a horizontal line. The base model is a dotted line, drawn only if it is near the other points.

    Args:
        table: a sweep table; some runs, seeds and values of τ may be missing.
        ax: the axis to draw on.

    Raises:
        InputError: if no run of the table has a test perplexity.
    """
    chosen = runs(at_best_rates(table))
    tested = chosen[np.isfinite(chosen["test_perplexity"])]
    if tested.empty:
        raise InputError("the sweep table has no run with a test perplexity; give the --output of tau_sweep.py")
    learned = tested[tested["tau"] == "learned"]
    fixed = chosen[chosen["tau"] != "learned"]
    fitted = learned["fitted_tau"][(learned["fitted_tau"] > 0) & np.isfinite(learned["fitted_tau"])]
    places = tau_axis(ax, fixed["tau"].unique(), also=fitted)
    if not fixed.empty:
        _line_of_means(ax, fixed, places, "validation_perplexity", label="validation", color=LIGHT, marker="s", line="--")
        seeds = tested.groupby("tau")["seed"].nunique().max()
        label = "test" if seeds == 1 else f"test, mean ± sd of {seeds} seeds"
        _line_of_means(ax, fixed, places, "test_perplexity", label=label, color=BLUE, marker="o", line="-", spread=True)
    if not learned.empty:
        _learned(ax, learned, fitted)
    base, top = chosen["base_test_perplexity"].mean(), ax.dataLim.y1
    if base <= _NEAR * top:
        ax.axhline(base, color=BLACK, linestyle=":", linewidth=1, label="base model")
    ax.set_ylabel("perplexity")
    legend_above(ax, ncols=2)
    return ax


def _line_of_means(
    ax: Axes, table: pd.DataFrame, places: Mapping[str, float], column: str, *, label: str, color: str, marker: str, line: str,
    spread: bool = False,
) -> None:  # fmt: skip
    """Draw means over seeds: a line through the finite positive τ, and a dotted line across the breaks to 0 and ∞."""
    finite = table[np.isfinite(table[column])]
    means = finite.groupby("tau")[column].agg(["mean", "std"])
    means = means.assign(place=[places[tau] for tau in means.index]).sort_values("place")
    inner = [tau for tau in means.index if 0 < float(tau) < math.inf]
    if spread and means["std"].notna().any():
        at_seed = [places[tau] for tau in finite["tau"]]
        ax.plot(at_seed, finite[column], linestyle="none", marker=".", color=GREY, markersize=4, gid=f"{column} seeds", zorder=3)
        ax.errorbar(means["place"], means["mean"], means["std"].fillna(0), fmt="none", ecolor=color, capsize=3, elinewidth=1)
    ax.plot(means["place"], means["mean"], linestyle=":", color=color, linewidth=1)
    ax.plot(means["place"][inner], means["mean"][inner], linestyle=line, color=color)
    style: dict[str, Any] = {"linestyle": line if inner else "none", "marker": marker, "color": color}
    # markers at every τ; an empty plot gives the legend an entry with both line and marker
    ax.plot(means["place"], means["mean"], **style | {"linestyle": "none"}, gid=column)
    ax.plot([], [], **style, label=label)


def _learned(ax: Axes, learned: pd.DataFrame, fitted: pd.Series) -> None:
    mean, spread = learned["test_perplexity"].mean(), learned["test_perplexity"].std()
    ax.axhline(mean, color=VERMILLION, linestyle="-.", linewidth=1)
    if fitted.empty:
        ax.plot([], [], color=VERMILLION, linestyle="-.", linewidth=1, label="learned τ")
        return
    place = float(np.exp(np.log(fitted).mean()))
    ax.errorbar([place], [mean], [spread if len(learned) > 1 else 0.0], fmt="none", ecolor=VERMILLION, capsize=3, elinewidth=1)
    line: dict[str, Any] = {"color": VERMILLION, "marker": "*", "markersize": 11, "linewidth": 1}
    ax.plot([place], [mean], linestyle="none", gid="learned", zorder=4, **line)
    ax.plot([], [], linestyle="-.", label=f"learned τ = {float(f'{place:.3g}'):g}", **line)


def task_gain(table: pd.DataFrame, ax: Axes, *, tau: str, reference: str) -> Axes:
    """Draw each task's gain in perplexity of one τ over another against N_d, as in Figure 3 of the BoRA paper.

    The gain is 100 (1 − perplexity at ``tau`` / perplexity at ``reference``) percent. It is computed for each seed; the plot has
    the mean over seeds and their standard deviation. Call the function again with another reference to draw both on one axis.

    Args:
        table: a sweep table.
        ax: the axis to draw on.
        tau: the τ whose gain is drawn, as written in the table, for instance "100" or "learned".
        reference: the τ to compare with, for instance "0" or "inf".

    Raises:
        InputError: if the table lacks one of the two τ, or they share no task and seed.
    """
    gains = gain_by_task(table, tau=tau, reference=reference)
    before = sum(str(line.get_gid()).startswith("gain over") for line in ax.lines)
    color, marker = PALETTE[before % len(PALETTE)], MARKERS[before % len(MARKERS)]
    if gains["spread"].notna().any():
        ax.errorbar(
            gains["documents"], gains["gain"], gains["spread"].fillna(0), fmt="none", ecolor=color, elinewidth=0.8, alpha=0.5
        )
    label = (
        f"τ = {tau_text(tau)} over τ = {tau_text(reference)}" if tau != "learned" else f"learned τ over τ = {tau_text(reference)}"
    )
    ax.plot(
        gains["documents"], gains["gain"], linestyle="none", marker=marker, color=color, alpha=0.85, label=label,
        gid=f"gain over {reference}",
    )  # fmt: skip
    if not before:
        ax.axhline(0, color=GREY, linewidth=0.8)
    documents_axis(ax, gains["documents"])
    ax.set_ylabel("gain in perplexity (%)")
    ax.autoscale(axis="y")
    legend_above(ax)
    return ax


def gain_by_task(table: pd.DataFrame, *, tau: str, reference: str) -> pd.DataFrame:
    """One row per task: documents (mean N_d), gain (percent, mean over seeds) and spread (standard deviation over seeds)."""
    best = at_best_rates(table)
    for value in (tau, reference):
        if value not in set(best["tau"]):
            there = sorted(set(best["tau"]))
            raise InputError(f"the sweep table has no tau {value!r}; it has {', '.join(there)}{nearest(value, there)}")
    keys = ["task", "seed"]
    ours, other = (best[best["tau"] == value].set_index(keys)["task_test_perplexity"] for value in (tau, reference))
    gain = (100 * (1 - ours / other)).dropna()
    if gain.empty:
        raise InputError(f"tau {tau!r} and {reference!r} share no task and seed in the sweep table; run both with one seed")
    by_task = gain.groupby("task").agg(["mean", "std"])
    documents = best.groupby("task")["task_train_documents"].mean()
    return pd.DataFrame({"documents": documents[by_task.index], "gain": by_task["mean"], "spread": by_task["std"]})


def documents_axis(ax: Axes, documents: Any) -> None:
    """Make x a logarithmic axis for N_d with plain numbers as tick labels. It stays linear if some N_d is 0."""
    low, high = float(np.min(documents)), float(np.max(documents))
    if low > 0:
        ax.set_xscale("log")
        ax.set_xlim(low / 1.3, high * 1.3)
        plain_log_ticks(ax)
    ax.set_xlabel("training documents of the task, $N_d$")


def form_curves(table: pd.DataFrame, ax: Axes, *, value: str = "validation_perplexity") -> Axes:
    """Draw how fast fits with the centred and the non-centred prior converge, one line per form and learning rate.

    Objectives are comparable only if both are computed from the same density, as in ``scripts/experiments/compare_forms.py``.
    The densities of the two forms differ by a constant.

    Args:
        table: columns form, learning_rate, step and ``value``. Rows without a value are ignored.
        ax: the axis to draw on. Its y axis becomes logarithmic if the values differ by more than a factor of 10.
        value: the column on the y axis: objective, validation_perplexity or test_perplexity.

    Raises:
        InputError: if a column is missing, or none of its values is a number.
    """
    for column in ("form", "learning_rate", "step", value):
        if column not in table.columns:
            there = f"it has {', '.join(table.columns)}{nearest(column, table.columns)}"
            raise InputError(f"the table of forms has no column {column!r}; {there}")
    table = table[np.isfinite(table[value])]
    table = table.assign(learning_rate=table["learning_rate"].astype(float))
    if table.empty:
        raise InputError(f"the table of forms has no number in the column {value!r}; give one that has")
    forms = sorted(table["form"].unique(), reverse=True)
    longest = table.groupby("form")["learning_rate"].nunique()
    for n, form in enumerate(forms):
        for m, (rate, rows) in enumerate(table[table["form"] == form].groupby("learning_rate")):
            rows = rows.sort_values("step")
            ax.plot(
                rows["step"], rows[value], color=PALETTE[n % len(PALETTE)], linestyle=LINES[n % len(LINES)],
                marker=MARKERS[m % len(MARKERS)], markersize=4, label=f"{form}, rate {rate:g}",
            )  # fmt: skip
        for _ in range(longest.max() - longest[form]):  # empty entries, so that each form has its own column of the legend
            ax.plot([], [], linestyle="none", label=" ")
    if table[value].min() > 0 and table[value].max() > 10 * table[value].min():
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("objective (nats a training observation)" if value == "objective" else value.replace("_", " "))
    legend_above(ax, ncols=len(forms))
    return ax


def tau_path(records: Sequence[Mapping[str, Any]], ax: Axes) -> Axes:
    """Draw the learned τ of each group against the step, on a logarithmic axis.

    Colour and marker show the slot, the line style shows the factor.

    Args:
        records: each has "step" and "tau", which maps a group such as "q_proj.lora_A" to a number or a list of numbers. A list
            is drawn as its geometric mean. Records without "tau" are ignored.
        ax: the axis to draw on.

    Raises:
        InputError: if no record has a τ.
    """
    records = [record for record in records if record.get("tau")]
    if not records:
        raise InputError("no record has a tau; give those of a fit with a learned tau")
    groups = list(dict.fromkeys(group for record in records for group in record["tau"]))
    slots = list(dict.fromkeys(group.rpartition(".")[0] for group in groups))
    factors = list(dict.fromkeys(group.rpartition(".")[2] for group in groups))
    for group in groups:
        slot, _, factor = group.rpartition(".")
        steps = [record["step"] for record in records if group in record["tau"]]
        values = [float(np.exp(np.mean(np.log(record["tau"][group])))) for record in records if group in record["tau"]]
        s, f = slots.index(slot), factors.index(factor)
        ax.plot(
            steps, values, color=PALETTE[s % len(PALETTE)], linestyle=LINES[f % len(LINES)], label=group,
            marker=MARKERS[s % len(MARKERS)], markevery=max(1, len(steps) // 6), markersize=4,
        )  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("step")
    ax.set_ylabel("learned precision τ")
    legend_above(ax, ncols=2)
    return ax


def compare_forest(table: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the difference of each prior's log predictive density (test documents) to the best prior, with standard errors.

    Args:
        table: the table of ``bora_pyro.diagnostics.shrinkage.compare_priors``. Its index is the names of the priors. It has the
            columns rank, elpd, dse and perplexity.
        ax: the axis to draw on.
    """
    table = table.sort_values("rank")
    difference = table["elpd"] - table["elpd"].iloc[0]  # 0 or below
    rows = np.arange(len(table))
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.errorbar(difference, rows, xerr=table["dse"].fillna(0), fmt="none", ecolor=BLUE, capsize=3)
    ax.plot(difference, rows, linestyle="none", marker="o", color=BLUE, gid="difference")
    ax.set_yticks(
        rows, [f"{name}\n(perplexity {value:.2f})" for name, value in zip(table.index, table["perplexity"], strict=True)]
    )
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlabel("log predictive density, difference to the best (nats ± se)")
    return ax
