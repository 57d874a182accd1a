"""Plots of a sweep: what is drawn over τ, and what tasks gain, equals the table."""

from __future__ import annotations

import numpy as np
import pytest

from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.plots.style import tau_axis
from bora_pyro.errors import InputError
from tests.diagnostics.plot_data import DOCUMENTS, TAUS, lines_of, points_of, sweep


def test_the_axis_of_tau_has_its_limits_beyond_the_ends(ax):
    places = tau_axis(ax, ["inf", "0", "3", "10000"], also=[0.5])
    assert places == {"0": 0.01, "3": 3.0, "10000": 10000.0, "inf": 100000.0}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "3", "$10^{4}$", "∞"]
    breaks = sorted({round(float(line.get_xdata()[0]), 3) for line in lines_of(ax, "break")})
    assert 0.01 < breaks[0] < 0.1
    assert 10000 < breaks[-1] < 100000


@pytest.mark.parametrize(("taus", "places"), [(["0", "inf"], {"0": 0.1, "inf": 10.0}), (["100"], {"100": 100.0}), ([], {})])
def test_the_axis_of_tau_copes_with_few(ax, taus, places):
    assert tau_axis(ax, taus) == places
    assert len(lines_of(ax, "break")) == 3 * sum(tau in ("0", "inf") for tau in taus)


def test_tau_curve_draws_means_spread_and_seeds_at_the_best_rates(ax):
    plots.tau_curve(sweep(), ax)
    places = [0.1, 1, 100, 10000, 100000]
    np.testing.assert_allclose(points_of(ax, "test_perplexity"), np.column_stack([places, [30.5, 26.5, 20.5, 23.5, 24.5]]))
    np.testing.assert_allclose(points_of(ax, "validation_perplexity")[:, 1], [32, 28, 22, 25, 26])
    assert sorted(points_of(ax, "test_perplexity seeds")[:, 1]) == [20, 21, 23, 24, 24, 25, 26, 27, 30, 31]
    (star,) = points_of(ax, "learned")
    np.testing.assert_allclose(star, [150, 21], rtol=1e-12)  # √(90 · 250)
    bars = [segment for bar in ax.containers[0].lines[2] for segment in bar.get_segments()]
    np.testing.assert_allclose([np.ptp(bar[:, 1]) for bar in bars], 2 * np.sqrt(0.5))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "validation",
        "test, mean ± sd of 2 seeds",
        "learned τ = 150",
    ]


def test_tau_curve_draws_the_base_where_it_is_near(ax):
    plots.tau_curve(sweep(base=33.0), ax)
    assert "base model" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert any(list(line.get_ydata()) == [33.0, 33.0] for line in ax.lines)


@pytest.mark.parametrize(
    ("taus", "seeds"), [(TAUS, 1), (["1", "100"], 1), (["0", "inf"], 1), (["100"], 2), (["0"], 1), (["learned"], 1)]
)
def test_tau_curve_copes_with_part_of_a_sweep(ax, taus, seeds):
    plots.tau_curve(sweep(taus, seeds=seeds), ax)
    assert len(lines_of(ax, "test_perplexity")) == (taus != ["learned"])
    assert len(lines_of(ax, "learned")) == ("learned" in taus)
    assert not ax.containers if seeds == 1 and "learned" not in taus else ax.containers
    ax.figure.canvas.draw()


def test_tau_curve_leaves_out_runs_without_a_perplexity(ax):
    table = sweep(seeds=1)
    table.loc[table["tau"] == "1", "test_perplexity"] = np.nan
    plots.tau_curve(table, ax)
    np.testing.assert_allclose(points_of(ax, "test_perplexity")[:, 0], [0.1, 100, 10000, 100000])
    table["test_perplexity"] = np.nan
    with pytest.raises(InputError, match="no run with a test perplexity"):
        plots.tau_curve(table, ax)


def test_a_learned_tau_that_ran_off_is_a_line_without_a_star(ax):
    table = sweep(seeds=1)
    table.loc[table["tau"] == "learned", "fitted_tau"] = np.inf
    plots.tau_curve(table, ax)
    assert not lines_of(ax, "learned")
    assert "learned τ" in [text.get_text() for text in ax.get_legend().get_texts()]


# what tasks gain and how far they stray


def test_task_gain_is_the_mean_over_seeds(ax):
    plots.task_gain(sweep(), ax, tau="100", reference="0")
    expected = [
        np.mean([100 * (1 - ((20 + seed) * (1 + 0.1 * d) + seed) / ((30 + seed) * (1 + 0.1 * d))) for seed in range(2)])
        for d in range(5)
    ]
    np.testing.assert_allclose(points_of(ax, "gain over 0"), np.column_stack([DOCUMENTS, expected]))
    plots.task_gain(sweep(), ax, tau="100", reference="inf")
    first, second = ax.get_legend().get_lines()
    assert first.get_marker() != second.get_marker()
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["τ = 100 over τ = 0", "τ = 100 over τ = ∞"]


def test_task_gain_needs_both_taus_at_one_seed(ax):
    with pytest.raises(InputError, match=r"no tau '1000'; it has .* did you mean '10000'"):
        plots.task_gain(sweep(), ax, tau="1000", reference="0")
    table = sweep(("0", "100"))
    table = table[(table["tau"] == "0") == (table["seed"] == 0)]
    with pytest.raises(InputError, match="share no task and seed"):
        plots.task_gain(table, ax, tau="100", reference="0")


def test_deviation_by_documents_of_a_sweep_has_a_series_for_each_tau_below_infinity(ax):
    table = sweep()
    plots.deviation_by_documents(table[table["learning_rate"] == "0.03"], ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "τ = 0", "τ = 1", "τ = 100", "τ = $10^{4}$", "learned τ",
    ]  # fmt: skip
    np.testing.assert_allclose(points_of(ax, "distance τ = 1")[:, 1], [0.5 * (d + 1) + 0.05 for d in range(5)])
    with pytest.raises(InputError, match="no deviation_norm of a tau below inf"):
        plots.deviation_by_documents(table[table["tau"] == "inf"], ax)
