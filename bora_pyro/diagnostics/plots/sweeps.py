"""Plots of many fits: perplexity against τ, what each task gains, the two forms of the prior, the learned τ.

Each takes data and an axis and returns the axis. A sweep table is that of ``bora_pyro.diagnostics.sweep_table``: one row a run x
task.

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

_NEAR = 1.25  # the base's line is drawn where it is at most this much above the highest point


def tau_curve(table: pd.DataFrame, ax: Axes) -> Axes:
    """Perplexity against τ, each τ at its best learning rate (the BoRA paper's Figure 2).

    The thick line is the mean test perplexity over seeds, with its standard deviation and the single seeds about it; the
    lighter one the validation perplexity. 0 and ∞ stand at the ends, beyond a break in the axis. A learned τ is a star at its
    fitted value and a line across. The base is drawn where it is near.

    Args:
        table: a sweep table; runs, seeds and values of τ may be missing.
        ax: where to draw.

    Raises:
        InputError: no run of the table has a test perplexity.
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
    """Means over seeds: a line through the finite τ, a dotted one across the breaks to 0 and ∞."""
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
    # the markers alone, at every τ; the legend shows line and marker together
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
    """What each task gains by τ over another τ, in percent of its perplexity, against its N_d (the BoRA paper's Figure 3).

    100 (1 − perplexity at ``tau`` / perplexity at ``reference``), of each seed, then the mean over seeds, with its standard
    deviation. Call it once more with another reference to draw both on one axis.

    Args:
        table: a sweep table.
        ax: where to draw.
        tau: the τ whose gain is drawn, as the table writes it: "100", "learned".
        reference: the τ it is compared with: "0", "inf".

    Raises:
        InputError: the table has no such τ, or the two share no seed.
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
    """A row a task: documents (mean N_d), gain (percent, mean over seeds) and spread (its standard deviation)."""
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
    """Make x a logarithmic axis for N_d, with plain numbers as ticks."""
    low, high = float(np.min(documents)), float(np.max(documents))
    if low > 0:
        ax.set_xscale("log")
        ax.set_xlim(low / 1.3, high * 1.3)
        plain_log_ticks(ax)
    ax.set_xlabel("training documents of the task, $N_d$")


def form_curves(table: pd.DataFrame, ax: Axes, *, value: str = "validation_perplexity") -> Axes:
    """How fast the centred and the non-centred form come down, a line for each form and learning rate.

    Objectives compare where they are of one density, as ``scripts/experiments/compare_forms.py`` has them; those of the forms'
    own densities differ by a constant.

    Args:
        table: columns form, learning_rate, step and ``value``; rows without a value are left out.
        ax: where to draw. It becomes logarithmic where the values differ more than tenfold.
        value: the column that goes upwards: objective, validation_perplexity or test_perplexity.

    Raises:
        InputError: a column is missing, or none of its values is a number.
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
        for _ in range(longest.max() - longest[form]):  # so that each form has a column of the legend to itself
            ax.plot([], [], linestyle="none", label=" ")
    if table[value].min() > 0 and table[value].max() > 10 * table[value].min():
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("objective (nats a training observation)" if value == "objective" else value.replace("_", " "))
    legend_above(ax, ncols=len(forms))
    return ax


def tau_path(records: Sequence[Mapping[str, Any]], ax: Axes) -> Axes:
    """The learned τ of each group against the step, on a logarithmic axis; colour is the slot, line the factor.

    Args:
        records: each with "step" and "tau": {"q_proj.lora_A": a number, or a list of them (drawn as their geometric mean)};
            records without a τ are left out.
        ax: where to draw.

    Raises:
        InputError: no record has a τ.
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
        which, how = slots.index(slot), factors.index(factor)
        ax.plot(
            steps, values, color=PALETTE[which % len(PALETTE)], linestyle=LINES[how % len(LINES)], label=group,
            marker=MARKERS[which % len(MARKERS)], markevery=max(1, len(steps) // 6), markersize=4,
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
    """Differences of the log predictive density of the test documents to the best prior, with their standard errors.

    Args:
        table: a row a prior (its name is the index), columns rank, elpd, elpd_diff, dse, perplexity; in nats over all
            test documents, as ``az.compare`` has them.
        ax: where to draw.
    """
    table = table.sort_values("rank")
    difference = table["elpd"] - table["elpd"].iloc[0]  # whatever sign elpd_diff has
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
