"""The hierarchical Normal (the BoRA paper's equation 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.errors import InputError, check_one_of
from bora_pyro.priors.base import PerLatent, StandardNormal, check_tau, copies, event, flat

FORMS = ("noncentered", "centered")


def whitened_deviation(name: str, start: Tensor, tasks: pyro.plate, scale: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """θ_d = Θ + scale · z_d with z_d ~ Normal(0, I) and p(Θ) ∝ 1: the non-centred form of the hierarchy.

    The result is that of ``LocScaleReparam(0.0)`` with ``pyro.sample("theta", Normal(prior_mean, scale))``, at a third of the
    cost.

    Args:
        name: name of the latent.
        start: initial value of Θ, (layers, *shape).
        tasks: the plate of tasks.
        scale: τ^-1/2; it broadcasts against (D, layers, *shape).
        mask: the active entries, as for :meth:`~bora_pyro.priors.Prior.sample`.

    Returns:
        θ, (D, layers, *shape).
    """
    prior_mean = pyro.sample(f"prior_mean.{name}", flat(start, start.dim(), mask))
    with tasks:
        white = event(StandardNormal(torch.zeros_like(start), torch.ones_like(start)), start.dim(), mask, tasks)
        deviation = pyro.sample(f"theta.{name}_decentered", white)
        return pyro.deterministic(f"theta.{name}", prior_mean + scale * deviation, event_dim=start.dim())


class HierarchicalNormal(PerLatent):
    """θ_d ~ Normal(Θ, I/τ) with p(Θ) ∝ 1: the BoRA paper's equation 6.

        >>> prior = HierarchicalNormal(tau=100)
        >>> theta, mean = torch.tensor([[1.1], [0.9]]), torch.tensor([1.0])
        >>> prior.sites_of("q_proj.lora_A", theta, mean)["theta.q_proj.lora_A_decentered"].tolist()  # √τ (θ_d − Θ)
        [[1.0...], [-1.0...]]

    Args:
        tau: τ, the precision of a task's deviation from Θ, positive and finite. With a large τ tasks share much.
        form: ``noncentered`` samples the whitened deviation z_d = √τ (θ_d − Θ), so that every task's gradient reaches Θ;
            ``centered`` samples θ_d itself, as the paper does. Both are the same model.

    Raises:
        InputError: τ is 0, infinite, negative or not a number, or the form is unknown.
    """

    def __init__(self, tau: float = 100.0, form: str = "noncentered") -> None:
        check_one_of("form", form, FORMS)
        check_tau(tau)
        if tau == 0 or math.isinf(tau):
            limit = "Independent()" if tau == 0 else "Pooled()"
            raise InputError(f"tau={tau} is a limit of HierarchicalNormal; use {limit}, or prior_from_tau({tau})")
        self.tau, self.form = float(tau), form

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        if self.form == "noncentered":
            return whitened_deviation(name, start, tasks, self.tau**-0.5, mask)
        prior_mean = pyro.sample(f"prior_mean.{name}", flat(start, start.dim(), mask))
        with tasks:
            mean = copies(prior_mean, start, tasks)
            return pyro.sample(f"theta.{name}", event(dist.Normal(mean, self.tau**-0.5), start.dim(), mask, tasks))

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        if self.form == "centered":
            return super().sites_of(name, theta, mean)
        return {f"prior_mean.{name}": mean, f"theta.{name}_decentered": self.tau**0.5 * (theta - mean)}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return start.new_tensor(self.tau)

    def __repr__(self) -> str:
        form = "" if self.form == "noncentered" else f", form={self.form!r}"
        return f"HierarchicalNormal(tau={self.tau:g}{form})"
