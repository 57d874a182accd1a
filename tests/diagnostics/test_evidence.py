"""The evidence against the closed form of a linear-Gaussian hierarchy."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize_scalar

from bora_pyro import CausalLM, Given, HierarchicalNormal, Independent, InputError, Pooled
from bora_pyro.diagnostics.evidence import best_tau, evidence_summary, log_evidence
from bora_pyro.guides import LaplaceGuide, laplace_guide, laplace_kfac_guide, laplace_kronecker_guide
from bora_pyro.inference.evaluate import evaluate
from tests.linear_gaussian import SHAPE, LinearGaussian, kfac
from tests.tiny import random_weights, tiny_bora, tiny_data

TAU = 3.0
ANY_TAU = (0.02, TAU, 40.0, 1e4)


def diagonal(model, tau):
    return LaplaceGuide(model, model.sites_at_maximum(tau), {"q.x": model.curvature()})


EVERY_GUIDE = pytest.mark.parametrize("make", [diagonal, kfac])


def log_likelihood(model, tau):
    theta, _ = model.maximum(tau)
    return float(dist.Normal(theta[model.task], model.noise).log_prob(model.y).sum())


@EVERY_GUIDE
@pytest.mark.parametrize("prior", [HierarchicalNormal(TAU), HierarchicalNormal(TAU, "centered")], ids=repr)
def test_it_is_the_evidence_of_a_linear_gaussian_hierarchy(make, prior):
    model = LinearGaussian(prior)
    guide, at_estimate = make(model, TAU), log_likelihood(model, TAU)
    assert log_evidence(guide).nats + at_estimate == pytest.approx(float(model.log_evidence(TAU)), rel=1e-8)
    for tau in ANY_TAU:
        # the estimate follows τ, exactly
        found = log_evidence(guide, tau=tau, refit=True)
        assert found.nats + at_estimate == pytest.approx(float(model.log_evidence(tau)), rel=1e-8)
        assert log_evidence(guide, tau={"q.x": torch.tensor(tau)}, refit=True).nats == pytest.approx(found.nats, rel=1e-6)
    # a fixed estimate has the same slope at its own τ, and at another one too little evidence
    slopes = [
        (log_evidence(guide, tau=TAU * 1.001, refit=refit).nats - log_evidence(guide, tau=TAU / 1.001, refit=refit).nats)
        for refit in (False, True)
    ]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)
    assert log_evidence(guide, tau=40.0).nats < log_evidence(guide, tau=40.0, refit=True).nats - 1


@EVERY_GUIDE
def test_it_is_the_evidence_of_pooled_tasks(make):
    model = LinearGaussian(Pooled())
    found = log_evidence(make(model, math.inf)).nats + log_likelihood(model, math.inf)
    assert found == pytest.approx(float(model.log_evidence(math.inf)), rel=1e-8)
    assert best_tau(make(model, math.inf)) == {}


def test_a_given_mean_is_not_integrated():
    centre = torch.full(SHAPE, 0.5, dtype=torch.float64)
    model = LinearGaussian(Given({"q.x": centre}, {"q.x": torch.tensor(TAU, dtype=torch.float64)}))
    h, y = model.curvature(), model.task_means()
    theta = (TAU * centre + h * y) / (TAU + h)
    guide = LaplaceGuide(model, model.sites_given({"q.x": theta}, {"q.x": centre}), {"q.x": h})
    for tau in ANY_TAU:
        # the density of the task's means, with θ_d integrated out, and what the documents say besides
        of_means = dist.Normal(centre, (1 / tau + 1 / h).sqrt()).log_prob(y).sum()
        at_estimate = dist.Normal(theta, h**-0.5).log_prob(y).sum()
        assert log_evidence(guide, tau=tau, refit=True).nats == pytest.approx(float(of_means - at_estimate), rel=1e-8)


@EVERY_GUIDE
def test_the_best_tau(make):
    model = LinearGaussian(HierarchicalNormal(TAU), counts=(1, 4, 2, 7, 3, 3, 5, 2))
    exact = minimize_scalar(lambda log_tau: -float(model.log_evidence(math.exp(log_tau))), bounds=(-5, 5), method="bounded")
    best = best_tau(make(model, TAU), refit=True)["q.x"]
    assert math.log(float(best.tau)) == pytest.approx(exact.x, abs=1e-3)
    assert best.gain == pytest.approx(-exact.fun - float(model.log_evidence(TAU)), rel=1e-5)
    assert not best.at_limit
    # with a fixed estimate, fits and searches in turn arrive at the same τ
    tau = TAU
    for _ in range(40):
        model.prior = HierarchicalNormal(tau)
        tau = float(best_tau(make(model, tau))["q.x"].tau)
    assert math.log(tau) == pytest.approx(exact.x, abs=1e-2)


def test_equal_tasks_have_an_infinite_best_tau():
    model = LinearGaussian(HierarchicalNormal(TAU), noise=5.0)
    model.y = model.y.mean(0) + 1e-3 * model.y
    best = best_tau(diagonal(model, TAU), refit=True)["q.x"]
    assert best.at_limit
    assert float(best.tau) > 1e5


def test_the_evidence_of_a_language_model():
    weights = torch.tensor([1.0, 2.0, 3.0])
    model, data = tiny_bora(prior=HierarchicalNormal(50.0), likelihood=CausalLM(task_weights=weights)), tiny_data()
    theta = random_weights(model, scale=0.1)
    sites = model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()})
    for build in (laplace_guide, laplace_kfac_guide):
        guide = build(model, sites, data=data)
        found = log_evidence(guide, data.train)
        scores = evaluate(model, data.train, theta)[0]
        assert found.log_likelihood == pytest.approx(float((scores.log_likelihood * weights[scores.task]).sum()), rel=1e-5)
        assert found.by_latent.keys() == model.starts.keys()
        assert found.nats == pytest.approx(found.log_likelihood + sum(found.by_latent.values()))
        assert log_evidence(guide, data.train, temperature=0.5).log_likelihood == pytest.approx(2 * found.log_likelihood)
        for name, best in best_tau(guide).items():
            changed = log_evidence(guide, tau={name: best.tau}).by_latent[name]
            assert changed - found.by_latent[name] == pytest.approx(best.gain, rel=1e-3, abs=1e-3)
            assert best.gain >= 0


def test_the_summary():
    model, data = tiny_bora(prior=HierarchicalNormal(50.0)), tiny_data()
    guide = laplace_kfac_guide(model, data=data)
    found, best = evidence_summary(guide, data.train), best_tau(guide)
    assert found["nats"] == pytest.approx(log_evidence(guide, data.train).nats)
    assert found["best_tau_by_group"] == pytest.approx({name: float(each.tau) for name, each in best.items()})
    assert min(found["best_tau_by_group"].values()) < found["best_tau"] < max(found["best_tau_by_group"].values())
    assert found["gain"] == pytest.approx(sum(each.gain for each in best.values()))
    # the deviations are 0 here
    assert found["at_limit"] == [*model.starts]
    assert evidence_summary(laplace_guide(tiny_bora(prior=Pooled()), data=data), data.train)["best_tau"] is None
    for other in (laplace_kronecker_guide(model, data=data), laplace_guide(tiny_bora(prior=Independent()), data=data)):
        assert evidence_summary(other, data.train) == {}


def test_one_factor_for_the_tau_of_all_layers():
    model = LinearGaussian(Given({"q.x": torch.zeros(SHAPE).double()}, {"q.x": torch.tensor([1.0, 5.0]).double().view(2, 1, 1)}))
    theta = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guide = LaplaceGuide(model, model.sites_given({"q.x": theta}, model.prior.centres), {"q.x": model.curvature()})
    best = best_tau(guide)["q.x"].tau
    assert best.shape == (2, 1, 1)
    assert float(best[1] / best[0]) == pytest.approx(5.0)


def test_bad_input():
    model, data = tiny_bora(), tiny_data()
    guide = laplace_guide(model, data=data)
    with pytest.raises(InputError, match=r"there is no latent 'v_proj.lora_C'; did you mean 'v_proj.lora_"):
        log_evidence(guide, tau={"v_proj.lora_C": 1.0})
    with pytest.raises(InputError, match=r"tau of 'v_proj.lora_A' is 0; only a tau above 0 has an evidence"):
        log_evidence(guide, tau=0.0)
    with pytest.raises(InputError, match=r"tau of 'v_proj.lora_A' is 0; only a tau above 0 has an evidence"):
        log_evidence(laplace_guide(tiny_bora(prior=Independent()), data=data))
    with pytest.raises(InputError, match=r"guide laplace_kronecker have no common axes; use laplace_kfac or laplace"):
        best_tau(laplace_kronecker_guide(model, data=data))
