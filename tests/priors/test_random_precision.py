"""τ as a sample site: its density, its place in the model, and its posterior against the exact one."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, stats

from bora_pyro import HierarchicalNormal, InputError, Pooled
from bora_pyro.guides import normal_guide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.priors import HYPERPRIORS, RANDOM_PER, ByLatent, HalfCauchyPrecision, RandomPrecision
from tests.priors.precisions import (
    COUNTS,
    EVERY_HYPERPRIOR,
    EVERY_PRIOR,
    REFERENCE,
    SCALE,
    SHAPE,
    TASK,
    linear_gaussian,
    precision_of,
)
from tests.tiny import random_weights, tiny_batch, tiny_bora


@pytest.mark.parametrize("tau", [1e-6, 0.3, 11.1, 1e5])
@EVERY_HYPERPRIOR
def test_density_and_distribution_function(hyperprior, tau):
    prior, value = precision_of(hyperprior), torch.tensor(tau, dtype=torch.float64)
    assert float(prior.log_prob(value)) == pytest.approx(REFERENCE[hyperprior].logpdf(tau), rel=1e-9)
    assert float(prior.cdf(value)) == pytest.approx(REFERENCE[hyperprior].cdf(tau), rel=1e-6)


def test_half_cauchy_density_is_the_change_of_variables():
    tau = torch.tensor([1e-4, 1.0, 50.0, 1e8], dtype=torch.float64)
    sigma = dist.HalfCauchy(torch.tensor(SCALE, dtype=torch.float64))
    expected = sigma.log_prob(tau**-0.5) + torch.log(0.5 * tau**-1.5)
    torch.testing.assert_close(precision_of("half_cauchy").log_prob(tau), expected, rtol=1e-12, atol=0)


@EVERY_HYPERPRIOR
def test_density_integrates_to_one(hyperprior):
    prior = precision_of(hyperprior)

    def of_log(x):
        return math.exp(float(prior.log_prob(torch.tensor(math.exp(x), dtype=torch.float64))) + x)

    assert integrate.quad(of_log, -60, 60, limit=200, points=[-5, 0, 5])[0] == pytest.approx(1, abs=1e-6)


@EVERY_HYPERPRIOR
def test_draws_have_that_distribution(hyperprior):
    prior = precision_of(hyperprior)
    with poutine.seed(rng_seed=0):
        draws = prior.sample((4000,)).numpy()
    assert (draws > 0).all()
    assert np.isfinite(draws).all()
    assert stats.kstest(draws, REFERENCE[hyperprior].cdf).pvalue > 1e-3


def test_half_cauchy_draws_follow_the_scale():
    scale = torch.tensor([0.1, 2.0], requires_grad=True)
    with poutine.seed(rng_seed=0):
        draw = HalfCauchyPrecision(scale, 1.0).rsample()
    (gradient,) = torch.autograd.grad(draw.log().sum(), scale)
    torch.testing.assert_close(gradient, -2 / scale.detach())  # τ ∝ s⁻²


@pytest.mark.parametrize("value", [0.0, -1.0])
@EVERY_HYPERPRIOR
def test_tau_is_positive(hyperprior, value):
    with pytest.raises(ValueError, match="support"):
        precision_of(hyperprior).log_prob(torch.tensor(value, dtype=torch.float64))


@EVERY_HYPERPRIOR
def test_the_mean_is_where_inference_begins(hyperprior):
    start = torch.tensor([7.0, 5.0]).view(2, 1, 1)
    prior = HYPERPRIORS[hyperprior](torch.full_like(start, SCALE), start)
    assert torch.equal(prior.mean, start)
    assert torch.equal(prior.expand((3, 2, 1, 1)).mean, start.expand(3, 2, 1, 1))
    assert prior.expand((3, 2, 1, 1)).mean.is_contiguous()
    torch.testing.assert_close(prior.expand((3, 2, 1, 1)).log_prob(start), prior.log_prob(start).expand(3, 2, 1, 1))
    assert prior.to_event(3).mean.shape == start.shape
    assert prior.to_event(3).expand((4,)).sample().shape == (4, 2, 1, 1)


@pytest.mark.parametrize(("per", "shape"), [("site", ()), ("layer", (2, 1))])
def test_sites_and_shapes(per, shape):
    _, theta, _ = linear_gaussian(RandomPrecision(per=per))
    with poutine.seed(rng_seed=0):
        trace = poutine.trace(theta).get_trace()
    trace.compute_log_prob()
    sampled = {name: site["value"].shape for name, site in trace.nodes.items() if name in trace.stochastic_nodes}
    deviation = (len(COUNTS), *SHAPE)
    assert sampled | {"tasks": None} == {
        "precision.x": shape, "prior_mean.x": SHAPE, "theta.x_decentered": deviation, "tasks": None
    }  # fmt: skip
    assert trace.nodes["precision.x"]["log_prob"].shape == ()
    assert not trace.nodes["precision.x"]["cond_indep_stack"]


@EVERY_PRIOR
def test_log_joint_density_is_the_sum_of_its_parts(prior):
    model, _, y = linear_gaussian(prior)
    generator = torch.Generator().manual_seed(2)
    z, mean = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((len(COUNTS), *SHAPE), SHAPE))
    tau = torch.tensor([[3.0], [40.0]] if prior.per == "layer" else 3.0, dtype=torch.float64)
    sites = {"precision.x": tau, "prior_mean.x": mean, "theta.x_decentered": z}
    trace = poutine.trace(poutine.condition(model, data=sites)).get_trace()
    theta = mean.numpy() + z.numpy() / np.sqrt(tau.numpy())
    np.testing.assert_allclose(trace.nodes["theta.x"]["value"], theta)
    sigma, s = tau.numpy() ** -0.5, prior.scale
    expected = {
        "half_cauchy": stats.halfcauchy(scale=s).logpdf(sigma) + np.log(sigma**3 / 2),
        "gamma": stats.gamma(0.5, scale=2 / s**2).logpdf(tau.numpy()),
    }[prior.hyperprior].sum()
    expected += stats.norm.logpdf(z.numpy()).sum() + stats.norm(theta[TASK.numpy()]).logpdf(y.numpy()).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "prior", [RandomPrecision(per=per, start=37.0) for per in RANDOM_PER], ids=repr
)  # the hyperprior has no part here
def test_sites_invert_sample_and_mean(prior):
    model = tiny_bora(prior=prior)
    theta = random_weights(model)
    mean = {name: value[0] for name, value in random_weights(model, seed=1).items()}
    sites = model.sites_given(theta, mean)
    trace = poutine.trace(model.weights).get_trace()
    assert {name: value.shape for name, value in sites.items()} == {
        name: trace.nodes[name]["value"].shape for name in trace.stochastic_nodes if name != "tasks"
    }
    given_theta, given_mean = model.weights_given(sites)
    torch.testing.assert_close(given_theta, theta)
    torch.testing.assert_close(given_mean, mean, rtol=0, atol=0)
    assert all((value == 37).all() for name, value in sites.items() if name.startswith("precision."))


@pytest.mark.parametrize(("per", "shape"), [("site", ()), ("layer", (2, 1, 1))])
def test_precision_is_that_of_the_sites(per, shape):
    prior, start = RandomPrecision(per=per, start=5.0), torch.zeros(2, 4, 8, dtype=torch.float64)
    assert torch.equal(prior.precision("x", start), torch.full(shape, 5.0, dtype=torch.float64))
    sites = {"precision.x": torch.rand(shape) + 1, "precision.y": torch.zeros(shape)}
    for outer in (prior, ByLatent({"lora_A": Pooled()}, other=prior)):
        assert outer.precision("x", start, sites) is sites["precision.x"]


@pytest.mark.parametrize("prior", [HierarchicalNormal(3), ByLatent({"x": Pooled()}, other=HierarchicalNormal(3))], ids=repr)
def test_a_fixed_precision_does_not_look_at_the_sites(prior):
    assert torch.equal(prior.precision("x", torch.zeros(SHAPE), {}), prior.precision("x", torch.zeros(SHAPE)))


@pytest.mark.parametrize("per", RANDOM_PER)
def test_fitted_gives_the_centre_of_tau(per):
    model = tiny_bora(prior=ByLatent({"lora_A": RandomPrecision(per=per)}, other=RandomPrecision(per=per, start=9.0)))
    guide = normal_guide(model)
    fitted = Fitted(model, guide, [*"abc"])
    guide(tiny_batch())
    shape = 2 if per == "layer" else None
    for name, tau in fitted.tau_by_group().items():
        assert tau == pytest.approx([9.0 if "lora_B" in name else 100.0] * shape if shape else 9.0 if "lora_B" in name else 100.0)
    assert fitted.tau() == pytest.approx(2 / (1 / 100 + 1 / 9), rel=1e-5)  # A and B have as many entries
    with torch.no_grad():
        for name, value in guide.named_parameters():
            if "precision" in name and name.startswith("loc"):
                value.fill_(math.log(50.0))
    assert fitted.tau() == pytest.approx(50.0, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hyperprior": "half_cauchi"}, "hyperprior is 'half_cauchi'; allowed: half_cauchy, gamma; did you mean"),
        ({"per": "layers"}, "per is 'layers'; allowed: site, layer; did you mean 'layer'?"),
        ({"per": "model"}, "per is 'model'; allowed: site, layer"),
        ({"scale": 0.0}, "scale 0.0 is not allowed; give a finite number above 0, for instance 0.1"),
        ({"scale": math.inf}, "scale inf is not allowed"),
        ({"start": -1.0}, "start -1.0 is not allowed; give a finite number above 0, for instance 100"),
        ({"start": math.nan}, "start nan is not allowed"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError) as caught:
        RandomPrecision(**options)
    assert str(caught.value).startswith(message)


def test_repr():
    assert repr(RandomPrecision()) == "RandomPrecision(hyperprior='half_cauchy', per='site', scale=0.1, start=100)"
