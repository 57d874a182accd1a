"""A hierarchy whose posterior is known: y_dn ~ Normal(θ_d, σ²), under any prior, with BoRA's own sites."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch

from bora_pyro import BoRA
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.guides import KfacLaplaceGuide
from bora_pyro.guides.kfac import KroneckerCurvature
from bora_pyro.inference.elbo import TemperedELBO

COUNTS = (1, 4, 2, 7)
SHAPE = (2, 3, 4)  # layers, and a 3 x 4 matrix


class LinearGaussian(BoRA):
    """BoRA with one latent, ``q.x``, and numbers for documents."""

    def __init__(self, prior, *, counts=COUNTS, shape=SHAPE, noise=0.5, seed=0):
        self.num_tasks, self.prior, self.noise = len(counts), prior, noise
        self.starts, self.fixed = {"q.x": torch.full(shape, 0.25, dtype=torch.float64)}, {}
        self.tensors = LayerTensors(self.starts)
        self.task = torch.tensor([d for d, count in enumerate(counts) for _ in range(count)])
        generator = torch.Generator().manual_seed(seed)
        level = torch.randn((len(counts), *shape), generator=generator, dtype=torch.float64)
        self.y = level[self.task] + noise * torch.randn((len(self.task), *shape), generator=generator, dtype=torch.float64)

    def __call__(self, batch=None):
        theta = self.weights()["q.x"]
        with pyro.plate("documents", len(self.y), dim=-1):
            pyro.sample("y", dist.Normal(theta[self.task], self.noise).to_event(self.y.dim() - 1), obs=self.y)

    def __repr__(self):
        return f"LinearGaussian({self.prior})"

    def counts(self):
        """N_d: (D, 1, 1, 1)."""
        return torch.bincount(self.task).double().view(-1, *[1] * (self.y.dim() - 1))

    def curvature(self):
        """h_d = N_d/σ²: (D, *shape)."""
        return (self.counts() / self.noise**2).expand(self.num_tasks, *self.y.shape[1:])

    def task_means(self):
        return torch.stack([self.y[d == self.task].mean(0) for d in range(self.num_tasks)])

    def maximum(self, tau):
        """(θ, Θ) at the maximum of the joint density, for τ from 0 to ∞."""
        h, y = self.curvature(), self.task_means()
        if tau == 0:
            return y, y.mean(0)
        weight = 1 / (1 / tau + 1 / h)
        mean = (weight * y).sum(0) / weight.sum(0)
        return (mean.expand_as(y) if math.isinf(tau) else (tau * mean + h * y) / (tau + h)), mean

    def sites_at_maximum(self, tau):
        theta, mean = self.maximum(tau)
        return self.sites_given({"q.x": theta}, {"q.x": mean})

    def log_evidence(self, tau):
        """log ∫ p(y | θ) p(θ | Θ) dθ dΘ; the same number in both forms of the hierarchy."""
        y, h = self.task_means(), self.curvature()
        within = self.y - y[self.task]
        of_documents = dist.Normal(0.0, self.noise).log_prob(within).sum()
        # ȳ_d has what the documents themselves leave over: Π Normal(y | θ) = of_documents · Normal(ȳ | θ, 1/h) · √(2π/h)
        of_documents = of_documents + (0.5 * (2 * math.pi / h).log()).sum()
        if tau == 0:
            return of_documents
        variance = 1 / tau + 1 / h
        weight = 1 / variance
        mean = (weight * y).sum(0) / weight.sum(0)
        of_means = dist.Normal(mean.expand_as(y), variance.sqrt()).log_prob(y).sum()
        return of_documents + of_means + (0.5 * (2 * math.pi / weight.sum(0)).log()).sum()


def exact_loss(monkeypatch, model, guide, temperature=1.0):
    """The negative ELBO itself: the mean of a quadratic over independent Normals is that over one deviation up and one down."""
    losses = []
    for signs in itertools.product((-1, 1), repeat=len(guide.median())):
        drawn = iter(signs)
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.distributions.Normal, "rsample", lambda self, shape=None, s=drawn: self.loc + next(s) * self.scale
            )
            losses.append(TemperedELBO(temperature).differentiable_loss(model, guide))
    return sum(losses) / len(losses)


def kfac(model, tau):
    """K-FAC with the model's curvature, along any axes, of which some directions have none."""
    r, n = sorted(SHAPE[1:])
    generator = torch.Generator().manual_seed(0)
    sizes = ((SHAPE[0], n, 2), (SHAPE[0], r, r))
    long, short = (torch.linalg.qr(torch.randn(size, generator=generator, dtype=torch.float64)).Q for size in sizes)
    h = (model.counts() / model.noise**2).expand(model.num_tasks, SHAPE[0], 3, r)
    return KfacLaplaceGuide(model, model.sites_at_maximum(tau), {"q.x": KroneckerCurvature(long, short, h)})
