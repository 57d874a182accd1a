from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta

from bora_pyro import HierarchicalNormal, Independent, InputError, Pooled, prior_from_tau
from bora_pyro.guides import init_to_start
from bora_pyro.priors import FORMS

COUNTS = (1, 4, 2, 7)
SHAPE = (2, 3)  # layers, and one latent number a column
TASK = torch.tensor([d for d, count in enumerate(COUNTS) for _ in range(count)])
ALL_PRIORS = [HierarchicalNormal(5.0), HierarchicalNormal(5.0, "centered"), Independent(), Pooled()]


def observations():
    """y_dn: (documents, *SHAPE), each task around a level of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((len(TASK), *SHAPE), generator=generator, dtype=torch.float64) + TASK[:, None, None]


def linear_gaussian(prior, start):
    """y_dn ~ Normal(θ_d, 1) as a Pyro model, and θ under it."""
    y = observations()

    def theta():
        return prior.sample_latent("x", start, pyro.plate("tasks", len(COUNTS), dim=-1))

    def model():
        value = theta()
        with pyro.plate("documents", len(y), dim=-1):
            pyro.sample("y", dist.Normal(value[TASK], 1.0).to_event(2), obs=y)

    return model, theta


def maximum_a_posteriori(prior):
    """(θ, Θ) at the maximum of the ELBO of a point mass."""
    model, theta = linear_gaussian(prior, torch.full(SHAPE, 0.5, dtype=torch.float64))
    guide, elbo = AutoDelta(model, init_loc_fn=init_to_start), TraceMeanField_ELBO()
    guide()
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide)
        loss.backward()
        return loss

    optimizer.step(closure)
    sites = guide.median()
    with torch.no_grad():
        value = poutine.condition(theta, data=sites)()
    return value, prior.mean_of("x", sites, value)


def task_means():
    y = observations()
    return torch.stack([y[d == TASK].mean(0) for d in range(len(COUNTS))])


def conjugate_answer(tau):
    """(θ, Θ) of θ_d = (τΘ + N_d ȳ_d)/(τ + N_d) and Θ = mean of θ_d, as one linear system in D + 1 unknowns."""
    tasks, n = len(COUNTS), torch.tensor(COUNTS, dtype=torch.float64)
    system = torch.zeros(tasks + 1, tasks + 1, dtype=torch.float64)
    system[:tasks, :tasks] = torch.diag(tau + n)
    system[:tasks, tasks] = -tau
    system[tasks, :tasks], system[tasks, tasks] = 1.0, -tasks
    right = torch.cat([n[:, None, None] * task_means(), torch.zeros(1, *SHAPE, dtype=torch.float64)])
    solution = torch.linalg.solve(system, right.flatten(1)).view(tasks + 1, *SHAPE)
    return solution[:tasks], solution[tasks]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tau", [0.1, 5.0, 100.0])
def test_map_of_the_hierarchy_is_the_conjugate_answer(tau, form):
    theta, mean = maximum_a_posteriori(HierarchicalNormal(tau, form))
    expected_theta, expected_mean = conjugate_answer(tau)
    torch.testing.assert_close(theta, expected_theta, atol=1e-6, rtol=0)
    torch.testing.assert_close(mean, expected_mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(mean, theta.mean(0), atol=1e-6, rtol=0)


def test_independent_tasks_have_their_own_means():
    theta, mean = maximum_a_posteriori(Independent())
    torch.testing.assert_close(theta, task_means(), atol=1e-6, rtol=0)
    torch.testing.assert_close(mean, task_means().mean(0), atol=1e-6, rtol=0)


def test_pooled_tasks_have_the_grand_mean():
    theta, mean = maximum_a_posteriori(Pooled())
    torch.testing.assert_close(mean, observations().mean(0), atol=1e-6, rtol=0)
    assert torch.equal(theta, mean.expand(len(COUNTS), *SHAPE))


@pytest.mark.parametrize(("tau", "limit"), [(1e-4, Independent()), (1e6, Pooled())])
def test_the_hierarchy_tends_to_its_limits(tau, limit):
    # to first order the distance is τ, or 1/τ, times something of the size of the data
    theta, _ = maximum_a_posteriori(HierarchicalNormal(tau))
    torch.testing.assert_close(theta, maximum_a_posteriori(limit)[0], atol=20 * min(tau, 1 / tau), rtol=0)


@pytest.mark.parametrize("prior", ALL_PRIORS, ids=repr)
def test_inference_begins_at_the_start_in_every_task(prior):
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, theta = linear_gaussian(prior, start)
    guide = AutoDelta(model, init_loc_fn=init_to_start)
    guide()
    sites = guide.median()
    value = poutine.condition(theta, data=sites)()
    assert torch.equal(value, start.expand(len(COUNTS), *SHAPE))
    assert torch.equal(prior.mean_of("x", sites, value), start)


@pytest.mark.parametrize(
    ("prior", "names"),
    [
        (HierarchicalNormal(5.0), {"prior_mean.x", "theta.x_decentered", "theta.x"}),
        (HierarchicalNormal(5.0, "centered"), {"prior_mean.x", "theta.x"}),
        (Independent(), {"theta.x"}),
        (Pooled(), {"prior_mean.x"}),
    ],
    ids=["noncentered", "centered", "independent", "pooled"],
)
def test_site_names(prior, names):
    trace = poutine.trace(linear_gaussian(prior, torch.zeros(SHAPE))[1]).get_trace()
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == names | {"tasks"}


@pytest.mark.parametrize("form", FORMS)
def test_log_density_of_the_hierarchy(form):
    tau, generator = 7.0, torch.Generator().manual_seed(0)
    theta, mean = torch.randn((len(COUNTS), *SHAPE), generator=generator), torch.randn(SHAPE, generator=generator)
    whitened = math.sqrt(tau) * (theta - mean)
    sites = {"prior_mean.x": mean} | ({"theta.x": theta} if form == "centered" else {"theta.x_decentered": whitened})
    sample = linear_gaussian(HierarchicalNormal(tau, form), torch.zeros(SHAPE))[1]
    trace = poutine.trace(poutine.condition(sample, data=sites)).get_trace()
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], theta)
    # Σ log Normal(θ | Θ, 1/τ); the density of the whitened deviation lacks the constant of the change of variables
    entries = theta.numel()
    expected = -0.5 * whitened.square().sum() - 0.5 * entries * math.log(2 * math.pi)
    expected += 0.5 * entries * math.log(tau) if form == "centered" else 0.0
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("prior", [Independent(), Pooled()], ids=repr)
def test_limits_have_a_flat_density(prior):
    sample = linear_gaussian(prior, torch.zeros(SHAPE))[1]
    far = {"theta.x": torch.full((len(COUNTS), *SHAPE), 1e3), "prior_mean.x": torch.full(SHAPE, 1e3)}
    assert poutine.trace(poutine.condition(sample, data=far)).get_trace().log_prob_sum() == 0


@pytest.mark.parametrize(
    ("prior", "text"),
    [
        (HierarchicalNormal(), "HierarchicalNormal(tau=100)"),
        (HierarchicalNormal(0.5, "centered"), "HierarchicalNormal(tau=0.5, form='centered')"),
        (Independent(), "Independent()"),
        (Pooled(), "Pooled()"),
    ],
)
def test_repr(prior, text):
    assert repr(prior) == text


@pytest.mark.parametrize(
    ("tau", "text"),
    [
        (0, "Independent()"),
        (math.inf, "Pooled()"),
        (1e-3, "HierarchicalNormal(tau=0.001)"),
        (10_000, "HierarchicalNormal(tau=10000)"),
    ],
)
def test_prior_from_tau(tau, text):
    assert repr(prior_from_tau(tau)) == text


def test_prior_from_tau_passes_the_form_on():
    assert prior_from_tau(3.0, "centered").form == "centered"


@pytest.mark.parametrize("make", [HierarchicalNormal, prior_from_tau])
@pytest.mark.parametrize("tau", [math.nan, -1.0, -math.inf])
def test_tau_that_is_no_precision(make, tau):
    with pytest.raises(InputError, match=f"tau {tau} is not allowed"):
        make(tau)


@pytest.mark.parametrize(("tau", "limit"), [(0.0, "Independent"), (math.inf, "Pooled")])
def test_a_limit_is_another_prior(tau, limit):
    with pytest.raises(InputError, match=rf"use {limit}\(\), or prior_from_tau\({tau}\)"):
        HierarchicalNormal(tau)


def test_an_unknown_form_names_the_nearest():
    with pytest.raises(InputError, match=r"'non-centered'.*noncentered, centered; did you mean 'noncentered'\?"):
        HierarchicalNormal(1.0, "non-centered")
    with pytest.raises(InputError, match="non-centered"):
        prior_from_tau(1.0, "non-centered")


@pytest.mark.parametrize("prior", ALL_PRIORS, ids=repr)
def test_sites_invert_sample_and_mean(prior):
    generator = torch.Generator().manual_seed(3)
    theta, mean = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((len(COUNTS), *SHAPE), SHAPE))
    if isinstance(prior, Pooled):
        theta = mean.expand_as(theta)
    if isinstance(prior, Independent):
        mean = theta.mean(0)
    sample = linear_gaussian(prior, torch.zeros(SHAPE, dtype=torch.float64))[1]
    sites = prior.sites_of("x", theta, mean)
    trace = poutine.trace(poutine.condition(sample, data=sites)).get_trace()
    assert trace.stochastic_nodes == ["tasks"]  # the plate: every latent site has a value
    assert set(sites) <= set(trace.nodes)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], theta)
    torch.testing.assert_close(prior.mean_of("x", sites, theta), mean)


def test_the_whitened_deviation_of_the_same_weights_grows_with_the_root_of_tau():
    theta, mean = torch.ones(len(COUNTS), *SHAPE), torch.zeros(SHAPE)
    for tau in (0.25, 100.0):
        z = HierarchicalNormal(tau).sites_of("x", theta, mean)["theta.x_decentered"]
        assert torch.equal(z, torch.full_like(theta, math.sqrt(tau)))
