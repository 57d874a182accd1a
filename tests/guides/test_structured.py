"""The structured guide: the exact posterior of a linear-Gaussian hierarchy is one of its members."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from bora_pyro import HierarchicalNormal, Independent, LearnedPrecision
from bora_pyro.guides import NormalGuide, StructuredNormalGuide
from bora_pyro.guides.sinh_arcsinh import SinhArcsinh, skewed_normal
from bora_pyro.guides.structured import WIDEST
from bora_pyro.priors import GroupedNormal, RandomPrecision
from tests.linear_gaussian import LinearGaussian
from tests.tiny import tiny_batch, tiny_bora

TAU, TAU_GROUP = 3.0, 2.0
GROUPS = ["a", "b", "a", "a"]
FORMS = pytest.mark.parametrize("form", ["noncentered", "centered"])


def at_the_posterior(model, tau):
    """The guide with the parameters of the exact posterior."""
    guide = StructuredNormalGuide(model, model.sites_at_maximum(tau), scale=0.5)
    guide()
    h = model.curvature()
    with torch.no_grad():
        guide.get("log_scale", "prior_mean.q.x").copy_(-0.5 * (1 / (1 / tau + 1 / h)).sum(0).log())
        (site,) = (name for name in guide.median() if name.startswith("theta."))
        guide.get("log_curvature", site).copy_((h / tau).log())
    return guide


@FORMS
def test_it_can_be_the_posterior_of_a_linear_gaussian_hierarchy(form):
    model = LinearGaussian(HierarchicalNormal(TAU, form))
    guide, evidence = at_the_posterior(model, TAU), model.log_evidence(TAU)
    with poutine.seed(rng_seed=0), torch.no_grad():
        # the exact posterior has log p(y, x) - log q(x) = log p(y) at every x
        bounds = [-Trace_ELBO().loss(model, guide) for _ in range(5)]
    assert bounds == pytest.approx([float(evidence)] * 5, abs=1e-5)


def test_a_random_tau_moves_deviations_as_the_posterior_does():
    model = LinearGaussian(RandomPrecision(start=TAU))
    guide = StructuredNormalGuide(model, scale=0.5)
    guide()
    h, site = model.curvature(), "theta.q.x_decentered"
    y, mean = model.task_means(), torch.full((2, 3, 4), 0.1, dtype=torch.float64)
    with torch.no_grad():
        guide.get("loc", "prior_mean.q.x").copy_(mean)
        guide.get("log_curvature", site).copy_((h / TAU).log())
        guide.get("loc", site).copy_(TAU**0.5 * h / (h + TAU) * (y - mean))
    tau, drawn = torch.tensor(0.7, dtype=torch.float64), mean + 0.3
    values = {"precision.q.x": tau, "prior_mean.q.x": drawn}
    found = guide.given(site, 3, values, {}).base_dist
    torch.testing.assert_close(found.mean / tau.sqrt(), h / (h + tau) * (y - drawn))
    torch.testing.assert_close(found.variance / tau, 1 / (h + tau))
    # the centre is that at the centre of τ
    with torch.no_grad():
        guide.get("loc", "precision.q.x").copy_(tau.log())
    torch.testing.assert_close(guide.median()[site] / tau.sqrt(), h / (h + tau) * (y - mean))


def test_deviations_follow_the_mean_of_their_group():
    """Given Θ and the means of the groups, a deviation has its exact posterior: that of a task around the mean of its group."""
    model = LinearGaussian(GroupedNormal(GROUPS, TAU, TAU_GROUP))
    guide = StructuredNormalGuide(model, scale=0.5)
    guide()
    h, y, site = model.curvature(), model.task_means(), "theta.q.x_decentered"
    member = model.prior.member
    with torch.no_grad():
        mean = torch.full_like(guide.get("loc", "prior_mean.q.x"), 0.1)
        of_groups = torch.linspace(-1, 1, 2 * mean.numel(), dtype=torch.float64).view(2, *mean.shape)
        guide.get("loc", "prior_mean.q.x").copy_(mean)
        guide.get("loc", "group.q.x_decentered").copy_(of_groups)
        guide.get("log_curvature", site).copy_((h / TAU).log())
        centre = (mean + of_groups / TAU_GROUP**0.5)[member]
        guide.get("loc", site).copy_(TAU**0.5 * h / (h + TAU) * (y - centre))
    values = {"prior_mean.q.x": mean + 0.3, "group.q.x_decentered": of_groups * 2 - 0.4}
    found = guide.given(site, 3, values, {"tasks": pyro.plate("tasks", len(member), dim=-1)}).base_dist
    centre = (mean + 0.3 + (of_groups * 2 - 0.4) / TAU_GROUP**0.5)[member]
    torch.testing.assert_close(found.mean / TAU**0.5, h / (h + TAU) * (y - centre))
    torch.testing.assert_close(found.variance / TAU, (1 / (h + TAU)).expand_as(found.variance))


def test_each_task_has_its_own_tau():
    model = tiny_bora(prior=LearnedPrecision(per="task"))
    guide = StructuredNormalGuide(model)
    model.prior.tau["q_proj.lora_B"] = torch.tensor([1.0, 100.0, 1e4]).view(-1, 1, 1, 1)
    guide(tiny_batch())
    assert guide.state_dict()["tau/q_proj/lora_B"].flatten().tolist() == [1.0, 100.0, 1e4]
    values = {"prior_mean.q_proj.lora_B": guide.get("loc", "prior_mean.q_proj.lora_B") + 1.0}
    name = "theta.q_proj.lora_B_decentered"
    found = guide.given(name, 3, values, {"tasks": model.plates()}).base_dist.mean - guide.get("loc", name)
    expected = -(torch.tensor([1.0, 10.0, 100.0]) * 0.99).view(-1, 1, 1, 1).expand_as(found)
    torch.testing.assert_close(found.detach(), expected)


def test_without_a_hierarchy_it_is_mean_field():
    model = tiny_bora(prior=Independent())
    structured, normal = StructuredNormalGuide(model), NormalGuide(model)
    for guide in (structured, normal):
        guide(tiny_batch())
    assert structured.state_dict().keys() == normal.state_dict().keys()


def test_deviations_begin_narrower_than_their_prior():
    guide = StructuredNormalGuide(tiny_bora(), scale=1.0)
    guide(tiny_batch())
    wide = guide.given("theta.q_proj.lora_A_decentered", 3, guide.median(), {"tasks": guide.model.plates()}).base_dist.scale
    torch.testing.assert_close(wide, torch.full_like(wide, WIDEST))


def test_the_skewed_normal_is_a_density_with_its_median_at_loc():
    loc, scale, skew, tail = torch.tensor([0.5, 2.0, 0.4, 1.3], dtype=torch.float64)
    skewed = skewed_normal(loc, scale, skew, tail)
    x = torch.linspace(-60, 200, 400_001, dtype=torch.float64)
    p = skewed.log_prob(x).exp()
    assert float(torch.trapezoid(p, x)) == pytest.approx(1.0, abs=1e-6)
    assert float(torch.trapezoid(p[x <= 0.5], x[x <= 0.5])) == pytest.approx(0.5, abs=1e-3)
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    transform = SinhArcsinh(skew, tail)
    torch.testing.assert_close(transform.inv(transform(z)), z)
    slope = torch.autograd.functional.jacobian(transform, z).diagonal()
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, transform(z)), slope.log())
    assert float(slope[3]) == pytest.approx(1.0)
