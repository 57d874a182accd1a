"""The hierarchy whose penalty is an unsquared norm: its density, its draws, its start, and MAP under it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_mean
from scipy.integrate import quad

from bora_pyro import InputError, fit, map_guide, prior_from_tau
from bora_pyro.guides import init_to_start
from bora_pyro.priors import FORMS, HierarchicalNorm, SphericalLaplace
from tests.tiny import TASKS, of_task, random_weights, tiny_batch, tiny_bora, tiny_data

TAU = 3.0
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sites_of(prior, theta, mean):
    """Values of the sample sites at given θ and Θ, all latents."""
    return prior.sites(theta, mean)


# the distribution


def test_of_one_number_it_is_the_laplace_distribution():
    loc, value = draw(5), draw(5, seed=1)
    for scalar in (SphericalLaplace(loc, TAU, event_dim=0), SphericalLaplace(loc[:, None], TAU, event_dim=1)):
        given = value.view(scalar.batch_shape + scalar.event_shape)
        torch.testing.assert_close(scalar.log_prob(given), torch.distributions.Laplace(loc, 1 / TAU).log_prob(value))


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2), (2, 3), (4, 5)])
def test_the_density_integrates_to_one(shape):
    n = math.prod(shape)
    distribution = SphericalLaplace(torch.zeros(shape, dtype=torch.float64), TAU, event_dim=len(shape))
    direction = draw(*shape)
    direction /= direction.norm()
    surface = 2 * math.pi ** (n / 2) / math.gamma(n / 2)  # of the unit sphere in n dimensions
    total, _ = quad(lambda r: math.exp(distribution.log_prob(r * direction)) * surface * r ** (n - 1), 0, 40 / TAU + n)
    assert total == pytest.approx(1, abs=1e-7)


def test_the_density_falls_with_the_unsquared_norm_of_each_matrix():
    loc, value = draw(4, 2, 3), draw(4, 2, 3, seed=1)
    rate = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    distribution = SphericalLaplace(loc, rate, event_dim=2)
    assert (distribution.batch_shape, distribution.event_shape) == ((4,), (2, 3))
    difference = distribution.log_prob(loc) - distribution.log_prob(value)
    norms = torch.stack([torch.linalg.matrix_norm(value[k] - loc[k]) for k in range(4)])
    torch.testing.assert_close(difference, rate * norms)


def test_draws_have_the_mean_the_variance_and_the_radius_of_theory():
    loc, n, draws = draw(2, 2, 2), 4, 40_000
    distribution = SphericalLaplace(loc, torch.tensor([1.0, TAU], dtype=torch.float64), event_dim=2)
    assert torch.equal(distribution.mean, loc)
    with poutine.seed(rng_seed=0):
        values = distribution.sample(torch.Size([draws]))
    assert values.shape == (draws, 2, 2, 2)
    deviation = distribution.variance.sqrt()
    torch.testing.assert_close(deviation[:, 0, 0], math.sqrt(n + 1) / distribution.rate)
    standard = (values - loc) / deviation
    assert (standard.mean(0).abs() < 5 / math.sqrt(draws)).all()  # five standard errors
    torch.testing.assert_close(standard.square().mean(0), torch.ones_like(loc), atol=0.06, rtol=0)
    radius = (values - loc).flatten(2).norm(dim=-1) * distribution.rate  # ~ Gamma(n, 1)
    torch.testing.assert_close(radius.mean(0), torch.full((2,), float(n), dtype=torch.float64), atol=0.05, rtol=0)
    torch.testing.assert_close(radius.var(0), torch.full((2,), float(n), dtype=torch.float64), atol=0.2, rtol=0)


def test_draws_are_reparametrised():
    loc, rate = draw(2, 3).requires_grad_(), torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    with poutine.seed(rng_seed=0):
        value = SphericalLaplace(loc, rate, event_dim=2).rsample()
    of_loc, of_rate = torch.autograd.grad(value.sum(), [loc, rate])
    torch.testing.assert_close(of_loc, torch.ones_like(loc))
    # x = μ + z/τ with z of rate 1, so that ∂x/∂τ = −(x − μ)/τ
    torch.testing.assert_close(of_rate, -(value - loc).sum().detach() / TAU)


def test_the_gradient_at_the_location_is_zero():
    value = draw(3, 2, 2)
    x = value.clone()
    x[1] += 1.0
    x.requires_grad_()
    loc = value.clone().requires_grad_()
    SphericalLaplace(loc, TAU, event_dim=2).log_prob(x).sum().backward()
    expected = torch.zeros_like(value)
    expected[1] = -TAU / 2  # a unit vector of four equal entries
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(loc.grad, -expected)


def test_expand_and_support():
    one = SphericalLaplace(draw(2, 3), TAU, event_dim=2)
    many = one.expand(torch.Size([4]))
    value = draw(4, 2, 3, seed=1)
    assert (many.batch_shape, many.event_shape, many.sample().shape) == ((4,), (2, 3), (4, 2, 3))
    torch.testing.assert_close(many.log_prob(value), torch.stack([one.log_prob(v) for v in value]))
    assert many.support.event_dim == 2
    with pytest.raises(ValueError, match="support"):
        SphericalLaplace(draw(2, 3), TAU, event_dim=2, validate_args=True).log_prob(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="rate"):
        SphericalLaplace(draw(2, 3), -1.0, event_dim=2, validate_args=True)


# the prior


@EVERY_FORM
def test_log_density_is_the_sum_of_norms_over_tasks_layers_and_factors(form):
    prior = HierarchicalNorm(TAU, form)
    model, batch = tiny_bora(prior=prior), tiny_batch()
    theta, mean = random_weights(model), of_task(random_weights(model, seed=1), 0)
    sites = sites_of(prior, theta, mean)
    trace = poutine.trace(poutine.condition(model.weights, data=sites)).get_trace()
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], theta)

    norms, constant = 0.0, 0.0
    for name, value in theta.items():
        for d in range(TASKS):
            for layer in range(2):
                n = mean[name][layer].numel()
                # of the density of θ − Θ, or of the same in units of its standard deviation
                rate = TAU if form == "centered" else math.sqrt(n + 1)
                norms += TAU * torch.linalg.norm(value[d, layer] - mean[name][layer])
                constant += math.lgamma(n / 2) + n * math.log(rate) - math.lgamma(n)
                constant -= math.log(2) + n / 2 * math.log(math.pi)
    assert float(trace.log_prob_sum()) == pytest.approx(float(constant - norms), rel=1e-5)

    guide = map_guide(model)
    with torch.no_grad():
        guide(batch)
        for name, value in guide.median().items():
            value.copy_(sites[name])
    log_likelihood = poutine.trace(poutine.condition(model, data=sites)).get_trace(batch)
    log_likelihood.compute_log_prob()
    expected = -float(log_likelihood.nodes["tokens"]["log_prob_sum"] + constant - norms)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        assert elbo.loss(model, guide, batch) == pytest.approx(expected, rel=1e-5)


@EVERY_FORM
def test_sites_are_the_inverse_of_sample(form):
    model = tiny_bora(prior=HierarchicalNorm(TAU, form))
    theta, mean = random_weights(model), of_task(random_weights(model, seed=1), 0)
    given_theta, given_mean = model.weights_given(sites_of(model.prior, theta, mean))
    torch.testing.assert_close(given_theta, theta)
    torch.testing.assert_close(given_mean, mean)
    suffix = "" if form == "centered" else "_decentered"
    trace = poutine.trace(model.weights).get_trace()
    latent = {site for site in trace.stochastic_nodes if site != "tasks"}
    assert latent == set(sites_of(model.prior, theta, mean))
    assert latent == {f"theta.{name}{suffix}" for name in theta} | {f"prior_mean.{name}" for name in theta}


@EVERY_FORM
def test_draws_of_the_prior_are_as_wide_as_theory_says(form):
    start, prior, draws = torch.zeros(2, 4, 8), HierarchicalNorm(TAU, form), 400
    mean = draw(2, 4, 8).float()

    def weights():
        return prior.sample_latent("x", start, pyro.plate("tasks", TASKS, dim=-1))

    with poutine.seed(rng_seed=0):
        drawn = Predictive(poutine.condition(weights, data={"prior_mean.x": mean}), num_samples=draws)()["theta.x"]
    norms = (drawn.reshape(draws, TASKS, 2, 4, 8) - mean).flatten(3).norm(dim=-1)
    assert float(norms.mean()) == pytest.approx(32 / TAU, rel=0.02)  # the mean of Gamma(n, τ)


@EVERY_FORM
def test_the_precision_is_that_of_the_normal_of_the_same_variance(form):
    start = torch.zeros(2, 4, 8)
    [variance] = SphericalLaplace(start[:1], TAU, event_dim=2).variance[:, 0, 0]
    assert float(HierarchicalNorm(TAU, form).precision("x", start)) == pytest.approx(1 / float(variance))


@EVERY_FORM
@pytest.mark.parametrize("init", [init_to_start, init_to_mean])
def test_inference_begins_at_the_start_with_a_gradient_that_is_finite(form, init):
    model, batch = tiny_bora(prior=HierarchicalNorm(TAU, form)), tiny_batch()
    guide = AutoDelta(model, init_loc_fn=init)
    TraceMeanField_ELBO().differentiable_loss(model, guide, batch).backward()
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())
    assert any(p.grad.abs().sum() > 0 for p in guide.parameters())
    theta, mean = model.weights_given(guide.median())
    for name, start in model.starts.items():
        assert torch.equal(theta[name], start.expand(TASKS, *start.shape))
        assert torch.equal(mean[name], start)
    # 2 slots x 2 layers of A (2, 32) and B (32, 2), for each task and for Θ
    assert sum(p.numel() for p in guide.parameters()) == (TASKS + 1) * 2 * 2 * 2 * (2 * 32)


@EVERY_FORM
@pytest.mark.parametrize("make", [map_guide, lambda model: AutoNormal(model, init_loc_fn=init_to_start, init_scale=1e-3)])
def test_stock_svi_lowers_the_loss(form, make):
    model, batch = tiny_bora(prior=HierarchicalNorm(TAU, form)), tiny_batch()
    svi = pyro.infer.SVI(model, make(model), pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.0}), Trace_ELBO())
    with poutine.seed(rng_seed=0):
        losses = [svi.step(batch) for _ in range(12)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def linear_gaussian(prior, y):
    """y_d ~ Normal(θ_d, 1) as a Pyro model."""

    def model():
        theta = prior.sample_latent("x", torch.zeros_like(y[0]), pyro.plate("tasks", len(y), dim=-1))
        with pyro.plate("documents", len(y), dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0).to_event(2), obs=y)

    return model


@EVERY_FORM
def test_map_is_the_block_soft_threshold(form):
    """With y_d ~ Normal(θ_d, 1) and Θ known: θ_d − Θ = (1 − τ/‖y_d − Θ‖)₊ (y_d − Θ), exactly 0 where the data are near Θ."""
    mean = draw(2, 3)
    offsets = torch.stack([draw(2, 3, seed=s) for s in range(4)])
    lengths = torch.tensor([[0.5, 4.0], [5.0, 0.9], [2.0, 8.0], [0.1, 3.0]], dtype=torch.float64)  # of each task and layer
    offsets *= (lengths / offsets.norm(dim=-1))[..., None]
    prior, tau = HierarchicalNorm(1.0, form), 1.0
    model = poutine.condition(linear_gaussian(prior, mean + offsets), data={"prior_mean.x": mean})
    guide = AutoDelta(model, init_loc_fn=init_to_start)
    guide()
    optimizer, elbo = torch.optim.Adam(guide.parameters(), lr=0.5), TraceMeanField_ELBO()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for _ in range(750):
        elbo.differentiable_loss(model, guide).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    sites = {"prior_mean.x": mean} | guide.median()
    trace = poutine.trace(poutine.condition(linear_gaussian(prior, mean + offsets), data=sites)).get_trace()
    theta = trace.nodes["theta.x"]["value"].detach()
    expected = offsets * (1 - tau / lengths).clamp(min=0)[..., None]
    torch.testing.assert_close(theta - mean, expected, atol=1e-4, rtol=0)


def test_a_large_tau_shares_nearly_all():
    data, norms = tiny_data(), []
    for tau in (1.0, 1e5):
        fitted = fit(tiny_bora(prior=HierarchicalNorm(tau)), data, epochs=3, token_budget=16, patience=0)
        norms.append(fitted.deviation_norms())
    assert (norms[0] > 0).all()
    assert (norms[1] < 1e-3 * norms[0]).all()


def test_repr_and_prior_from_tau():
    assert repr(prior_from_tau(300, penalty="norm")) == "HierarchicalNorm(tau=300)"
    assert repr(prior_from_tau(0.5, "centered", penalty="norm")) == "HierarchicalNorm(tau=0.5, form='centered')"
    assert repr(prior_from_tau(0, penalty="norm")) == "Independent()"
    assert repr(prior_from_tau(math.inf, penalty="norm")) == "Pooled()"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HierarchicalNorm(-1.0), "tau -1.0 is not allowed"),
        (lambda: HierarchicalNorm(math.nan), "tau nan is not allowed"),
        (lambda: HierarchicalNorm(0.0), r"use Independent\(\)"),
        (lambda: HierarchicalNorm(math.inf), r"use Pooled\(\)"),
        (lambda: HierarchicalNorm(1.0, "centred"), "did you mean 'centered'"),
        (lambda: prior_from_tau(1.0, penalty="norms"), "did you mean 'norm'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
