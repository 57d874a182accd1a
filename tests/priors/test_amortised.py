"""The prior of ABMLL: its densities, its exact KL divergence from the guide's Normals, and what it refuses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import kl_divergence

from bora_pyro import InputError
from bora_pyro.guides import task_normal_guide
from bora_pyro.guides.base import make_parameters
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.priors import AmortisedNormal
from bora_pyro.priors.scale_prior import POSITIVITIES, ScalePrior
from tests.tiny import random_weights, tiny_batch, tiny_bora


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("global_prior", ["flat", "normal_gamma"])
def test_the_joint_density(learned, global_prior):
    model = tiny_bora(targets=["q_proj"], prior=AmortisedNormal(0.2, learned=learned, global_prior=global_prior))
    theta = random_weights(model)
    mean = {name: value.mean(0) for name, value in theta.items()}
    sites = model.sites_given(theta, mean)
    back, of_all = model.weights_given(sites)
    expected = torch.zeros(())
    for name, value in theta.items():
        assert torch.equal(back[name], value)
        assert torch.equal(of_all[name], mean[name])
        torch.testing.assert_close(model.prior.precision(name, model.starts[name], sites).max(), torch.tensor(25.0))
        expected = expected + dist.Normal(mean[name], 0.2).log_prob(value).sum()
        if global_prior == "normal_gamma":
            expected = expected + dist.Normal(model.starts[name], 1.0).log_prob(mean[name]).sum()
            # σ⁻² ~ Gamma(1, s²) as a density of σ at σ = s
            expected = expected + learned * mean[name].numel() * (math.log(2 / 0.2) - 1)
    trace = poutine.trace(poutine.condition(model.weights, data=sites)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-5, atol=1e-3)


def test_the_density_of_a_scale_is_that_of_its_precision():
    start, value = torch.tensor([0.1, 2.0]), torch.tensor([0.3, 1.5])
    jacobian = (2 / value**3).log()
    expected = dist.Gamma(torch.ones(2), start.square()).log_prob(value**-2) + jacobian
    torch.testing.assert_close(ScalePrior(start, precision=True).log_prob(value), expected)
    with pyro.poutine.seed(rng_seed=0):
        drawn = ScalePrior(start, precision=True).expand((20_000, 2)).sample()
    torch.testing.assert_close((drawn**-2).mean(0), start**-2, rtol=0.05, atol=0)


@pytest.mark.parametrize("positivity", POSITIVITIES)
def test_the_kl_divergence_is_exact_and_zero_at_the_prior(positivity):
    model = tiny_bora(targets=["q_proj"], prior=AmortisedNormal(0.05, positivity=positivity))
    guide = task_normal_guide(model, scale=1.0, positivity=positivity)
    make_parameters(guide, model)
    elbo = TemperedELBO(1.0)
    elbo.differentiable_loss(model, guide, tiny_batch())
    assert float(elbo.kl_of_tasks) == 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in guide.parameters():
            value += 0.5 * torch.randn(value.shape, generator=generator)
    elbo.differentiable_loss(model, guide, tiny_batch())
    sites, transform = guide.median(), torch.distributions.biject_to(POSITIVITIES[positivity])
    expected = torch.zeros(())
    for name in model.starts:
        scale = transform(guide.get("raw_scale", f"theta.{name}"))
        q = torch.distributions.Normal(sites[f"theta.{name}"], scale)
        p = torch.distributions.Normal(sites[f"prior_mean.{name}"], sites[f"prior_scale.{name}"])
        expected = expected + kl_divergence(q, p).sum()
    torch.testing.assert_close(elbo.kl_of_tasks, expected.detach())
    assert float(elbo.kl_of_tasks) > 1.0


def test_two_temperatures():
    prior = AmortisedNormal(0.05, global_prior="normal_gamma")
    model = tiny_bora(targets=["q_proj"], prior=prior)
    guide = task_normal_guide(model, scale=0.5)
    make_parameters(guide, model)

    def loss(*temperatures):
        elbo = TemperedELBO(temperatures[0], shared_temperature=temperatures[1])
        with poutine.seed(rng_seed=3):
            value = elbo.differentiable_loss(model, guide, tiny_batch()).detach()
        return float(value), elbo

    both, elbo = loss(0.5, None)
    apart, _ = loss(0.5, 0.5)
    assert apart == pytest.approx(both, rel=1e-6)
    other, _ = loss(0.5, 2.0)
    shared = float(elbo.kl - elbo.kl_of_tasks)
    assert abs(shared) > 10
    assert other - both == pytest.approx(1.5 * shared, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0; give a finite number above 0, for instance 0.01"),
        ({"scale": math.inf}, "scale is inf"),
        ({"positivity": "softmax"}, "positivity is 'softmax'; allowed: softplus, exp; did you mean 'softplus'?"),
        ({"global_prior": "gamma"}, "global_prior is 'gamma'; allowed: flat, normal_gamma"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(InputError, match="^" + message.replace("?", r"\?")):
        AmortisedNormal(**options)
