"""The full covariance of a latent of a layer: its density, its exact KL divergence, and the exact posterior of a toy."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

from bora_pyro import Given, HierarchicalNormal, InputError, LoRA, fit
from bora_pyro.adapters import NOLA, SoKA
from bora_pyro.guides import MultivariateNormalGuide
from bora_pyro.guides.multivariate_normal import LARGEST, BlockNormal
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.priors.base import StandardNormal, flat
from bora_pyro.runs.saved import load_run
from tests.linear_gaussian import LinearGaussian
from tests.tiny import tiny_bora, tiny_data
from tests.tiny_base import command_main, line, quick_fit

TAU, NOISE, OBSERVED = 3.0, 0.5, 6
SITE = "theta.q.x_decentered"


def triangles(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    below = 0.5 * torch.randn((*shape, shape[-1]), generator=generator, dtype=torch.float64).tril(-1)
    return below + torch.diag_embed(0.3 + torch.rand(shape, generator=generator, dtype=torch.float64))


class Regression(LinearGaussian):
    """y_dln ~ Normal(x_dlnᵀ θ_dl, σ²) with Θ and τ given: the entries of a layer are correlated in the posterior."""

    def __init__(self, *, tasks=3, layers=2, entries=4, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.mean = normal(layers, entries)
        super().__init__(
            Given({"q.x": self.mean}, {"q.x": torch.tensor(TAU, dtype=torch.float64)}),
            counts=(1,) * tasks,
            shape=(layers, entries),
        )
        self.x = normal(tasks, layers, OBSERVED, entries) @ normal(entries, entries)
        self.y = normal(tasks, layers, OBSERVED)

    def __call__(self, batch=None):
        theta = self.weights()["q.x"]
        with pyro.plate("tasks_observed", self.num_tasks, dim=-1):
            predicted = (self.x @ theta[..., None])[..., 0]
            pyro.sample("y", dist.Normal(predicted, NOISE).to_event(2), obs=self.y)

    def posterior(self):
        """Mean and covariance of z = √τ (θ − Θ) for each task and layer."""
        x, y = self.x / TAU**0.5, self.y - (self.x @ self.mean[..., None])[..., 0]
        covariance = torch.linalg.inv(torch.eye(x.shape[-1], dtype=x.dtype) + x.mT @ x / NOISE**2)
        return (covariance @ x.mT @ y[..., None])[..., 0] / NOISE**2, covariance

    def log_evidence(self, tau=TAU):
        mean = (self.x @ self.mean[..., None])[..., 0]
        return (
            MultivariateNormal(mean, NOISE**2 * torch.eye(OBSERVED, dtype=mean.dtype) + self.x @ self.x.mT / tau)
            .log_prob(self.y)
            .sum()
        )


def test_a_block_normal_is_torchs_multivariate_normal_in_each_block():
    loc, tril = torch.randn((5, 3, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64), triangles(5, 3, 4)
    ours, blocks = BlockNormal(loc, tril, event_dim=3), MultivariateNormal(loc.view(5, 3, 4), scale_tril=tril)
    value = torch.randn((7, 5, 3, 2, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(value), blocks.log_prob(value.view(7, 5, 3, 4)).sum(-1))
    torch.testing.assert_close(ours.entropy(), blocks.entropy().sum(-1))
    torch.testing.assert_close(ours.variance, blocks.variance.view(5, 3, 2, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = ours.rsample((20_000,))
    assert draws.shape == (20_000, 5, 3, 2, 2)
    moments = torch.cov(draws[:, 1, 2].flatten(1).mT)
    torch.testing.assert_close(moments, tril[1, 2] @ tril[1, 2].mT, atol=0.05, rtol=0.05)
    wide = BlockNormal(loc[0], tril[0], event_dim=3).expand(torch.Size([5]))
    torch.testing.assert_close(wide.log_prob(value[0]), BlockNormal(loc[0], tril[0], event_dim=3).log_prob(value[0]))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_divergence_from_a_prior_of_entries_is_exact(scale):
    loc, tril = torch.randn((5, 3, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64), triangles(5, 3, 4)
    q, zeros = BlockNormal(loc, tril, event_dim=2), torch.zeros_like(loc)
    prior = dist.Normal(zeros + 0.2, scale).to_event(2)
    dense = MultivariateNormal(zeros + 0.2, scale**2 * torch.eye(4, dtype=torch.float64))
    expected = kl_divergence(MultivariateNormal(loc, scale_tril=tril), dense).sum(-1)
    torch.testing.assert_close(kl_divergence(q, prior), expected)
    standard = kl_divergence(
        MultivariateNormal(loc, scale_tril=tril), MultivariateNormal(zeros, torch.eye(4, dtype=torch.float64))
    )
    torch.testing.assert_close(kl_divergence(q, StandardNormal(zeros, torch.ones_like(zeros)).to_event(2)), standard.sum(-1))
    torch.testing.assert_close(kl_divergence(q, flat(zeros, 2)), -q.entropy())


def test_it_can_be_the_posterior_of_a_linear_gaussian_model():
    model = Regression()
    guide, (mean, covariance) = MultivariateNormalGuide(model, scale=0.5), model.posterior()
    guide()
    tril = torch.linalg.cholesky(covariance)
    deviation = tril.diagonal(dim1=-2, dim2=-1)
    row, column = torch.tril_indices(4, 4, -1)
    with torch.no_grad():
        guide.get("loc", SITE).copy_(mean)
        guide.get("log_scale", SITE).copy_(deviation.log())
        guide.get("below", SITE).copy_((tril / deviation[..., None])[..., row, column])
    torch.testing.assert_close(guide.unconstrained(SITE, 2).scale_tril, tril)
    with poutine.seed(rng_seed=0), torch.no_grad():
        # the exact posterior has log p(y, x) − log q(x) = log p(y) at every x
        bounds = [-Trace_ELBO().loss(model, guide) for _ in range(5)]
    assert bounds == pytest.approx([float(model.log_evidence())] * 5, abs=1e-8)


def test_the_optimum_of_the_elbo_is_that_posterior():
    model = Regression()
    guide, (mean, covariance) = MultivariateNormalGuide(model), model.posterior()
    guide()
    prior = StandardNormal(torch.zeros_like(mean), torch.ones_like(mean)).to_event(2)
    optimizer = torch.optim.LBFGS(guide.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def negative_elbo():
        """The expectation of a quadratic in closed form: no draw is needed."""
        optimizer.zero_grad()
        q = guide.unconstrained(SITE, 2)
        theta = model.mean + q.loc / TAU**0.5
        residual = model.y - (model.x @ theta[..., None])[..., 0]
        spread = (model.x / TAU**0.5) @ q.scale_tril
        likelihood = -(residual.square().sum() + spread.square().sum()) / (2 * NOISE**2)
        likelihood = likelihood - model.y.numel() * math.log(NOISE * math.sqrt(2 * math.pi))
        loss = kl_divergence(q, prior).sum() - likelihood
        loss.backward()
        return loss

    optimizer.step(negative_elbo)
    found = guide.unconstrained(SITE, 2)
    torch.testing.assert_close(found.loc, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.scale_tril @ found.scale_tril.mT, covariance, atol=1e-5, rtol=1e-4)
    assert float(negative_elbo().detach()) == pytest.approx(-float(model.log_evidence()), abs=1e-6)
    # no diagonal is this covariance
    correlations = covariance / (
        covariance.diagonal(dim1=-2, dim2=-1).sqrt()[..., None] * covariance.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
    )
    assert correlations.tril(-1).abs().max() > 0.5


def test_a_step_of_svi_has_the_exact_divergence():
    model = Regression()
    guide, elbo = MultivariateNormalGuide(model, scale=0.5), TemperedELBO()
    guide()
    with torch.no_grad():
        guide.get("below", SITE).copy_(0.3 * torch.ones_like(guide.get("below", SITE)))
    q = guide.unconstrained(SITE, 2)
    expected = kl_divergence(q, StandardNormal(torch.zeros_like(q.loc), torch.ones_like(q.loc)).to_event(2)).sum()
    for seed in range(3):
        with poutine.seed(rng_seed=seed):
            elbo.differentiable_loss(model, guide).backward()
        torch.testing.assert_close(elbo.kl, expected.detach())
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in guide.parameters())


def test_layers_tasks_and_latents_are_blocks_of_their_own():
    model = tiny_bora(adapter=NOLA(2, bases=7, bases_b=5), prior=HierarchicalNormal(tau=10))
    fitted = fit(model, tiny_data(), guide=MultivariateNormalGuide(model), epochs=4, learning_rate=0.03, patience=0)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    shapes = {name: tuple(fitted.guide.unconstrained(name, 2).scale_tril.shape) for name in fitted.guide.median()}
    assert shapes == {
        f"{site.format(f'{slot}.coefficients_{side}')}": (*rows, 2, n, n)
        for site, rows in (("prior_mean.{}", ()), ("theta.{}_decentered", (3,)))
        for slot in ("q_proj", "v_proj")
        for side, n in (("A", 7), ("B", 5))
    }
    moved = [name for name, value in fitted.guide.named_parameters() if name.startswith("below") and value.abs().max() > 0]
    assert len(moved) == len(shapes)


def test_a_posterior_of_coefficients_by_the_commands(tmp_path):
    options = quick_fit(tmp_path) | {"adapter": "nola", "rank": 2, "tau": 10, "epochs": 1, "output_dir": tmp_path / "run"}
    assert command_main()([*line(options), "--adapter_option", "bases=9"]) == 0
    words = [
        str(tmp_path / "run"),
        *line({"guide": "multivariate_normal", "epochs": 1, "draws": 2, "output_dir": tmp_path / "posterior"}),
    ]
    assert command_main("posterior-fit")(words) == 0
    run = load_run(tmp_path / "posterior")
    assert isinstance(run.fitted.guide, MultivariateNormalGuide)
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(run.metrics["test_perplexity"], rel=1e-5)
    below = {name: value for name, value in run.fitted.guide.named_parameters() if name.startswith("below")}
    assert any(value.abs().max() > 0 for value in below.values())


def test_what_is_too_large_is_one_line():
    large = tiny_bora(adapter=LoRA(rank=LARGEST // 32 + 1))
    message = rf"covariance of at most {LARGEST} entries, but a layer of ._proj.lora_A has 544; use the guide low_rank, .* nola"
    with pytest.raises(InputError, match=message) as caught:
        MultivariateNormalGuide(large)
    assert "\n" not in str(caught.value)
    MultivariateNormalGuide(tiny_bora(adapter=LoRA(rank=LARGEST // 32)))
    with pytest.raises(InputError, match="guide multivariate_normal cannot leave out the entries that SoKA"):
        MultivariateNormalGuide(tiny_bora(adapter=SoKA(2, energy=0.9)))
