"""The methods on a planted linear family, and against closed forms."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence

from bora_pyro import InputError
from bora_pyro.options.members import build_member
from bora_pyro.predict.generators import CVAE, METHODS, Mean, Nearest, Ridge
from bora_pyro.predict.generators.cvae import Decoder, Encoder
from bora_pyro.predict.generators.generator import Generator
from bora_pyro.predict.generators.left_out import leave_one_out
from tests.predict.generators.planted import LAYOUT, planted

QUICK = {"cvae": lambda: CVAE(steps=100, learning_rate=0.02, width=32), "ridge": Ridge, "nearest": Nearest, "mean": Mean}


def error(generator, vectors, latents):
    """The squared error of the standardised adapters, relative to that of the mean adapter."""
    standard = generator.space.standard
    found = torch.stack([standard.standardise(generator.flat(vector)) for vector in vectors])
    truth = standard.standardise(latents)
    return float((found - truth).square().sum() / truth.square().sum())


@pytest.mark.parametrize("method", METHODS)
def test_the_planted_family(method):
    """Ridge regression is exact on new tasks, the VAE beats the mean adapter, and so does the nearest adapter."""
    (vectors, latents), new = planted()
    generator = Generator.fit(QUICK[method](), vectors, latents, layout=LAYOUT)
    found = error(generator, *new)
    if method == "mean":
        assert found == 1.0
        assert torch.equal(generator.flat(new[0][0]), latents.double().mean(0).float())
    assert found < {"ridge": 1e-10, "cvae": 0.1, "nearest": 0.9, "mean": 1.1}[method]


@pytest.mark.parametrize("method", ["ridge", "cvae"])
def test_shuffled_vectors_hurt(method):
    (vectors, latents), new = planted()
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1))
    right, shuffled = (error(Generator.fit(QUICK[method](), c, latents, layout=LAYOUT), *new) for c in (vectors, vectors[order]))
    assert right < 0.3 < 0.8 < shuffled
    assert shuffled > 2 * right


def test_ridge_is_the_textbook_s():
    generator = torch.Generator().manual_seed(0)
    c, y = (torch.randn((9, size), generator=generator, dtype=torch.float64) for size in (14, 3))
    c, y = c - c.mean(0), y - y.mean(0)
    unit = float((c @ c.mT).trace()) / 8
    method = Ridge(penalty=0.3)
    method.fit(c, y)
    expected = torch.linalg.solve(c.mT @ c + 0.3 * unit * torch.eye(14, dtype=torch.float64), c.mT @ y).mT
    torch.testing.assert_close(method.state()["weight"], expected)


def test_ridge_chooses_the_penalty_of_the_fits_without_each_task():
    """The formula with 1 − H_dd against refits, intercept included, for a noisy family."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn((12, 5), generator=generator, dtype=torch.float64)
    y = c @ torch.randn((5, 4), generator=generator, dtype=torch.float64)
    y = y + 2 * torch.randn((12, 4), generator=generator, dtype=torch.float64)
    c, y = c - c.mean(0), y - y.mean(0)
    chosen = Ridge()
    chosen.fit(c, y)
    unit = float((c @ c.mT).trace()) / 11

    def left_out(penalty):
        total = 0.0
        for d in range(12):
            others = torch.arange(12) != d
            x, mean = c[others] - c[others].mean(0), y[others].mean(0)
            weight = torch.linalg.solve(x.mT @ x + penalty * unit * torch.eye(5, dtype=torch.float64), x.mT @ (y[others] - mean))
            total += float((mean + (c[d] - c[others].mean(0)) @ weight - y[d]).square().sum())
        return total

    grid = torch.logspace(-8, 6, 57, dtype=torch.float64).tolist()
    best = min(grid, key=left_out)
    assert chosen.chosen()["penalty"] == pytest.approx(best)
    assert 1e-6 < best < 1e4


def test_ridge_falls_back_to_the_mean_where_vectors_say_nothing():
    generator = torch.Generator().manual_seed(3)
    c, y = (torch.randn((40, size), generator=generator, dtype=torch.float64) for size in (2, 30))
    method = Ridge()
    method.fit(c - c.mean(0), y - y.mean(0))
    assert float(torch.stack([method.generate(vector) for vector in c]).square().mean()) < 0.05


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_vae_is_a_pyro_model_and_guide(loss):
    """Pyro's own SVI trains them, and leaves nothing in its global store that another fit would find."""
    generator = torch.Generator().manual_seed(0)
    c, y = torch.randn(10, 4, generator=generator), torch.randn(10, 3, generator=generator)
    with poutine.seed(rng_seed=0):
        decoder, encoder = Decoder(4, 3, latent=2, width=8, noise=0.5), Encoder(4, 3, latent=2, width=8)
        svi = SVI(decoder, encoder, pyro.optim.Adam({"lr": 1e-2}), loss())
        losses = [svi.step(c, y) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert len(pyro.get_param_store()) == 0


def test_the_elbo_is_the_paper_s_loss():
    """−ELBO = rows · (MSE + 0.005 KL) / (2 · 0.0025) + constant, with the variance 0.005 q / 2."""
    generator = torch.Generator().manual_seed(0)
    c, y, q = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator), 3
    method = CVAE(latent=2, width=8)
    with poutine.seed(rng_seed=0):
        decoder, encoder = method._networks(4, q)
    with poutine.seed(rng_seed=1):
        guided = poutine.trace(encoder).get_trace(c, y)
        modelled = poutine.trace(poutine.replay(decoder, trace=guided)).get_trace(c, y)
    with poutine.seed(rng_seed=1):
        loss = TraceMeanField_ELBO().differentiable_loss(decoder, encoder, c, y)
    z = guided.nodes["z"]["fn"].base_dist
    kl = kl_divergence(z, Normal(0.0, 1.0)).sum()
    mse = (modelled.nodes["latents"]["fn"].mean - y).square().mean(1).sum()
    constant = 6 * q * (math.log(decoder.noise) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(loss, (mse + 0.005 * kl) / 0.005 + constant, rtol=1e-4, atol=1e-3)


def test_draws_of_the_vae_follow_those_of_the_posterior():
    """With draws that spread by a known amount around each task, generated draws spread alike; a number is one draw."""
    (vectors, latents), _ = planted(12, new=0, free=2)
    noise = torch.randn((12, 16, 2), generator=torch.Generator().manual_seed(0))
    directions = (latents[:2] - latents.mean(0)) * 0.5
    draws = latents[:, None] + noise @ directions
    generator = Generator.fit(QUICK["cvae"](), vectors, latents, layout=LAYOUT, draws=draws)
    found = torch.stack([generator.space.coordinates(generator.flat(vectors[0], draw=k)) for k in range(40)])
    spread = generator.space.coordinates(draws[0]).std(0).norm()
    assert 0.5 < float(found.std(0).norm() / spread) < 1.5
    assert torch.equal(generator.flat(vectors[0], draw=3), generator.flat(vectors[0], draw=3))
    point = Generator.fit(QUICK["cvae"](), vectors, latents, layout=LAYOUT)
    alone = torch.stack([point.space.coordinates(point.flat(vectors[0], draw=k)) for k in range(40)])
    assert float(alone.std(0).norm()) < 0.2 * float(found.std(0).norm())


def test_a_fit_depends_on_its_seed_alone():
    (vectors, latents), (new, _) = planted()
    fits = [Generator.fit(CVAE(steps=5), vectors, latents, layout=LAYOUT, seed=seed).flat(new[0]) for seed in (0, 0, 1)]
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])
    state = torch.get_rng_state()
    Generator.fit(CVAE(steps=1), vectors, latents, layout=LAYOUT)
    assert torch.equal(torch.get_rng_state(), state)


def test_tasks_left_out_are_not_seen():
    """The prediction for a task is that of a generator of the others, and the task's own adapter has no influence on it."""
    (vectors, latents), _ = planted(7, new=0)
    methods = {"ridge": Ridge, "nearest": Nearest, "mean": Mean, "cvae": lambda: CVAE(steps=3)}
    seen = []
    found = leave_one_out(methods, vectors, latents, layout=LAYOUT, on_task=seen.append)
    assert seen == list(range(7))
    changed = latents.clone()
    changed[2] = 1e3
    again = leave_one_out(methods, vectors, changed, layout=LAYOUT)
    others = torch.arange(7) != 2
    for name, make in methods.items():
        assert torch.equal(found[name][2], again[name][2])
        generator = Generator.fit(make(), vectors[others], latents[others], layout=LAYOUT)
        assert torch.equal(found[name][2], generator.flat(vectors[2]))
    assert torch.equal(found["mean"][2], latents[others].double().mean(0).float())
    with pytest.raises(InputError, match="the run has 3 tasks, and a generator learns from 4 or more"):
        leave_one_out(methods, vectors[:3], latents[:3], layout=LAYOUT)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ridge", ["penalty=0"], "penalty is 0.0; give a finite number above 0"),
        ("ridge", ["penalti=1"], "method ridge has no option 'penalti'; did you mean 'penalty'"),
        ("cvae", ["kl_weight=-1"], "kl_weight is -1.0; give a finite number above 0"),
        ("cvae", ["steps=0"], "steps is 0; give a whole number from 1 up"),
        ("mean", ["x=1"], "method mean has no option 'x'; it has none"),
    ],
)
def test_options_that_no_method_has(name, options, message):
    with pytest.raises(InputError, match=message):
        build_member("method", METHODS, name, options)
