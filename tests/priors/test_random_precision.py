"""τ as a sample site: its density, its place in the model, and its posterior against the exact one."""

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
from scipy import integrate, stats

from bora_pyro import HierarchicalNormal, InputError, Pooled, map_guide
from bora_pyro.adapters import ADAPTERS
from bora_pyro.guides import init_to_start, normal_guide
from bora_pyro.inference.fitted import Fitted
from bora_pyro.likelihoods.next_tokens import CausalLM
from bora_pyro.priors import HYPERPRIORS, RANDOM_PER, ByLatent, HalfCauchyPrecision, RandomPrecision, with_shared
from tests.tiny import TASKS, random_weights, tiny_batch, tiny_bora

SCALE, SHAPE, COUNTS = 0.3, (2, 3), (1, 4, 2, 7)
TASK = torch.tensor([d for d, count in enumerate(COUNTS) for _ in range(count)])
EVERY_HYPERPRIOR = pytest.mark.parametrize("hyperprior", HYPERPRIORS)
EVERY_PRIOR = pytest.mark.parametrize(
    "prior", [RandomPrecision(hyperprior, per) for hyperprior in HYPERPRIORS for per in RANDOM_PER], ids=repr
)
#: The induced distribution of τ as scipy has it: s² τ ~ F(1, 1), and Gamma(½, s²/2).
REFERENCE = {"half_cauchy": stats.f(1, 1, scale=SCALE**-2), "gamma": stats.gamma(0.5, scale=2 / SCALE**2)}


def precision_of(hyperprior, *, start=100.0, scale=SCALE):
    return HYPERPRIORS[hyperprior](torch.tensor(scale, dtype=torch.float64), torch.tensor(start, dtype=torch.float64))


def linear_gaussian(prior):
    """y_dn ~ Normal(θ_d, 1) as a Pyro model, θ under it, and y: (documents, *SHAPE)."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn((len(TASK), *SHAPE), generator=generator, dtype=torch.float64) + TASK[:, None, None]
    start = torch.full(SHAPE, 0.5, dtype=torch.float64)

    def theta():
        return prior.sample_latent("x", start, pyro.plate("tasks", len(COUNTS), dim=-1))

    def model():
        value = theta()
        with pyro.plate("documents", len(y), dim=-1):
            pyro.sample("y", dist.Normal(value[TASK], 1.0).to_event(2), obs=y)

    return model, theta, y


def losses_of(model, guide, *args, number, rate=0.01, decay=1.0, elbo=None):
    """Minus the ELBO at each step of Adam, whose rate falls to `decay` of itself."""
    elbo = elbo or Trace_ELBO()
    with poutine.seed(rng_seed=0):
        guide(*args)
        optimizer = torch.optim.Adam(guide.parameters(), lr=rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay ** (1 / number))
        losses = []
        for _ in range(number):
            loss = elbo.differentiable_loss(model, guide, *args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


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
    assert fitted.tau() == pytest.approx(30.0, rel=1e-5)  # A and B have as many entries
    with torch.no_grad():
        for name, value in guide.named_parameters():
            if "precision" in name and name.startswith("loc"):
                value.fill_(math.log(50.0))
    assert fitted.tau() == pytest.approx(50.0, rel=1e-5)


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
    adapter = ADAPTERS[adapter](rank=2)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hyperprior": "half_cauchi"}, "hyperprior 'half_cauchi' is not known; it is one of half_cauchy, gamma; did you mean"),
        ({"per": "layers"}, "per 'layers' is not known; it is one of site, layer; did you mean 'layer'?"),
        ({"per": "model"}, "per 'model' is not known; it is one of site, layer"),
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
