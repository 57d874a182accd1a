"""What a prior is: how the tasks' values of one latent tensor hang together.

A new prior is one file with a subclass of :class:`Prior`, and one line in ``bora_pyro/priors/__init__.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

from bora_pyro.errors import InputError


class Prior(ABC):
    """A distribution over one latent tensor of all tasks."""

    #: With fewer tasks than these there is nothing to share, and the model refuses.
    least_tasks: int = 2

    @abstractmethod
    def sample(self, name: str, start: Tensor, tasks: pyro.plate) -> Tensor:
        """Sample the latent ``name`` of every task, as Pyro sample sites.

        Args:
            name: prefix-free name of the latent; the sites are called ``theta.<name>`` and ``prior_mean.<name>``.
            start: where inference begins, common to all tasks: (layers, *shape).
            tasks: the plate of tasks at dimension -1: all D of them, or the ones that a batch speaks of. ``tasks.indices``
                tells which they are, ``tasks.subsample_size`` how many; of those alone values are wanted.

        Returns:
            θ: (D, layers, *shape), or as many rows as the plate has tasks.
        """

    @abstractmethod
    def mean(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        """Θ of the latent ``name``, (layers, *shape), given the values of the sites and θ."""

    def averages(self, name: str) -> bool:
        """Whether Θ of the latent ``name`` is the tasks' average, so that ``mean`` needs θ of all of them."""
        return False

    def sites(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Values of the sample sites that give θ and Θ: the inverse of ``sample`` and ``mean``.

        This one serves every prior that samples both as they are; one with other sites overrides it, and a site that θ and Θ do
        not determine, as a τ that is sampled, is where inference begins.

        Args:
            name: name of the latent.
            theta: θ, (D, layers, *shape).
            mean: Θ, (layers, *shape).
        """
        return {f"prior_mean.{name}": mean, f"theta.{name}": theta}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        """τ of the latent ``name``: a tensor that broadcasts against (D, layers, *shape).

        0 where tasks are independent, infinite where they are one. Under a penalty that is not Normal it is that of the Normal
        with the same variance.

        Args:
            name: name of the latent.
            start: where inference begins, (layers, *shape).
            sites: values of the sample sites, of which τ may be one; a prior whose τ is no sample site does not look at them.
                None: τ where inference begins.

        Raises:
            InputError: this kind of prior does not say.
        """
        raise InputError(f"the precision of deviations under {self} is not known; give its class a method `precision`")

    #: Whether τ weighs half the squared deviation (``normal``) or its norm (``norm``).
    penalty: str = "normal"

    #: Steps of a fit between two calls of ``learn``; 0: this prior has nothing to learn.
    every: int = 0

    def learn(  # noqa: B027 (most priors have nothing to learn)
        self,
        deviations: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        task: Tensor,
        *,
        all_reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        """Follow what some validation documents say of the prior's own parameters; a prior without any does nothing.

        Args:
            deviations: θ_d(n) − mean_d θ_d by latent: how the task of each document deviates from the tasks' average,
                (documents, layers, *shape).
            gradients: ∇ log p(w_n | θ_d(n)) of each document with respect to its own task's weights, (documents, layers, *shape).
            task: index of each document's task, (documents,).
            all_reduce: adds a tensor up over the processes of a fit, each of which has other documents.
        """

    def state(self) -> dict[str, Tensor]:
        """What the prior has learned, as tensors for a checkpoint and a run folder; names that begin with ``tau.`` are τ."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (nor to put back)
        """Put back what ``state`` gave, or the part of it that a run folder has."""


class StandardNormal(dist.Normal):
    """Normal(0, 1), whose log-density neither divides by a scale nor takes its logarithm: adapters have millions of entries."""

    @property
    def mean(self) -> Tensor:
        """Zeros of their own, where ``Normal`` gives an expanded view: guides that begin at the mean make parameters of it."""
        return self.loc.contiguous()

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.addcmul(value.new_full((), -0.5 * math.log(2 * math.pi)), value, value, value=-0.5)


class Flat(dist.Normal):
    """The improper p(x) ∝ 1, where inference begins at ``start``: log-density 0 everywhere, each entry a number of its own.

    Like Pyro's ``Normal(start, 1).mask(False)`` for a point mass, but the KL divergence from a Normal to it is the negative
    entropy, ∫ q log q, where a masked distribution's would be 0 and a guide's scale without a price.

        >>> Flat(torch.zeros(2), 1.0).log_prob(torch.tensor([3.0, 4.0]))
        tensor([0., 0.])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


def flat(start: Tensor, event_dim: int) -> dist.TorchDistribution:
    """p(x) ∝ 1 over the last ``event_dim`` dimensions of a tensor, where inference begins at ``start``."""
    # A clone: a guide that begins at the mean (Pyro's init_to_mean) must not optimise the model's own start in place.
    return Flat(start.clone(memory_format=torch.contiguous_format), 1.0).to_event(event_dim)


@register_kl(dist.Normal, Flat)
def _kl_normal_flat(q: dist.Normal, p: Flat) -> Tensor:
    return -q.entropy()


@register_kl(dist.Normal, StandardNormal)
def _kl_normal_standard_normal(q: dist.Normal, p: StandardNormal) -> Tensor:
    return 0.5 * (q.scale.square() + q.loc.square() - 1) - q.scale.log()


def copies(value: Tensor, start: Tensor, tasks: pyro.plate) -> Tensor:
    """``value`` once for each task of the plate: (D, *start.shape)."""
    # copies and no expanded view, whose entries an optimiser would update together: the same guides make parameters of it
    return value.expand(tasks.subsample_size, *start.shape).contiguous()


def check_tau(tau: float) -> None:
    """Raise ``InputError`` where τ is negative or not a number."""
    if math.isnan(tau) or tau < 0:
        raise InputError(
            f"tau {tau} is not allowed; it is a number from 0 (independent tasks) to inf (one shared adapter), nearest: 0"
        )
