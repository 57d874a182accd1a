"""Hyperpriors of τ, and a linear Gaussian toy under them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy import stats

from bora_pyro.priors import HYPERPRIORS, RANDOM_PER, RandomPrecision

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
