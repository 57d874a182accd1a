"""The page of a sweep over τ, from its table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.sweep_table import LEARNED, at_best_rates, best_rates, best_tau, runs, tau_order
from bora_pyro.errors import InputError
from bora_pyro.files.text import replaced
from bora_pyro.report.blocks import (
    Cell,
    Column,
    Folded,
    Number,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    number_text,
    option_text,
    short_number,
)
from bora_pyro.report.pictures import draw_picture, name_labels
from bora_pyro.report.run_pictures import MANY_TASKS
from bora_pyro.runs.versions import versions

#: The footer says that its versions are those of this page: the fits may have had others.
HERE = "this page"
#: Largest number of score columns in a table of tasks.
MOST = 12


def sweep_page(table: pd.DataFrame, *, title: str, options: Mapping[str, Any] | None = None) -> Page:
    """Make the page of a sweep.

    Args:
        table: the sweep's table, as :func:`bora_pyro.diagnostics.sweep_table.read_sweep` returns it.
        title: the name of the sweep.
        options: the options that all its fits share; None: they are not known.

    Raises:
        InputError: no run has a validation perplexity, which is needed to choose the learning rate.
    """
    rates, chosen, every = best_rates(table), runs(at_best_rates(table)), runs(table)
    seeds, tasks = sorted(every.seed.unique()), table.drop_duplicates("task")
    pictures = [*sweep_pictures(table)]
    sections = [
        Section("results", "Results", [_by_tau(chosen, rates)], _verdict(table, chosen)),
        Section("pictures", "What sharing does", [Pictures(pictures)] if pictures else []),
        Section("tasks", "By task", [_by_task(table)]),
        Section("runs", "All fits", [Folded(f"The {len(every)} fits", _all_runs(every))]),
        Section("configuration", "Configuration", [] if options is None else [options_block(options)]),
    ]
    subtitle = f"{len(tasks):,} tasks · {len(every)} fits · {len(seeds)} seed{'s' * (len(seeds) != 1)}"
    return Page("sweep", title, subtitle, [*_numbers(table, chosen)], sections, versions=versions(), versions_of=HERE)


def sweep_pictures(table: pd.DataFrame) -> Iterator[Picture]:
    """Draw test perplexity against τ, the gain of each task, and the deviations at each τ."""
    best = at_best_rates(table)
    if not table["test_perplexity"].notna().any():
        return
    table = table.assign(task=table["task"].map(name_labels(table["task"].unique())))
    yield draw_picture(
        "curve",
        "Perplexity against the strength of the prior",
        "Each τ at its best learning rate, chosen by the validation documents of the first seed. At the left end every task has "
        "an adapter of its own, at the right end all tasks share one. The star is the fit that learned τ.",
        lambda ax: plots.tau_curve(table, ax),
        height=3.4,
    )
    taus = set(best["tau"])
    ours = LEARNED if LEARNED in taus else _chosen(best)
    references = [tau for tau in ("0", "inf") if tau in taus and tau != ours]
    if ours is not None and references and best["task_test_perplexity"].notna().any():

        def gains(ax: Any) -> None:
            for reference in references:
                plots.task_gain(table, ax, tau=ours, reference=reference)

        yield draw_picture(
            "gain",
            "What each task gains by sharing",
            "Gain in test perplexity over independent adapters (τ = 0) and over one adapter for all tasks (τ = ∞), against the "
            "number of training documents of the task. Below 0 the limit is better.",
            gains,
            height=3.4,
        )
    if (best[best["tau"] != "inf"]["deviation_norm"] > 0).any() and table["task"].nunique() <= MANY_TASKS:
        yield draw_picture(
            "deviation",
            "Distance from the global mean",
            "‖θ_d − Θ‖ of each task at each τ, means over seeds. The stronger the prior, the closer the tasks stay to Θ.",
            lambda ax: plots.deviation_by_documents(at_best_rates(table), ax),
            height=3.4,
        )


def _chosen(table: pd.DataFrame) -> str | None:
    """The fixed τ that the validation documents choose; None if there is none to choose."""
    try:
        return best_tau(table)
    except InputError:
        return None


def _numbers(table: pd.DataFrame, chosen: pd.DataFrame) -> Iterator[Number]:
    best = _chosen(table)
    for tau, label in ((best, "best fixed\u00a0τ"), (LEARNED, "learned\u00a0τ")):
        rows = chosen[chosen.tau == tau]
        if tau is None or rows.empty:
            continue
        fitted = short_number(_geometric_mean(rows.fitted_tau)) if tau == LEARNED else tau_cell(tau).text
        yield perplexity_number(f"test perplexity, {label}\u00a0=\u00a0{fitted}", *_mean_and_spread(rows.test_perplexity))
    base = chosen.drop_duplicates("seed").base_test_perplexity
    yield perplexity_number("base model", *_mean_and_spread(base))
    if best is not None:
        yield Number("validation chooses", f"τ = {tau_cell(best).text}", "of the fixed ones")


def _verdict(table: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """One sentence that compares the learned or best τ with the limits."""
    best = _chosen(table)
    ours = LEARNED if LEARNED in set(chosen.tau) else best
    means = chosen.groupby("tau").test_perplexity.mean()
    if ours is None or not np.isfinite(means.get(ours, math.nan)):
        return ""
    texts = []
    for reference, what in (("0", "independent adapters"), ("inf", "one adapter for all"), (best or "", "the best fixed τ")):
        ratio = means[ours] / means[reference] if reference in means.index and reference != ours else math.nan
        if np.isfinite(ratio):
            texts.append(f"{number_text(100 * (ratio - 1), 1, sign=True)}\u00a0% against {what}")
    name = "the learned τ" if ours == LEARNED else f"τ = {tau_cell(ours).text}"
    return f"Test perplexity with {name}: {', '.join(texts)}." if texts else ""


def _by_tau(chosen: pd.DataFrame, rates: Mapping[str, str]) -> Table:
    rows, scores = [], ("validation_perplexity", "test_perplexity")
    means = {name: chosen.groupby("tau")[name].mean() for name in scores}
    for tau, rate in rates.items():
        of_tau = chosen[chosen.tau == tau]
        fitted = of_tau.fitted_tau
        cells = [tau_cell(tau, short_number(_geometric_mean(fitted)) if tau == LEARNED else None), Cell(rate, float(rate))]
        for name in scores:
            cells.append(_mean_cell(of_tau[name], strong=means[name][tau] == means[name].min()))
        ratio = of_tau.test_perplexity / of_tau.base_test_perplexity
        rows.append([*cells, ratio.mean(), of_tau.fit_seconds.mean(), len(of_tau)])
    base = _mean_cell(chosen.drop_duplicates("seed").base_test_perplexity)
    return Table(
        "Means ± standard deviations over seeds, each τ at its best learning rate; the lowest perplexities are bold",
        [
            Column("prior τ", number=True), Column("learning rate", number=True), Column("validation perplexity", number=True),
            Column("test perplexity", number=True), Column("ratio to base", 3), Column("seconds a fit", 0), Column("fits", 0),
        ],
        rows,
        total=["base model", None, None, base, 1.0, None, None],
    )  # fmt: skip


def _by_task(table: pd.DataFrame) -> Table:
    best = at_best_rates(table)
    taus = sorted(best["tau"].unique(), key=tau_order)[:MOST]
    by_task = best.groupby(["task", "tau"], sort=False)["task_test_perplexity"].mean()
    rows = []
    for task, own in best.groupby("task", sort=False):
        scores = [by_task.get((task, tau), math.nan) for tau in taus]
        lowest = min((score for score in scores if np.isfinite(score)), default=None)
        base = own.drop_duplicates("seed")["task_base_test_perplexity"].mean()
        rows.append(
            [replaced(str(task)), own["task_train_documents"].mean(), base, *(score_cell(score, lowest) for score in scores)]
        )
    heads = [Column("learned\u00a0τ" if tau == LEARNED else f"τ\u00a0=\u00a0{tau_cell(tau).text}", number=True) for tau in taus]
    return Table(
        "Test perplexity by task, means over seeds, each τ at its best learning rate; the lowest of each task is bold",
        [Column("task"), Column("training documents", 0), Column("base", 2), *heads],
        rows,
    )


def _all_runs(every: pd.DataFrame) -> Table:
    names = ["validation_perplexity", "test_perplexity", "base_test_perplexity", "best_epoch", "fit_seconds"]
    columns = [
        Column("prior τ", number=True), Column("learning rate", number=True), Column("seed", 0), Column("fitted τ", number=True),
        Column("validation perplexity", 2), Column("test perplexity", 2), Column("base perplexity", 2), Column("best epoch", 0),
        Column("seconds", 1),
    ]  # fmt: skip
    rows = []
    for run in every.to_dict("records"):
        fitted = Cell(short_number(run["fitted_tau"]), run["fitted_tau"]) if np.isfinite(run["fitted_tau"]) else tau_cell("inf")
        own = [tau_cell(run["tau"]), Cell(run["learning_rate"], float(run["learning_rate"])), run["seed"], fitted]
        rows.append([*own, *(run[name] for name in names)])
    return Table("Every fit, a row each", columns, rows)


def options_block(options: Mapping[str, Any]) -> Folded:
    """A closed table of the options that the runs share."""
    rows = [[key, option_text(value)] for key, value in options.items()]
    return Folded(
        "Options that all the fits share",
        Table("Options that all the fits share", [Column("option"), Column("value")], rows, sortable=False),
    )


def perplexity_number(label: str, value: float, note: str) -> Number:
    """A perplexity as a headline number."""
    return Number(label, number_text(value) if np.isfinite(value) else "–", note)


def _mean_and_spread(values: pd.Series) -> tuple[float, str]:
    values = values.dropna()
    spread = f"± {number_text(values.std())}, {len(values)} seeds" if len(values) > 1 else ""
    return (float(values.mean()) if len(values) else math.nan), spread


def _mean_cell(values: pd.Series, *, strong: bool = False) -> Cell:
    values = values.dropna()
    if values.empty:
        return Cell("–")
    spread = f" ± {number_text(values.std())}" if len(values) > 1 else ""
    return Cell(number_text(values.mean()) + spread, float(values.mean()), strong=strong)


def score_cell(score: float, lowest: float | None) -> Cell:
    """A perplexity as a cell, bold if it is the lowest of its row."""
    return Cell(number_text(score), score, strong=score == lowest) if np.isfinite(score) else Cell("–")


def tau_cell(tau: str, fitted: str | None = None) -> Cell:
    """A τ as a cell, sorted by its value; ``learned`` comes after ∞."""
    if tau == LEARNED:
        return Cell(LEARNED if fitted is None else f"learned, {fitted}", 1e300)
    return Cell("∞" if tau == "inf" else short_number(float(tau)), 1e299 if tau == "inf" else float(tau))


def _geometric_mean(values: pd.Series) -> float:
    positive = values[(values > 0) & np.isfinite(values)]
    return float(np.exp(np.log(positive).mean())) if len(positive) else math.nan
