"""What a prior is: how the tasks' values of the latent tensors hang together.

A new prior is one file with a subclass of :class:`Prior` or :class:`PerLatent`, and one line in ``bora_pyro/priors/__init__.py``.
Its options are the arguments of its class: ``--prior NAME --prior_option KEY=VALUE``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from bora_pyro.errors import InputError


class Prior(ABC):
    """A distribution over the latents of all tasks together.

    A subclass gives ``sample``, ``means``, ``sites`` and ``precision``; one that treats each latent by itself is a
    :class:`PerLatent`, which asks for less.

    Attributes:
        least_tasks: with fewer tasks there is nothing to share, and the model refuses.
        penalty: whether τ weighs half the squared deviation (``normal``) or its norm (``norm``).
        every: steps of a fit between two calls of ``learn``; 0: this prior has nothing to learn.
        per_latent: whether ``sites`` and ``precision`` may be asked for each latent by itself.
    """

    least_tasks: int = 2
    penalty: str = "normal"
    every: int = 0
    per_latent: bool = False

    @abstractmethod
    def sample(
        self, starts: Mapping[str, Tensor], tasks: pyro.plate, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Sample the latents of every task, as Pyro sample sites.

        Args:
            starts: where inference begins, common to all tasks: (layers, *shape) by name of the latent. The sites of a latent
                are called ``theta.<name>`` and ``prior_mean.<name>``.
            tasks: the plate of tasks at dimension -1: all D of them, or the ones that a batch speaks of. ``tasks.indices``
                says which they are, ``tasks.subsample_size`` how many; only their values are wanted.
            masks: the entries of a latent that are active, (layers, *shape) or (D, layers, *shape) bool, for latents that have
                inactive ones: of these the prior says nothing. They go into the distributions (:func:`event`).

        Returns:
            θ by name of the latent: (D, layers, *shape), or as many rows as the plate has tasks.
        """

    @abstractmethod
    def means(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Θ by name of the latent, (layers, *shape), given the values of the sites and θ."""

    @abstractmethod
    def sites(self, theta: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the sample sites that give θ and Θ: the inverse of ``sample`` and ``means``.

        A site that θ and Θ do not determine, as a τ that is sampled, has the value where inference begins.

        Args:
            theta: θ, (D, layers, *shape) by name of the latent.
            means: Θ, (layers, *shape) by name of the latent.
        """

    def averages(self, name: str) -> bool:
        """Whether Θ of the latent ``name`` is the tasks' average, so that ``means`` needs θ of all of them."""
        return False

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


class PerLatent(Prior):
    """A prior under which the latents are independent of each other: each is sampled by itself.

    Every method speaks of one latent, ``name``, with its start (layers, *shape), its θ (D, layers, *shape), its Θ (layers,
    *shape) and its mask.
    """

    per_latent = True

    @abstractmethod
    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        """As ``sample``, for one latent: (D, layers, *shape)."""

    @abstractmethod
    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        """As ``means``, for one latent: (layers, *shape)."""

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """As ``sites``, for one latent; this one serves every prior that samples Θ and θ as they are."""
        return {f"prior_mean.{name}": mean, f"theta.{name}": theta}

    def sample(
        self, starts: Mapping[str, Tensor], tasks: pyro.plate, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        masks = masks or {}
        return {name: self.sample_latent(name, start, tasks, masks.get(name)) for name, start in starts.items()}

    def means(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.mean_of(name, sites, value) for name, value in theta.items()}

    def sites(self, theta: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        of_latents = (self.sites_of(name, theta[name], means[name]) for name in theta)
        return {site: value for sites in of_latents for site, value in sites.items()}


def event(
    distribution: dist.TorchDistribution, dims: int, mask: Tensor | None = None, tasks: pyro.plate | None = None
) -> dist.TorchDistribution:
    """A distribution of entries as one of events of ``dims`` dimensions, of which the mask leaves the inactive entries out.

    The mask goes in before ``to_event``: ``poutine.mask`` cannot reach the entries of an event, and under a flat prior the scale
    of a guide would grow without bound at an inactive one.

        >>> mask = torch.tensor([True, False])
        >>> event(dist.Normal(torch.zeros(2), 1.0), 1, mask).log_prob(torch.tensor([0.0, 100.0]))
        tensor(-0.9189)

    Args:
        distribution: of the entries, (..., *shape).
        dims: number of dimensions of an event.
        mask: the entries that are active; None: all. With a row a task it has one dimension more than ``dims``.
        tasks: the plate of tasks, where the distribution is inside it; without it an entry counts that is active in any task.
    """
    if mask is not None and mask.dim() > dims:
        mask = mask.any(0) if tasks is None else mask[tasks.indices.to(mask.device)]
    return (distribution if mask is None else distribution.mask(mask)).to_event(dims)


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


def flat(start: Tensor, dims: int, mask: Tensor | None = None, tasks: pyro.plate | None = None) -> dist.TorchDistribution:
    """p(x) ∝ 1 over the last ``dims`` dimensions of a tensor, where inference begins at ``start``; mask as for :func:`event`."""
    # A clone: a guide that begins at the mean (Pyro's init_to_mean) must not optimise the model's own start in place.
    return event(Flat(start.clone(memory_format=torch.contiguous_format), 1.0), dims, mask, tasks)


@register_kl(dist.Normal, Flat)
def _kl_normal_flat(q: dist.Normal, p: Flat) -> Tensor:
    return -q.entropy()


@register_kl(dist.Normal, StandardNormal)
def _kl_normal_standard_normal(q: dist.Normal, p: StandardNormal) -> Tensor:
    return 0.5 * (q.scale.square() + q.loc.square() - 1) - q.scale.log()


@register_kl(dist.Normal, dist.MaskedDistribution)
def _kl_normal_masked(q: dist.Normal, p: dist.MaskedDistribution) -> Tensor:
    # an inactive entry has neither a prior nor an entropy: nothing pulls at a guide's scale there
    return scale_and_mask(kl_divergence(q, p.base_dist), mask=p._mask)


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
