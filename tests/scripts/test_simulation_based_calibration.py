"""Simulation-based calibration: the simulation and the exact posterior are right, guides find their optima, ranks are counted."""

from __future__ import annotations

import importlib.util
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate

from bora_pyro import HierarchicalNormal, InputError
from bora_pyro.diagnostics.plots import rank_histogram
from bora_pyro.priors import RandomPrecision
from bora_pyro.priors.random_precision import HYPERPRIORS
from tests.tiny_base import SCRIPTS, script

sbc = script("simulation_based_calibration")
COUNTS = torch.tensor(sbc.COUNTS, dtype=torch.float64)


def config(**options):
    return sbc.CalibrationConfig(**{"simulations": 6, "steps": 300} | options)


@pytest.mark.parametrize("case", sbc.CASES)
def test_simulations_in_a_plate_are_simulations_apart(case):
    truth, y = sbc.simulate(config(), case)
    prior = HierarchicalNormal(4.0) if case == sbc.KNOWN else RandomPrecision(case, "layer", scale=0.5, start=4.0)

    def log_joint(chosen, layers):
        model = sbc.Hierarchies(prior, y[:, chosen], 1.0, layers=layers)
        sites = model.sites_of(sbc.Values(truth.theta[:, chosen], truth.mean[chosen], truth.tau[chosen]))
        given = model.values(sites, truth.tau[chosen])
        torch.testing.assert_close(given.theta, truth.theta[:, chosen])
        return float(poutine.trace(poutine.condition(model, data=sites)).get_trace().log_prob_sum())

    everything = slice(None)
    apart = sum(log_joint(slice(n, n + 1), False) for n in range(y.shape[1]))
    assert log_joint(everything, False) == pytest.approx(apart, rel=1e-12)
    assert log_joint(everything, True) == pytest.approx(apart, rel=1e-12)


@pytest.mark.parametrize("hyperprior", HYPERPRIORS)
def test_the_posterior_of_tau_on_the_grid(hyperprior):
    y = torch.randn((len(COUNTS), 1, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = COUNTS.view(-1, 1, 1)
    prior = HYPERPRIORS[hyperprior](torch.tensor(0.5, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
    log_tau = torch.linspace(-12, 12, 481, dtype=torch.float64)
    found = sbc.posterior_of_tau(y, h, prior, log_tau)[0]

    def density(x):
        # Θ integrated out by the covariance of the task means: contrasts to the first task are free of Θ
        covariance = torch.diag(math.exp(-x) + 1 / COUNTS)
        contrast = torch.cat([-torch.ones(len(COUNTS) - 1, 1), torch.eye(len(COUNTS) - 1)], 1).double()
        normal = dist.MultivariateNormal(torch.zeros(len(COUNTS) - 1).double(), contrast @ covariance @ contrast.T)
        log_p = normal.log_prob((contrast @ y[:, 0]).T).sum() + prior.log_prob(torch.tensor(math.exp(x))) + x
        return math.exp(float(log_p))

    total = integrate.trapezoid([density(x) for x in log_tau.tolist()[::4]], dx=0.2)
    for index in (200, 240, 280):
        assert float(found[index]) / 0.05 == pytest.approx(density(float(log_tau[index])) / total, rel=1e-3)


def test_quantiles_of_tau_invert_the_distribution():
    _, y = sbc.simulate(config(), "gamma")
    exact = sbc.Exact(config(), "gamma", y)
    median = exact.quantile(torch.full((6,), 0.5, dtype=torch.float64)).log()
    edges = exact.log_tau + 0.5 * (exact.log_tau[1] - exact.log_tau[0])
    at_median = [np.interp(float(median[s]), edges, exact.cumulative[s]) for s in range(6)]
    assert at_median == pytest.approx([0.5] * 6, abs=1e-6)


def test_laplace_is_exact_where_tau_is_known():
    _, y = sbc.simulate(config(), sbc.KNOWN)
    draws = {name: [] for name in ("laplace", "exact")}
    model, guide = sbc.fitted_guide(config(), sbc.KNOWN, "laplace", y)
    sources = {
        "laplace": sbc.draws_of(model, guide, torch.full((6,), 4.0)),
        "exact": sbc.exact_draws(sbc.Exact(config(), sbc.KNOWN, y)),
    }
    with poutine.seed(rng_seed=0):
        for name, source in sources.items():
            draws[name] = torch.stack([next(source).theta for _ in range(600)])
    torch.testing.assert_close(draws["laplace"].mean(0), draws["exact"].mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(draws["laplace"].std(0).mean((1, 2)), draws["exact"].std(0).mean((1, 2)), atol=0, rtol=0.05)


@pytest.mark.parametrize("name", ["normal", "low_rank", "auto_normal"])
def test_guides_have_the_mean_field_scales(name):
    # the entries of an adapter are independent a posteriori, so that a covariance over them finds none
    _, y = sbc.simulate(config(simulations=30), sbc.KNOWN)
    model, guide = sbc.fitted_guide(config(steps=150, learning_rate=0.1), sbc.KNOWN, name, y)
    draws = sbc.draws_of(model, guide, torch.full((30,), 4.0))
    with poutine.seed(rng_seed=0):
        values = [next(draws) for _ in range(100)]
    scale = torch.stack([value.mean for value in values]).std(0).mean()
    deviations = torch.stack([value.theta - value.mean for value in values]).std(0).mean((1, 2))
    assert float(scale) == pytest.approx(float(COUNTS.sum()) ** -0.5, rel=0.08)
    torch.testing.assert_close(deviations, (4 + COUNTS) ** -0.5, atol=0, rtol=0.05)


@pytest.mark.parametrize(("case", "name"), [(sbc.KNOWN, "laplace"), ("half_cauchy", "exact"), ("gamma", "exact")])
def test_ranks_of_the_posterior_are_uniform(case, name):
    for rank in sbc.ranks(config(simulations=400, draws=39), case, name).values():
        numbers = sbc.assess(rank, 39)
        assert numbers["p_value"] > 1e-3
        assert numbers["coverage_50"] == pytest.approx(0.5, abs=0.1)
        assert numbers["coverage_90"] == pytest.approx(0.9, abs=0.06)


def test_assessment_of_known_ranks():
    even = torch.arange(100).repeat(3)
    numbers = sbc.assess(even, 99)
    assert sbc.histogram(even, 99).tolist() == [15] * 20
    assert numbers == {"simulations": 300, "chi_square": 0.0, "p_value": 1.0, "coverage_50": 0.5, "coverage_90": 0.9}
    ends = sbc.assess(torch.tensor([0, 99]).repeat(50), 99)
    assert ends["chi_square"] == pytest.approx((2 * 45**2 + 18 * 5**2) / 5)
    assert ends["p_value"] < 1e-100
    assert ends["coverage_90"] == 0


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sbc, "CASES", {sbc.KNOWN: ("laplace",), "gamma": ("exact", "normal")})
    words = [
        "--simulations",
        "20",
        "--draws",
        "19",
        "--steps",
        "3",
        "--output",
        str(tmp_path / "h.csv"),
        "--summary",
        str(tmp_path / "s.csv"),
    ]
    assert sbc.main(words) == 0
    out = capsys.readouterr().out
    assert "| gamma | normal | 20 |" in out
    histograms, summary = pd.read_csv(tmp_path / "h.csv"), pd.read_csv(tmp_path / "s.csv")
    assert (histograms.groupby(["case", "guide", "quantity"])["count"].sum() == 20).all()
    assert len(summary) == 7 + 8 + 8
    monkeypatch.syspath_prepend(SCRIPTS.parent / "paper_figures")
    figure = importlib.import_module("simulation_based_calibration_figure")
    options = figure.CalibrationFigureConfig(calibration=str(tmp_path / "h.csv"), output=str(tmp_path / "f.png"))
    assert figure.draw(options) == str(tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draws", "100"], "draws is 100; give one less than a multiple of 20, nearest: 99"),
        (["--simulations", "0"], "simulations is 0; give a whole number from 1 up"),
        (["--tau", "inf"], "tau is inf; give a finite number above 0"),
    ],
)
def test_bad_options(capsys, words, message):
    assert sbc.main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_histogram_is_relative_to_a_uniform_one():
    figure, ax = plt.subplots()
    rank_histogram({"a": [1, 3], "b": [40, 40]}, ax)
    drawn = {patch.get_gid(): patch.get_data().values.tolist() for patch in ax.patches if patch.get_gid() in ("a", "b")}
    assert drawn == {"a": [0.5, 1.5], "b": [1.0, 1.0]}
    [band] = [patch for patch in ax.patches if patch.get_gid() == "band"]
    low, high = dist_interval(80, 0.5)
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low / 40, high / 40))
    plt.close(figure)
    for counts in ({}, {"a": [0, 0]}, {"a": [1, 2], "b": [1]}):
        with pytest.raises(InputError, match="same number of bins, and a simulation each"):
            rank_histogram(counts, ax)
    with pytest.raises(InputError, match="level is 1"):
        rank_histogram({"a": [1]}, ax, level=1)


def dist_interval(n, p, level=0.95):
    """The central interval of a Binomial, from its probabilities."""
    cumulative = np.cumsum([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    return tuple(int(np.searchsorted(cumulative, bound)) for bound in ((1 - level) / 2, (1 + level) / 2))


def test_an_unknown_guide(capsys):
    assert sbc.main(["--guides", "structure"]) == 2
    assert "error: guide 'structure' is not known here; known: laplace, normal, structured" in capsys.readouterr().err
