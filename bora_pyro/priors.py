"""How tasks share: the prior on the adapters' latents.

    >>> HierarchicalNormal(tau=100)
    HierarchicalNormal(tau=100)
    >>> prior_from_tau(float("inf"))
    Pooled()

A prior sees a name, a starting value and the plate of tasks; it knows neither adapters nor language models. The two limits
of the hierarchy are priors of their own: :class:`Independent` (τ → 0) and :class:`Pooled` (τ → ∞).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.errors import InputError, nearest

FORMS = ("noncentered", "centered")


class Prior(ABC):
    """A distribution over one latent tensor of all tasks."""

    @abstractmethod
    def sample(self, name: str, start: Tensor, tasks: pyro.plate) -> Tensor:
        """Sample the latent ``name`` of every task, as Pyro sample sites.

        Args:
            name: prefix-free name of the latent; the sites are called ``theta.<name>`` and ``prior_mean.<name>``.
            start: where inference begins, common to all tasks: (layers, *shape).
            tasks: the plate of tasks, D of them, at dimension -1.

        Returns:
            θ: (D, layers, *shape).
        """

    @abstractmethod
    def mean(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        """Θ of the latent ``name``, (layers, *shape), given the values of the sites and θ."""


class StandardNormal(dist.Normal):
    """Normal(0, 1), whose log-density neither divides by a scale nor takes its logarithm: adapters have millions of entries."""

    @property
    def mean(self) -> Tensor:
        """Zeros of their own, where ``Normal`` gives an expanded view: guides that begin at the mean make parameters of it."""
        return self.loc.contiguous()

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.addcmul(value.new_full((), -0.5 * math.log(2 * math.pi)), value, value, value=-0.5)


def _flat(start: Tensor, event_dim: int) -> dist.TorchDistribution:
    # The improper p(Θ) ∝ 1. The masked Normal has log-density 0 everywhere; its mean is where inference starts.
    # A clone: a guide that begins at the mean (Pyro's init_to_mean) must not optimise the model's own start in place.
    return dist.Normal(start.clone(memory_format=torch.contiguous_format), 1.0).to_event(event_dim).mask(False)


def _copies(value: Tensor, start: Tensor, tasks: pyro.plate) -> Tensor:
    # D copies and no expanded view, whose entries an optimiser would update together: the same guides make parameters of it
    return value.expand(tasks.size, *start.shape).contiguous()


class HierarchicalNormal(Prior):
    """θ_d ~ Normal(Θ, I/τ) with p(Θ) ∝ 1: the BoRA paper's equation 6.

    Args:
        tau: τ, the precision of a task's deviation from Θ, positive and finite. Large: tasks share much.
        form: ``noncentered`` samples the whitened deviation z_d = √τ (θ_d − Θ), so that every task's gradient reaches Θ;
            ``centered`` samples θ_d itself, as the paper does. The model is the same.

    Raises:
        InputError: τ is 0, infinite, negative or not a number; an unknown form.
    """

    def __init__(self, tau: float = 100.0, form: str = "noncentered") -> None:
        if form not in FORMS:
            raise InputError(f"form {form!r} is not known; it is one of {', '.join(FORMS)}{nearest(form, FORMS)}")
        _check_tau(tau)
        if tau == 0 or math.isinf(tau):
            limit = "Independent()" if tau == 0 else "Pooled()"
            raise InputError(f"tau={tau} is a limit of HierarchicalNormal; use {limit}, or prior_from_tau({tau})")
        self.tau, self.form = float(tau), form

    def sample(self, name: str, start: Tensor, tasks: pyro.plate) -> Tensor:
        prior_mean = pyro.sample(f"prior_mean.{name}", _flat(start, start.dim()))
        with tasks:
            if self.form == "centered":
                mean = _copies(prior_mean, start, tasks)
                return pyro.sample(f"theta.{name}", dist.Normal(mean, self.tau**-0.5).to_event(start.dim()))
            # what LocScaleReparam(0.0) makes of the line above, at a third of its cost
            white = StandardNormal(torch.zeros_like(start), torch.ones_like(start)).to_event(start.dim())
            deviation = pyro.sample(f"theta.{name}_decentered", white)
            return pyro.deterministic(f"theta.{name}", prior_mean + self.tau**-0.5 * deviation, event_dim=start.dim())

    def mean(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def __repr__(self) -> str:
        form = "" if self.form == "noncentered" else f", form={self.form!r}"
        return f"HierarchicalNormal(tau={self.tau:g}{form})"


class Independent(Prior):
    """p(θ_d) ∝ 1 for every task on its own: the limit τ → 0. Θ is then the tasks' average."""

    def sample(self, name: str, start: Tensor, tasks: pyro.plate) -> Tensor:
        with tasks:
            return pyro.sample(f"theta.{name}", _flat(_copies(start, start, tasks), start.dim()))

    def mean(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return theta.mean(0)

    def __repr__(self) -> str:
        return "Independent()"


class Pooled(Prior):
    """θ_d = Θ with p(Θ) ∝ 1, one adapter for all tasks: the limit τ → ∞."""

    def sample(self, name: str, start: Tensor, tasks: pyro.plate) -> Tensor:
        prior_mean = pyro.sample(f"prior_mean.{name}", _flat(start, start.dim()))
        return prior_mean.expand(tasks.size, *start.shape)

    def mean(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def __repr__(self) -> str:
        return "Pooled()"


def prior_from_tau(tau: float, form: str = "noncentered") -> Prior:
    """The prior of precision τ, limits included: 0 is :class:`Independent`, infinity is :class:`Pooled`.

    Raises:
        InputError: τ is negative or not a number.
    """
    _check_tau(tau)
    if tau == 0:
        return Independent()
    return Pooled() if math.isinf(tau) else HierarchicalNormal(tau, form)


def _check_tau(tau: float) -> None:
    if math.isnan(tau) or tau < 0:
        raise InputError(
            f"tau {tau} is not allowed; it is a number from 0 (independent tasks) to inf (one shared adapter), nearest: 0"
        )
