"""ε against Opacus' own numbers and closed forms, and what is refused."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
from scipy.stats import norm

from bora_pyro import InputError
from bora_pyro.federated.accountant import epsilon_of, is_installed, noise_for

opacus = pytest.importorskip("opacus.accountants")
SETTING = {"sample_rate": 0.1, "steps": 100, "delta": 1e-3}


def of_opacus(kind, sigma, rate, steps, delta):
    accountant = opacus.create_accountant(kind)
    for _ in range(steps):
        accountant.step(noise_multiplier=sigma, sample_rate=rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accountant.get_epsilon(delta=delta)


@pytest.mark.parametrize("kind", ["rdp", "prv"])
@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [(1.0, 0.1, 100, 1e-3), (2.0, 1.0, 10, 1e-5)])
def test_epsilon_is_that_of_opacus(kind, sigma, rate, steps, delta):
    found = epsilon_of(sigma, sample_rate=rate, steps=steps, delta=delta, accountant=kind)
    assert found == of_opacus(kind, sigma, rate, steps, delta)


@pytest.mark.parametrize("kind", ["rdp", "prv"])
def test_epsilon_is_not_below_the_exact_one_of_full_samples(kind):
    """With q = 1, k steps are one Gaussian mechanism with noise σ/√k (Balle & Wang, 2018, theorem 8)."""
    sigma, steps, delta = 4.0, 9, 1e-4
    found, mu = epsilon_of(sigma, sample_rate=1.0, steps=steps, delta=delta, accountant=kind), math.sqrt(steps) / sigma

    def exact_delta(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    assert exact_delta(found) <= delta
    assert exact_delta(found / 1.3) > delta


def test_more_steps_more_samples_and_less_noise_cost_more():
    usual = epsilon_of(1.0, **SETTING)
    assert usual < epsilon_of(1.0, **SETTING | {"steps": 200}) < 2 * usual
    assert usual < epsilon_of(1.0, **SETTING | {"sample_rate": 0.2})
    assert usual < epsilon_of(0.8, **SETTING)
    assert usual < epsilon_of(1.0, **SETTING | {"delta": 1e-5})
    assert epsilon_of(1.0, **SETTING, accountant="prv") < usual
    assert epsilon_of(0.0, **SETTING) == math.inf
    assert epsilon_of(1.0, **SETTING | {"steps": 0}) == 0
    assert epsilon_of(1e5, **SETTING | {"delta": 0.1}) == 0  # the bound itself is below 0
    assert epsilon_of(0.05, **SETTING, accountant="prv") == epsilon_of(0.05, **SETTING)


def test_the_noise_for_an_epsilon():
    from opacus.accountants.utils import get_noise_multiplier

    for epsilon in (0.5, 3.0):
        found = noise_for(epsilon, **SETTING)
        assert epsilon_of(found, **SETTING) <= epsilon
        assert epsilon_of(found / 1.002, **SETTING) > epsilon
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = get_noise_multiplier(
                target_epsilon=epsilon, target_delta=1e-3, sample_rate=0.1, steps=100, epsilon_tolerance=1e-3
            )
        assert found == pytest.approx(theirs, rel=5e-3)
    assert noise_for(3.0, **SETTING, accountant="prv") < found
    assert epsilon_of(noise_for(1e6, **SETTING), **SETTING) <= 1e6
    with pytest.raises(InputError, match="epsilon is 1e-09, which no noise reaches at delta 1e-12"):
        noise_for(1e-9, sample_rate=0.1, steps=100, delta=1e-12)


def test_without_opacus_there_is_no_epsilon(monkeypatch):
    assert is_installed()
    monkeypatch.setitem(sys.modules, "opacus", None)
    assert not is_installed()
    with pytest.raises(InputError, match=r"opacus, which is not installed; pip install 'bora_pyro\[privacy\]'"):
        epsilon_of(1.25, **SETTING)
