"""IVON: its steps against the paper's formulas, its optimum against mean field's, and the fits that have it."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

from bora_pyro import HierarchicalNormal, Independent, InputError, fit
from bora_pyro.guides import IvonGuide, ivon_guide, make_parameters, normal_guide
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.ivon import Ivon, natural_step, scale_of
from bora_pyro.inference.optimizer import Rates
from tests.linear_gaussian import LinearGaussian, exact_loss
from tests.tiny import tiny_bora, tiny_data

TAU = 3.0


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_step_is_that_of_the_papers_algorithm():
    """Algorithm 1 of Shen et al. (2024), in its own quantities: N ℓ̄ is the likelihood's part, and λ = N, δ = 1/(N v)."""
    number, prior_variance, alpha, beta1, beta2, steps = 50.0, 4.0, 0.2, 0.9, 0.97, 3
    generator = torch.Generator().manual_seed(0)
    m, noise, gradient, g = torch.randn((4, 6), generator=generator, dtype=torch.float64)
    delta = 1 / (number * prior_variance)
    h = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    s = 1 / (number * (h + delta)).sqrt()
    # the paper's step; its mean of the gradients has the likelihood's part alone, so here the prior's part is at m throughout
    h_hat = gradient * (s * noise) / s.square()
    h_new = beta2 * h + (1 - beta2) * h_hat + 0.5 * (1 - beta2) ** 2 * (h - h_hat).square() / (h + delta)
    g_new = beta1 * g + (1 - beta1) * gradient
    correction = 1 - beta1**steps
    m_new = m - alpha * (g_new / correction + delta * m) / (h_new + delta)
    s_new = 1 / (number * (h_new + delta)).sqrt()
    # the same from the gradients of the loss, L/N
    of_loc = gradient + delta * m
    of_scale = gradient * s * noise + (s.square() / prior_variance - 1) / number
    loc, log_scale = m.clone(), s.log()
    mean = number * (g + delta * m * (correction - (1 - beta1)) / beta1)  # the prior's part, as if m had been the same
    guide = IvonGuide(LinearGaussian(Independent()), beta=beta1, reach=math.inf)
    settings = {"factor": double(number), "alpha": alpha, "rho": 1 - beta2, "guide": guide}
    natural_step(loc, log_scale, mean, double(steps), gradients=(of_loc, of_scale), **settings)
    torch.testing.assert_close(log_scale.exp(), s_new)
    torch.testing.assert_close(loc, m_new)


def test_reach_bounds_a_step_in_standard_deviations():
    guide = IvonGuide(LinearGaussian(Independent()), beta=0.0, reach=0.5)
    loc, log_scale = double(0.0, 0.0), double(0.1, 2.0).log()
    settings = {"factor": double(1.0), "alpha": 1.0, "rho": 0.1, "guide": guide}
    natural_step(loc, log_scale, double(0.0, 0.0), double(1), gradients=(double(1e6, -1e6), double(0.0, 0.0)), **settings)
    assert loc.tolist() == pytest.approx([-0.05, 1.0])


@pytest.mark.parametrize(("form", "temperature"), [("noncentered", 0.3), ("centered", 1.0)])
def test_it_reaches_the_optimum_of_mean_field(monkeypatch, form, temperature):
    model = LinearGaussian(HierarchicalNormal(TAU, form))
    guide, observations = IvonGuide(model, scale=0.5, pace=50.0, curvature_beta=0.9), 7.0
    guide()
    optimizer = Ivon(dict(guide.named_parameters()), guide)
    rates = Rates(1.0, 0.01, 0.01, per_square=torch.ones(()), nats=observations / temperature)
    with pyro.validation_enabled(False):
        for _ in range(600):
            (exact_loss(monkeypatch, model, guide, temperature) / observations).backward()
            optimizer.take_step(rates)
    # a weight T of the KL divergence is an exponent 1/T of the documents' likelihood
    model.noise *= temperature**0.5
    h, centre = model.curvature(), model.weights_given(guide.median())
    for found, expected in zip(centre, model.maximum(TAU), strict=True):
        torch.testing.assert_close(found["q.x"], expected, atol=1e-3, rtol=0)
    of_mean, of_tasks = (h.sum(0), 1 + h / TAU) if form == "noncentered" else (model.num_tasks * TAU + 0 * h[0], TAU + h)
    site = "theta.q.x_decentered" if form == "noncentered" else "theta.q.x"
    for name, precision in (("prior_mean.q.x", of_mean), (site, of_tasks)):
        torch.testing.assert_close(guide.get("log_scale", name).exp().detach(), precision**-0.5, atol=1e-3, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weight_of_a_drawn_task_leaves_its_own_gradients(accumulate):
    """A task's scale under its prior alone does not depend on how often the steps draw it."""
    model = tiny_bora(targets=["q_proj"], tasks=4, prior=HierarchicalNormal(10.0))
    options = {"token_budget": 20, "accumulate": accumulate, "task_subsampling": True, "epochs": 1, "average": False}
    data = tiny_data([3, 0, 0, 1])
    guide, found = ivon_guide(model, scale=0.5), []

    class Scales(Callback):
        """Keeps the scales of the last step, whether or not the fit then keeps its epoch."""

        def after_step(self, loop):
            found.append(guide.get("log_scale", "theta.q_proj.lora_B_decentered").detach().exp())

    fit(model, data, guide=guide, learning_rate=0.001, warmup=0.0, patience=0, callbacks=[Scales()], **options)
    # a task without documents is drawn by one step of an epoch: log s moves by -log(1 + y + y^2/2)/2 with y = rho (s^2 - 1)
    y, scales = 0.01 * (0.25 - 1), found[-1]
    assert scales[1:3].flatten().tolist() == pytest.approx([0.5 / math.sqrt(1 + y + y**2 / 2)] * scales[1:3].numel(), rel=1e-4)


def test_other_guides_have_no_scales_to_move():
    model = tiny_bora(prior=HierarchicalNormal(10.0))
    for make, moved in ((ivon_guide, 8), (normal_guide, 0)):
        guide = make(model)
        make_parameters(guide, model)
        assert len(scale_of(guide)) == moved


def test_its_gradients_are_not_clipped():
    options = {"epochs": 1, "token_budget": 10_000, "average": False}
    one, other = (
        fit(model, tiny_data(), guide=ivon_guide(model), gradient_clip=clip, **options)
        for clip, model in ((1e-6, tiny_bora()), (1.0, tiny_bora()))
    )
    torch.testing.assert_close(one.sites(), other.sites(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pace": 0.0}, "pace is 0.0; give a finite number above 0"),
        ({"reach": -1.0}, "reach is -1.0; give a number above 0, or inf"),
        ({"beta": 1.0}, "beta is 1.0; give a number from 0 to below 1"),
        ({"curvature_beta": math.nan}, "curvature_beta is nan; give a number from 0 to below 1"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ivon_guide(tiny_bora(), **changes)
