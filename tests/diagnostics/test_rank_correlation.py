"""Spearman's rank correlation with its interval, against scipy and where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from bora_pyro import InputError
from bora_pyro.diagnostics.rank_correlation import rank_correlation


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_scipys(ties):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 25))
    y += x
    if ties:
        x, y = x.round(), y.round()
    assert rank_correlation(x, y).rho == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_each_draw_is_scipys_correlation_of_the_drawn_tasks():
    x, y = np.random.default_rng(2).normal(size=(2, 6)).round(1)
    index = np.random.default_rng(7).integers(6, size=(40, 6))
    drawn = [spearmanr(x[row], y[row]).statistic for row in index if len(set(x[row])) > 1 and len(set(y[row])) > 1]
    found = rank_correlation(x, y, draws=40, seed=7, probability=0.8)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])), abs=1e-12)


def test_a_monotone_relation_has_no_spread():
    found = rank_correlation([7, 20, 54, 103, 201], -np.exp([7, 20, 54, 103, 201]))
    assert (found.rho, found.low, found.high, found.tasks) == pytest.approx((-1, -1, -1, 5))


def test_ranks_alone_count_and_the_two_are_alike():
    x, y = np.random.default_rng(3).normal(size=(2, 12))
    assert rank_correlation(x, y) == rank_correlation(np.exp(x), y**3)
    assert rank_correlation(x, y).rho == pytest.approx(rank_correlation(y, x).rho)


def test_the_interval_covers_independence_about_as_often_as_it_says():
    generator = np.random.default_rng(4)
    covered = [
        found.low <= 0 <= found.high
        for found in (rank_correlation(*generator.normal(size=(2, 25)), draws=400, seed=n) for n in range(200))
    ]
    assert 0.88 <= np.mean(covered) <= 0.99


def test_tasks_without_a_value_are_left_out():
    assert rank_correlation([1, 2, 3, 4, math.nan], [1, 3, 2, math.inf, 0]) == rank_correlation([1, 2, 3], [1, 3, 2])


@pytest.mark.parametrize(("same", "tasks"), [(4, 4), (15, 16), (10, 12), (4, 5)])
def test_tasks_that_are_mostly_alike_have_no_correlation(same, tasks):
    """Their ρ would compare a few tasks with all others."""
    alike = [24] * same + list(range(tasks - same))
    for x, y in ((alike, range(tasks)), (range(tasks), alike)):
        found = rank_correlation(list(x), list(y))
        assert math.isnan(found.rho)
        assert str(found) == f"ρ says nothing: {same} of {tasks} tasks are alike"


def test_three_quarters_may_be_alike():
    assert rank_correlation([24, 24, 24, 7], [1, 2, 3, 0]).rho == pytest.approx(
        spearmanr([24, 24, 24, 7], [1, 2, 3, 0]).statistic
    )


@pytest.mark.parametrize(("x", "y", "words"), [([1, 2], [1, 2], "2 tasks"), ([1, 2, 3], [1, 2], "shapes")])
def test_what_has_no_ranks(x, y, words):
    with pytest.raises(InputError, match=words):
        rank_correlation(x, y)
