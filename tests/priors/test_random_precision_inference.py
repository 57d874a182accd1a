"""Inference of a random τ: guides, NUTS and the posterior of a toy, compared with quadrature."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, init_to_mean
from scipy import stats

from bora_pyro import map_guide
from bora_pyro.adapters import ADAPTERS
from bora_pyro.guides import init_to_start, normal_guide
from bora_pyro.likelihoods.next_tokens import CausalLM
from bora_pyro.priors import RandomPrecision, with_shared
from tests.priors.precisions import COUNTS, EVERY_PRIOR, SHAPE, TASK, linear_gaussian, losses_of
from tests.tiny import TASKS, tiny_adapter, tiny_batch, tiny_bora


@pytest.mark.parametrize("make", [map_guide, normal_guide, AutoNormal, AutoDiagonalNormal])
@EVERY_PRIOR
def test_guides_begin_and_run(make, prior):
    model, _, _ = linear_gaussian(prior)
    guide = make(model)
    losses = losses_of(model, guide, number=3)
    assert all(math.isfinite(loss) for loss in losses)
    tau = guide.median()["precision.x"]
    assert tau.shape == ((2, 1) if prior.per == "layer" else ())
    assert bool((tau > 0).all())


@pytest.mark.parametrize("init", [init_to_start, init_to_mean])
@EVERY_PRIOR
def test_inference_begins_at_the_start(init, prior):
    model, _, _ = linear_gaussian(prior)
    guide = AutoNormal(model, init_loc_fn=init)
    guide()
    sites = guide.median()
    torch.testing.assert_close(sites["precision.x"], torch.full_like(sites["precision.x"], 100.0))
    assert torch.equal(sites["theta.x_decentered"], torch.zeros(len(COUNTS), *SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("init", [None, init_to_start])
@EVERY_PRIOR
def test_nuts_begins_and_runs(init, prior):
    model, _, _ = linear_gaussian(prior)
    kernel = NUTS(model, max_tree_depth=2, **({"init_strategy": init} if init else {}))
    with poutine.seed(rng_seed=0):
        mcmc = MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True)
        mcmc.run()
    tau = mcmc.get_samples()["precision.x"]
    assert tau.shape == (2, *((2, 1) if prior.per == "layer" else ()))
    assert bool((tau > 0).all())
    assert bool(tau.isfinite().all())


@EVERY_PRIOR
def test_the_joint_density_has_no_mode_in_tau(prior):
    # why it is no prior for MAP: the same weights grow ever more probable as τ falls
    model, _, y = linear_gaussian(prior)
    mean, theta = y.mean(0), torch.stack([y[d == TASK].mean(0) for d in range(len(COUNTS))])
    log_joint = []
    for start in (1e-2, 1e-4, 1e-6, 1e-8):
        sites = RandomPrecision(prior.hyperprior, prior.per, start=start).sites_of("x", theta, mean)
        log_joint.append(float(poutine.trace(poutine.condition(model, data=sites)).get_trace().log_prob_sum()))
    # p(τ) ∝ τ^(−1/2) there: each hundredth of τ gains ½ log 100 for each τ
    assert np.diff(log_joint)[1:] == pytest.approx([math.log(10) * (2 if prior.per == "layer" else 1)] * 2, abs=0.05)


@EVERY_PRIOR
def test_the_elbo_of_auto_normal_rises(prior):
    model, _, _ = linear_gaussian(prior)
    losses = losses_of(model, AutoNormal(model, init_loc_fn=init_to_start), number=40, rate=0.05, elbo=TraceMeanField_ELBO())
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 50  # nats


@pytest.mark.parametrize("unit", ["tokens", "documents"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_and_likelihood(adapter, unit):
    adapter = tiny_adapter(adapter)
    own = RandomPrecision(per="layer")
    model = tiny_bora(adapter=adapter, prior=with_shared(own, adapter.shared), likelihood=CausalLM(unit))
    guide = AutoNormal(model, init_loc_fn=init_to_start, init_scale=1e-3)
    losses = losses_of(model, guide, tiny_batch(), number=6, rate=0.05)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    theta, _ = model.weights_given(guide.median())
    assert all(value.shape == (TASKS, *model.starts[name].shape) for name, value in theta.items())
    # only what is not shared has a τ; the guide has a mean and a scale for each of its numbers
    random = {name for name in model.starts if name.rpartition(".")[-1] not in adapter.shared}
    assert {site.removeprefix("precision.") for site in guide.median() if site.startswith("precision.")} == random
    entries = sum(v.numel() * (TASKS + 1) + 2 if name in random else v.numel() for name, v in model.starts.items())
    assert sum(p.numel() for p in guide.parameters()) == 2 * entries


def exact_posterior_of_log_tau(means, deviation, prior):
    """Mean and standard deviation of log τ | ȳ: ȳ_d ~ Normal(Θ, 1/τ + deviation²) with p(Θ) ∝ 1, by quadrature."""
    x = np.linspace(math.log(1e-2), math.log(1e8), 20_001)
    variance = np.exp(-x) + deviation**2
    squares, freedom = float((means - means.mean(0)).square().sum()), (len(means) - 1) * means.shape[1]
    log_density = prior.logpdf(np.exp(x)) + x - 0.5 * freedom * np.log(variance) - 0.5 * squares / variance
    weight = np.exp(log_density - log_density.max())
    mean = np.average(x, weights=weight)
    return mean, np.average((x - mean) ** 2, weights=weight) ** 0.5


def test_the_posterior_of_tau_covers_the_truth():
    tau, start = 100.0, torch.full((1, 2), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    theta = 0.5 + tau**-0.5 * torch.randn((25, 2), generator=generator, dtype=torch.float64)
    deviation = 0.3 * 10**-0.5  # of the mean of ten documents
    means = theta + deviation * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    prior = RandomPrecision(per="layer", start=10.0)

    def model():
        tasks = pyro.plate("tasks", len(means), dim=-1)
        value = prior.sample_latent("x", start, tasks)
        with tasks:
            pyro.sample("y", dist.Normal(value[..., 0, :], deviation).to_event(1), obs=means)

    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_start, init_scale=0.1)
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with pyro.validation_enabled(False):
        losses_of(model, guide, number=200, rate=0.1, decay=0.03, elbo=elbo)
        with poutine.seed(rng_seed=0), torch.no_grad():
            log_tau = torch.stack([guide()["precision.x"] for _ in range(200)]).log()
    found, spread = float(log_tau.mean()), float(log_tau.std())
    # the default scale of 0.1: 0.01 τ ~ F(1, 1)
    exact, exact_spread = exact_posterior_of_log_tau(means, deviation, stats.f(1, 1, scale=100.0))
    assert found == pytest.approx(exact, abs=exact_spread / 2)
    # a Normal on (z, log τ) jointly is too narrow, but not by much
    assert 0.5 * exact_spread < spread < 1.1 * exact_spread
    assert abs(found - math.log(tau)) < 2 * spread
