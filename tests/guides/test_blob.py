"""BLoB: the paper's divergence, MAP where the scale vanishes, and which latents are random."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from bora_pyro import HierarchicalNormal, InputError, LoRA, fit, map_guide
from bora_pyro.adapters import FrozenALoRA, SharedPlusTaskLoRA
from bora_pyro.guides import BlobGuide, blob_guide, guide_options
from bora_pyro.inference.elbo import TemperedELBO
from bora_pyro.priors import Given, RandomPrecision
from tests.tiny import TASKS, random_weights, tiny_batch, tiny_bora, tiny_data

TAU = 30.0


def moved(model, **options):
    """A guide with every tensor away from where it began; some entries of G are negative."""
    guide = BlobGuide(model, **options)
    guide(tiny_batch())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return guide


def divergence(model, guide):
    elbo = TemperedELBO()
    with poutine.seed(rng_seed=0), torch.no_grad():
        elbo.differentiable_loss(model, guide, tiny_batch())
    return float(elbo.kl)


def test_its_divergence_is_that_of_the_paper():
    """Σ (M² + Ω²)/(2 σ_p²) − log(Ω/σ_p) − ½ for A under Normal(0, σ_p²); B adds −log p(B)."""
    model = tiny_bora()
    zero = {name: torch.zeros_like(start) for name, start in model.starts.items()}
    model.prior = Given(zero, {name: torch.tensor(TAU) for name in model.starts})
    guide, sigma, expected = moved(model), TAU**-0.5, 0.0
    for latent in model.starts:
        site = f"theta.{latent}_decentered"
        m = sigma * guide.get("loc", site).detach().double()
        if latent.endswith("lora_A"):
            omega = sigma * guide.get("root_scale", site).detach().double().square()
            expected += float(((m**2 + omega**2) / (2 * sigma**2) - (omega / sigma).log() - 0.5).sum())
        else:  # the site is B/σ_p
            expected += float((0.5 * (m / sigma) ** 2 + 0.5 * math.log(2 * math.pi)).sum())
    assert divergence(model, guide) == pytest.approx(expected, rel=1e-6)


def test_the_divergence_of_a_hierarchy_has_the_entropy_of_the_mean():
    model = tiny_bora(prior=HierarchicalNormal(TAU))
    guide, expected = moved(model), 0.0
    for latent in model.starts:
        mean, site = f"prior_mean.{latent}", f"theta.{latent}_decentered"
        z = guide.get("loc", site).detach().double()
        if latent.endswith("lora_A"):
            omega, of_mean = (guide.get("root_scale", name).detach().double().square() for name in (site, mean))
            expected += float((0.5 * (z**2 + omega**2 - 1) - omega.log()).sum())
            expected -= float((of_mean.log() + 0.5 * math.log(2 * math.pi * math.e)).sum())
        else:  # a flat prior of a point adds nothing
            expected += float((0.5 * z**2 + 0.5 * math.log(2 * math.pi)).sum())
    assert divergence(model, guide) == pytest.approx(expected, rel=1e-6)


def test_pyros_own_elbo_has_the_same_objective():
    model, batch = tiny_bora(prior=HierarchicalNormal(TAU)), tiny_batch()
    guide, losses = moved(model), []
    for elbo in (TemperedELBO(), TraceMeanField_ELBO()):
        with poutine.seed(rng_seed=0), torch.no_grad():
            losses.append(float(elbo.differentiable_loss(model, guide, batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("form", ["noncentered", "centered"])
def test_without_noise_its_gradient_is_that_of_map(form):
    model, batch = tiny_bora(prior=HierarchicalNormal(TAU, form)), tiny_batch()
    theta = random_weights(model)
    sites = model.sites_given(theta, {name: value.mean(0) for name, value in theta.items()})
    point, blob, elbo = map_guide(model, sites), BlobGuide(model, sites, scale=1e-9), TemperedELBO()
    for guide in (point, blob):
        guide(batch)
        with poutine.seed(rng_seed=0), pyro.validation_enabled(False):
            elbo.differentiable_loss(model, guide, batch).backward()
    of_point = {name.removesuffix("_unconstrained"): value.grad for name, value in point.named_parameters()}
    for name in sites:
        torch.testing.assert_close(blob.get("loc", name).grad, of_point[name], rtol=1e-4, atol=1e-5)


def test_without_noise_a_step_moves_b_as_map_does():
    options = {"epochs": 1, "token_budget": 10_000, "gradient_clip": math.inf, "average": False, "warmup": 0.0, "patience": 0}
    data = tiny_data()
    models = (tiny_bora(prior=HierarchicalNormal(TAU)) for _ in range(2))
    guides = (map_guide, lambda model: BlobGuide(model, scale=1e-9))
    point, blob = (
        fit(model, data, guide=make(model), learning_rate=1e-3, **options) for model, make in zip(models, guides, strict=True)
    )
    assert (point.best_epoch, blob.best_epoch) == (1, 1)
    for name, value in point.sites().items():
        if "lora_B" in name:
            assert value.abs().max() > 5e-4
            torch.testing.assert_close(blob.sites()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("random", "expected"), [("lora_A", {"lora_A"}), ("lora_A, lora_B", {"lora_A", "lora_B"})])
def test_the_option_says_which_latents_are_random(random, expected):
    model = tiny_bora()
    guide = blob_guide(model, scale=1.0, **guide_options("blob", [f"random={random}"]))
    draws = []
    for seed in range(2):
        with poutine.seed(rng_seed=seed):
            draws.append(model.weights_given(guide(tiny_batch()))[0])
    assert {name.rpartition(".")[2] for name in draws[0] if (draws[0][name] != draws[1][name]).any()} == expected
    # each task has a draw of its own
    deviation = draws[0]["q_proj.lora_A"] - draws[0]["q_proj.lora_A"][:1]
    assert deviation[1:].flatten(1).abs().amax(1).gt(0).all()
    assert len(deviation) == TASKS


def test_a_name_takes_the_latents_that_it_is_the_end_of():
    model = tiny_bora(adapter=SharedPlusTaskLoRA(rank=2))
    guide = BlobGuide(model, random=("lora_A", "q_proj.shared_A"))
    random = [name for name in model.starts if guide.is_random(f"theta.{name}")]
    assert random == [name for name in model.starts if name.endswith("lora_A") or name == "q_proj.shared_A"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: tiny_bora(adapter=FrozenALoRA(rank=2)), {}, r"random, which FrozenALoRA\(.*\) does not have; it has lora_B;"),
        (tiny_bora, {"random": "lora_C"}, r"the latent 'lora_C' random, which LoRA\(.*\) does not have; it has lora_A, lora_B"),
        (tiny_bora, {"random": ""}, "makes the latent '' random"),
        (tiny_bora, {"scale": 0.0}, "scale is 0.0; give the initial standard deviations as a number above 0"),
    ],
)
def test_what_it_cannot_take_is_refused(model, options, message):
    with pytest.raises(InputError, match=message) as error:
        blob_guide(model(), **options)
    assert "\n" not in str(error.value)


def test_a_random_tau_is_refused():
    model = tiny_bora(adapter=LoRA(rank=2), prior=RandomPrecision())
    with pytest.raises(InputError, match=r"BlobGuide cannot take 'precision.*, which is not a real number"):
        BlobGuide(model)(tiny_batch())
