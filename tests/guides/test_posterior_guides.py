from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.distributions import MultivariateNormal, kl_divergence

from bora_pyro import HierarchicalNormal, Independent, InputError, Pooled, map_guide
from bora_pyro.guides import GUIDES, LaplaceGuide, LowRankGuide, LowRankNormal, NormalGuide, normal_guide
from bora_pyro.guides.curvature import diagonal_fisher, document_gradients, kronecker_fisher
from bora_pyro.guides.laplace_kronecker import KroneckerLaplaceGuide
from bora_pyro.guides.rotated_normal import RotatedNormal
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.priors import StandardNormal
from bora_pyro.priors.base import flat
from tests.linear_gaussian import SHAPE, LinearGaussian, exact_loss, kfac
from tests.tiny import TASKS, random_weights, tiny_batch, tiny_bora, tiny_data, tiny_split

TAU = 3.0
HIERARCHIES = {
    "noncentred": (HierarchicalNormal(TAU), TAU),
    "centred": (HierarchicalNormal(TAU, "centered"), TAU),
    "independent": (Independent(), 0.0),
    "pooled": (Pooled(), math.inf),
}
EVERY_HIERARCHY = pytest.mark.parametrize(("prior", "tau"), HIERARCHIES.values(), ids=HIERARCHIES)
# the spread of swag comes from a fit, and that of tfb from held-out documents; most sites of blob are points
SPREAD = [name for name in GUIDES if name not in ("map", "swag", "tfb", "blob")]


def laplace(model, tau):
    return LaplaceGuide(model, model.sites_at_maximum(tau), {"q.x": model.curvature()})


def kronecker(model, tau):
    # N_d/σ² times the identity, as L ⊗ v with L a multiple of the identity
    r, n = sorted(SHAPE[1:])
    h = model.counts() / model.noise**2
    curvature = {
        "q.x.short": h * torch.eye(r, dtype=torch.float64).expand(model.num_tasks, SHAPE[0], r, r),
        "q.x.long": torch.ones(model.num_tasks, SHAPE[0], n, dtype=torch.float64),
    }
    return KroneckerLaplaceGuide(model, model.sites_at_maximum(tau), curvature)


@EVERY_HIERARCHY
@pytest.mark.parametrize("make", [laplace, kronecker, kfac])
def test_laplace_is_the_posterior_of_a_linear_gaussian_hierarchy(make, prior, tau):
    model = LinearGaussian(prior)
    guide, evidence = make(model, tau), model.log_evidence(tau)
    with poutine.seed(rng_seed=0), torch.no_grad():
        # the exact posterior has log p(y, x) − log q(x) = log p(y) at every x
        bounds = [-Trace_ELBO().loss(model, guide) for _ in range(5)]
    assert bounds == pytest.approx([float(evidence)] * 5, abs=1e-5)


@EVERY_HIERARCHY
def test_laplace_draws_have_the_exact_moments(prior, tau):
    model = LinearGaussian(prior, shape=(1, 1, 2))
    guide = laplace(model, tau)
    with poutine.seed(rng_seed=0):
        draws = [model.weights_given(guide())[0]["q.x"] for _ in range(2000)]
    draws, (theta, _), h = torch.stack(draws), model.maximum(tau), model.curvature()
    of_mean = 1 / (1 / (1 / tau + 1 / h) if tau else h).sum(0)
    variance = (
        of_mean.expand_as(h) if math.isinf(tau) else 1 / h if tau == 0 else 1 / (tau + h) + (tau / (tau + h)) ** 2 * of_mean
    )
    torch.testing.assert_close(draws.mean(0), theta, atol=0.06, rtol=0)
    torch.testing.assert_close(draws.var(0), variance, atol=0, rtol=0.15)


@pytest.mark.parametrize(("prior", "tau"), [HIERARCHIES["independent"], HIERARCHIES["pooled"]], ids=["independent", "pooled"])
def test_normal_is_exact_where_the_posterior_factorises(monkeypatch, prior, tau):
    model = LinearGaussian(prior)
    guide = NormalGuide(model, scale=0.5)
    fit_without_noise(monkeypatch, model, guide)
    (name,) = guide.median()
    theta, mean = model.maximum(tau)
    h = model.curvature()
    location, precision = (theta, h) if tau == 0 else (mean, h.sum(0))
    torch.testing.assert_close(guide.get("loc", name).detach(), location, atol=1e-3, rtol=0)
    torch.testing.assert_close(guide.get("log_scale", name).exp().detach(), precision**-0.5, atol=1e-3, rtol=0)
    # and the bound is tight: the ELBO is the evidence
    with torch.no_grad():
        bound = -exact_loss(monkeypatch, model, guide)
    assert float(bound) == pytest.approx(float(model.log_evidence(tau)), abs=1e-5)


@pytest.mark.parametrize("prior", [HierarchicalNormal(TAU), HierarchicalNormal(TAU, "centered")], ids=["noncentred", "centred"])
def test_normal_has_the_mean_field_solution(monkeypatch, prior):
    # the posterior's mean, and the inverse of the diagonal of its precision (Bishop, 2006, section 10.1.2)
    model = LinearGaussian(prior)
    guide = NormalGuide(model, scale=0.5)
    fit_without_noise(monkeypatch, model, guide)
    h = model.curvature()
    centre = model.weights_given(guide.median())
    for found, expected in zip(centre, model.maximum(TAU), strict=True):
        torch.testing.assert_close(found["q.x"], expected, atol=1e-3, rtol=0)
    of_mean, of_tasks = (h.sum(0), 1 + h / TAU) if prior.form == "noncentered" else (model.num_tasks * TAU + 0 * h[0], TAU + h)
    site = "theta.q.x_decentered" if prior.form == "noncentered" else "theta.q.x"
    torch.testing.assert_close(guide.get("log_scale", "prior_mean.q.x").exp().detach(), of_mean**-0.5, atol=1e-3, rtol=0)
    torch.testing.assert_close(guide.get("log_scale", site).exp().detach(), of_tasks**-0.5, atol=1e-3, rtol=0)


def fit_without_noise(monkeypatch, model, guide):
    with poutine.seed(rng_seed=0):
        guide()
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = exact_loss(monkeypatch, model, guide)
        loss.backward()
        return loss

    with pyro.validation_enabled(False):
        optimizer.step(closure)


def fit_by_adam(model, guide, *, steps):
    guide()
    optimizer, elbo = torch.optim.Adam(guide.parameters(), lr=0.05), TemperedELBO()
    with poutine.seed(rng_seed=0), pyro.validation_enabled(False):
        for _ in range(steps):
            optimizer.zero_grad()
            elbo.differentiable_loss(model, guide).backward()
            optimizer.step()


def test_mean_field_divergence_of_the_hierarchy():
    # E_q log p(y | x) − KL by hand, at a guide far from the optimum
    model = LinearGaussian(HierarchicalNormal(TAU))
    guide = NormalGuide(model, scale=0.3)
    elbo = TemperedELBO()
    with poutine.seed(rng_seed=0), torch.no_grad():
        guide()
        for value in guide.parameters():
            value.add_(0.1 * torch.randn_like(value))
        loss = elbo.differentiable_loss(model, guide)
    m, s = (guide.get(kind, "theta.q.x_decentered").detach() for kind in ("loc", "log_scale"))
    of_deviations = (0.5 * (m**2 + (2 * s).exp() - 1) - s).sum()
    entropy = (guide.get("log_scale", "prior_mean.q.x").detach() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    assert float(elbo.kl) == pytest.approx(float(of_deviations - entropy), rel=1e-12)
    assert loss.item() == pytest.approx(float(elbo.kl - elbo.log_likelihood), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_temperature_weighs_the_divergence(temperature):
    model, batch = tiny_bora(), tiny_batch()
    elbo, guide = TemperedELBO(temperature), normal_guide(model)
    with poutine.seed(rng_seed=0):
        loss = elbo.differentiable_loss(model, guide, batch)
    assert loss.item() == pytest.approx(float(temperature * elbo.kl - elbo.log_likelihood), rel=1e-5)


@pytest.mark.parametrize("prior", [HierarchicalNormal(100.0), Independent(), Pooled()], ids=repr)
def test_map_objective_is_the_joint_density(prior):
    model, batch = tiny_bora(prior=prior), tiny_batch()
    guide = map_guide(model)
    guide(batch)
    loss = TemperedELBO().differentiable_loss(model, guide, batch)
    trace = poutine.trace(poutine.condition(model, data=guide.median())).get_trace(batch)
    assert loss.item() == pytest.approx(-float(trace.log_prob_sum()), rel=1e-5)


def test_jacobian_of_a_point_mass_counts():
    def model():
        pyro.sample("x", dist.Gamma(2.0, 3.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    class Point(AutoDelta):
        def forward(self, *args, **kwargs):
            return {"x": pyro.sample("x", dist.Delta(torch.tensor(0.7), log_density=torch.tensor(-0.4)))}

    loss = TemperedELBO().differentiable_loss(model, Point(model))
    expected = dist.Gamma(2.0, 3.0).log_prob(torch.tensor(0.7)) + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    assert loss.item() == pytest.approx(-0.4 - float(expected), rel=1e-6)


def low_rank_normal(*, batch=(2,), event=(2, 3), k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc, scale, factor = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(*batch, *event)] * 2 + [(*batch, *event, k)]
    )
    return LowRankNormal(loc, scale.exp(), factor, event_dim=len(event))


def dense(normal):
    n = math.prod(normal.event_shape)
    factor = normal.factor.reshape(-1, n, normal.factor.shape[-1])
    covariance = factor @ factor.mT + torch.diag_embed(normal.scale.square().reshape(-1, n))
    return MultivariateNormal(normal.loc.reshape(-1, n), covariance)


def test_low_rank_normal_is_the_dense_one():
    normal = low_rank_normal()
    reference, value = dense(normal), torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(normal.log_prob(value), reference.log_prob(value.reshape(2, 6)))
    torch.testing.assert_close(normal.entropy(), reference.entropy())
    torch.testing.assert_close(normal.variance.reshape(2, 6), reference.variance)
    assert normal.expand((4, 2)).sample().shape == (4, 2, 2, 3)


@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
def test_divergence_of_the_low_rank_normal(scale):
    normal = low_rank_normal()
    zero = torch.zeros(2, 2, 3, dtype=torch.float64)
    prior = StandardNormal(zero, 1.0) if scale is None else dist.Normal(zero + 0.3, scale)
    mean = torch.zeros(2, 6, dtype=torch.float64) if scale is None else torch.full((2, 6), 0.3, dtype=torch.float64)
    reference = MultivariateNormal(mean, torch.eye(6, dtype=torch.float64) * (scale or 1.0) ** 2)
    torch.testing.assert_close(kl_divergence(normal, prior.to_event(2)), kl_divergence(dense(normal), reference))
    torch.testing.assert_close(kl_divergence(normal, flat(zero, 2)), -normal.entropy())


def test_rotated_normal_is_the_dense_one():
    generator = torch.Generator().manual_seed(0)
    loc, stretch = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)).Q
    scale = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64) + 0.1
    normal = RotatedNormal(loc, scale, basis, stretch=stretch, event_dim=2)
    columns = MultivariateNormal(loc.mT, stretch**2 * basis @ torch.diag_embed(scale**2) @ basis.mT)
    value = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(normal.log_prob(value), columns.log_prob(value.mT).sum(-1))
    wide = normal.expand((5, 2))
    torch.testing.assert_close(wide.log_prob(value), normal.log_prob(value).expand(5, 2))
    assert wide.rsample().shape == (5, 2, 3, 4)
    with poutine.seed(rng_seed=0):
        draws = normal.rsample(torch.Size([20_000]))
    torch.testing.assert_close(draws.mT.var(0), columns.variance, atol=0.0, rtol=0.1)


def test_curvature_of_the_documents():
    model, split = tiny_bora(), tiny_split()
    theta = random_weights(model)
    [batch] = split.batches(token_budget=10_000)
    gradients = document_gradients(model, theta, batch)
    diagonal, factors = diagonal_fisher(model, theta, split), kronecker_fisher(model, theta, split, temperature=0.5)
    for name, value in diagonal.items():
        short, long = factors[f"{name}.short"], factors[f"{name}.long"]
        for d in range(TASKS):
            own = gradients[name][batch.task == d]
            own = own if own.shape[-2] <= own.shape[-1] else own.mT
            trace = own.square().sum((0, 2, 3))
            torch.testing.assert_close(short[d], (own @ own.mT).sum(0) / trace[:, None, None] / 0.5)
            torch.testing.assert_close(long[d], own.square().sum((0, 2)))
            # the trace is that of the diagonal Fisher, divided by the temperature
            of_factors = short[d].diagonal(dim1=-2, dim2=-1).sum(-1) * long[d].sum(-1)
            torch.testing.assert_close(of_factors, value[d].sum((1, 2)) / 0.5)


@pytest.mark.parametrize("guide", SPREAD)
@pytest.mark.parametrize("prior", [HierarchicalNormal(100.0), Independent(), Pooled()], ids=repr)
def test_every_guide_goes_through_its_state(guide, prior):
    model, data, batch = tiny_bora(prior=prior), tiny_data(), tiny_batch()
    theta = random_weights(model)
    mean = {name: value[0] for name, value in theta.items()}
    if isinstance(prior, Pooled):
        theta = {name: value[:1].expand_as(value) for name, value in theta.items()}
    elif isinstance(prior, Independent):
        mean = {name: value.mean(0) for name, value in theta.items()}
    sites = model.sites_given(theta, mean)
    first, second = GUIDES[guide](model, sites, data=data), GUIDES[guide](model, sites)
    for built in (first, second):
        built(batch)
    torch.testing.assert_close(first.median(), sites)
    torch.testing.assert_close(model.weights_given(first.median()), (theta, mean))
    second.load_state_dict(first.state_dict())
    draws = []
    for built in (first, second, first):
        with poutine.seed(rng_seed=len(draws) // 2):
            draws.append(built(batch))
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert all(draws[0][name].shape == sites[name].shape for name in sites)
    moved = {name for name in sites if (draws[0][name] != draws[2][name]).any()}
    assert moved == {name for name in sites if guide != "task_normal" or name.startswith("theta.")}  # it has Θ as a point


@pytest.mark.parametrize("guide", [NormalGuide, LowRankGuide])
def test_a_fit_narrows_what_the_documents_say(guide):
    # with many copies of the documents the scales must fall below the prior's
    model = LinearGaussian(HierarchicalNormal(TAU), counts=(1, 400))
    built = guide(model, scale=0.5)
    fit_by_adam(model, built, steps=150)
    scale = built.get("log_scale", "theta.q.x_decentered").exp().mean((1, 2, 3))
    assert scale[1] < 0.5 * scale[0]


def test_bad_guides():
    model = tiny_bora()
    with pytest.raises(InputError, match=r"scale is 0; give the initial standard deviations as a number above 0"):
        normal_guide(model, scale=0)
    with pytest.raises(InputError, match=r"rank of the covariance is 0; give a whole number from 1 up"):
        LowRankGuide(model, rank=0)
    sites = map_guide(model)(tiny_batch())
    with pytest.raises(InputError, match=r"the curvature of 'v_proj.lora_A' is missing"):
        LaplaceGuide(model, sites, {})
    with pytest.raises(InputError, match=r"sites do not belong to the prior HierarchicalNormal.*give model.sites_given"):
        LaplaceGuide(model, sites | {"x": torch.ones(1)}, {})
