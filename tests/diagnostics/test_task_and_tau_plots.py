"""Plots of each task's range of perplexities and of a posterior of τ."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from bora_pyro.diagnostics import plots


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_intervals_of_tau_are_quantiles(ax):
    draws = {"q.A": np.linspace(10, 110, 101), "fc.B": np.full(5, 7.0)}
    assert plots.tau_intervals(draws, {"q.A": 50.0, "fc.B": 6.0}, ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fc.B", "q.A"]
    [lines] = ax.collections
    np.testing.assert_allclose([segment[:, 0] for segment in lines.get_segments()], [[7, 7], [15, 105]])
    middle, learned = ax.lines
    np.testing.assert_allclose(middle.get_xdata(), [7, 60])
    np.testing.assert_allclose(learned.get_xdata(), [6, 50])
    assert ax.get_xscale() == "log"


def test_ranges_of_tasks_leave_the_learned_tau_out(ax):
    table = pd.DataFrame({"0": [20.0, 30.0], "100": [18.0, 33.0], "learned": [10.0, 50.0]}, index=["ada (3)", "bo (9)"])
    assert plots.task_ranges(table, "learned", ax) is ax
    [lines] = ax.collections
    np.testing.assert_allclose([segment[:, 0] for segment in lines.get_segments()], [[18, 20], [30, 33]])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [10, 50])
    assert ax.get_xlim() == pytest.approx((9.3, 53.5))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ada (3)", "bo (9)"]
