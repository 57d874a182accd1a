"""The base classes of priors. A prior is the joint distribution of the tasks' values of the latent tensors.

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

from bora_pyro.errors import InputError, shown

# Each guide holds its own parameters. With Pyro's global parameter store, a second guide in the same process would silently
# use the parameters of the first one. The setting must be made before any guide is built. Every guide needs a model, and every
# model imports this module.
pyro.settings.set(module_local_params=True)


class Prior(ABC):
    """A joint distribution of the latents of all tasks.

    A subclass defines ``sample``, ``means`` and ``sites``, and ``precision`` if the deviations have a τ: adaptation, diagnostics
    and guides ask for it. A prior that treats each latent separately is a :class:`PerLatent`, which needs shorter methods.

    Attributes:
        least_tasks: the smallest number of tasks; the model rejects fewer.
        penalty: whether τ multiplies half the squared deviation (``normal``) or its norm (``norm``).
        every: steps of a fit between two calls of ``learn``; 0: this prior has nothing to learn.
        groups: the names of the groups that the tasks belong to, if the prior has such a level.
        per_latent: whether θ and Θ of a latent determine all its sites but a random τ.
    """

    least_tasks: int = 2
    penalty: str = "normal"
    every: int = 0
    per_latent: bool = False
    groups: tuple[str, ...] = ()

    @abstractmethod
    def sample(
        self, starts: Mapping[str, Tensor], tasks: pyro.plate, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Sample the latents of every task, as Pyro sample sites.

        Args:
            starts: initial values for inference, the same for all tasks: (layers, *shape) by name of the latent. The sites of a
                latent are called ``theta.<name>`` and ``prior_mean.<name>``.
            tasks: the plate of tasks at dimension -1, with all D tasks or only those of a batch. ``tasks.indices`` are the
                tasks, ``tasks.subsample_size`` is their number; only their values are returned.
            masks: which entries of a latent are active, (layers, *shape) or (D, layers, *shape) bool, for latents with inactive
                entries. Inactive entries have no prior. The masks are applied to the distributions (:func:`event`).

        Returns:
            θ by name of the latent: (D, layers, *shape), or one row for each task of the plate.
        """

    @abstractmethod
    def means(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Θ by name of the latent, (layers, *shape), given the values of the sites and θ."""

    @abstractmethod
    def sites(self, theta: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the sample sites for given θ and Θ: the inverse of ``sample`` and ``means``.

        A site that θ and Θ do not determine, such as a random τ, gets its initial value.

        Args:
            theta: θ, (D, layers, *shape) by name of the latent.
            means: Θ, (layers, *shape) by name of the latent.
        """

    def averages(self, name: str) -> bool:
        """Whether Θ of the latent ``name`` is the average over all tasks, so that ``means`` needs θ of all tasks."""
        return False

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        """τ of the latent ``name``: a tensor that broadcasts against (D, layers, *shape).

        τ is 0 for independent tasks and infinite for pooled tasks. With a penalty that is not Normal, it is the precision of the
        Normal with the same variance.

        Args:
            name: name of the latent.
            start: initial value for inference, (layers, *shape).
            sites: values of the sample sites. A prior reads τ from them if τ is a sample site. None: the initial τ.

        Raises:
            InputError: the class has no method ``precision``.
        """
        raise InputError(f"the precision of deviations under {self} is not known; give its class a method `precision`")

    def group_precision(self, name: str, start: Tensor) -> Tensor:
        """τ_g of the latent ``name``, the precision of the means of groups of tasks around Θ.

        It broadcasts against (groups, layers, *shape). It is infinite under a prior without groups.
        """
        return start.new_tensor(math.inf)

    def centre(self, name: str, sites: Mapping[str, Tensor]) -> Tensor:
        """The mean of the tasks' weights given the sites above them: Θ, (layers, *shape), or one for each task, (D, ...)."""
        return sites[f"prior_mean.{name}"]

    def average(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """θ if the own deviation of each task were the average over all tasks; it broadcasts against θ, (D, layers, *shape).

        Args:
            sites: values of the sample sites.
            theta: θ of all tasks by name of the latent.
        """
        return {name: value.mean(0, keepdim=True) for name, value in theta.items()}

    def of_new_task(
        self, sites: Mapping[str, Tensor], means: Mapping[str, Tensor], *, group: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The prior of a task that is not one of the fit: its mean, (layers, *shape), and its precision, by name of the latent.

        If each task of the fit has its own τ, a new task gets their geometric mean.

        Args:
            sites: values of the sample sites.
            means: Θ, (layers, *shape) by name of the latent.
            group: the name of the task's group; None: no group of the fit.

        Raises:
            InputError: there is no such group.
        """
        if group is not None:
            raise InputError(f"task_group is {shown(group)}, but {self} has no groups of tasks; leave it out")
        precisions = {}
        for name, mean in means.items():
            tau = self.precision(name, mean, sites)
            precisions[name] = tau.log().mean(0).exp() if tau.dim() > mean.dim() else tau
        return dict(means), precisions

    def learn(  # noqa: B027 (most priors have nothing to learn)
        self,
        deviations: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        task: Tensor,
        *,
        sites: Mapping[str, Tensor] | None = None,
        all_reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        """Update the prior's own parameters from validation documents; a prior without such parameters does nothing.

        Args:
            deviations: how the task of each document deviates from ``average``, (documents, layers, *shape) by latent.
            gradients: ∇ log p(w_n | θ_d(n)) of each document with respect to the weights of its own task,
                (documents, layers, *shape).
            task: index of each document's task, (documents,).
            sites: values of the sample sites; those of single tasks may be of some tasks only. Priors with groups need them.
            all_reduce: sums a tensor over the processes of a fit; each process has its own documents.
        """

    def state(self) -> dict[str, Tensor]:
        """The learned parameters, as tensors for a checkpoint and a run folder; names that start with ``tau.`` are τ."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (most priors have no state)
        """Restore the tensors that ``state`` returned, or those of them that a run folder has."""


class PerLatent(Prior):
    """A prior under which the latents are independent of each other, so that each one is sampled separately.

    Every method handles one latent, ``name``, with its start (layers, *shape), its θ (D, layers, *shape), its Θ (layers, *shape)
    and its mask.
    """

    per_latent = True

    @abstractmethod
    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        """As ``sample``, for one latent: θ, (D, layers, *shape)."""

    @abstractmethod
    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        """As ``means``, for one latent: Θ, (layers, *shape)."""

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """As ``sites``, for one latent. This default is right for every prior that samples Θ and θ themselves."""
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
    """Make events of ``dims`` dimensions from a distribution of entries, without the entries that the mask marks as inactive.

    The mask is applied before ``to_event``, because ``poutine.mask`` cannot mask single entries of an event. Without a mask, the
    guide's scale at an inactive entry with a flat prior would grow without bound.

        >>> mask = torch.tensor([True, False])
        >>> event(dist.Normal(torch.zeros(2), 1.0), 1, mask).log_prob(torch.tensor([0.0, 100.0]))
        tensor(-0.9189)

    Args:
        distribution: the distribution of the entries, (..., *shape).
        dims: number of dimensions of an event.
        mask: which entries are active; None: all. A mask with one row per task has one dimension more than ``dims``.
        tasks: the plate of tasks, if the distribution is inside it. Outside it, an entry is active if it is active in any task.
    """
    if mask is not None and mask.dim() > dims:
        mask = mask.any(0) if tasks is None else mask[tasks.indices.to(mask.device)]
    return (distribution if mask is None else distribution.mask(mask)).to_event(dims)


class StandardNormal(dist.Normal):
    """Normal(0, 1) with a faster log-density: it needs no division by the scale and no logarithm of it.

    Adapters have millions of entries, so this saves time.
    """

    @property
    def mean(self) -> Tensor:
        """Zeros in their own memory. ``Normal`` may return an expanded view, which a guide cannot use as a parameter."""
        return self.loc.contiguous()

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.addcmul(value.new_full((), -0.5 * math.log(2 * math.pi)), value, value, value=-0.5)


class Flat(dist.Normal):
    """The improper p(x) ∝ 1 for each entry: the log-density is 0 everywhere. Inference begins at ``loc``.

    With a point mass as guide it acts like Pyro's ``Normal(loc, 1).mask(False)``. The KL divergence from a Normal to it is the
    negative entropy, ∫ q log q. For the masked distribution that divergence would be 0, and nothing would bound a guide's scale.

        >>> Flat(torch.zeros(2), 1.0).log_prob(torch.tensor([3.0, 4.0]))
        tensor([0., 0.])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


def flat(start: Tensor, dims: int, mask: Tensor | None = None, tasks: pyro.plate | None = None) -> dist.TorchDistribution:
    """p(x) ∝ 1 for events of ``dims`` dimensions; inference begins at ``start``. ``mask`` and ``tasks`` as for :func:`event`."""
    # A clone: a guide that starts at the mean (Pyro's init_to_mean) must not optimise the model's own start in place.
    return event(Flat(start.clone(memory_format=torch.contiguous_format), 1.0), dims, mask, tasks)


@register_kl(dist.Normal, Flat)
def _kl_normal_flat(q: dist.Normal, p: Flat) -> Tensor:
    return -q.entropy()


@register_kl(dist.Normal, StandardNormal)
def _kl_normal_standard_normal(q: dist.Normal, p: StandardNormal) -> Tensor:
    return 0.5 * (q.scale.square() + q.loc.square() - 1) - q.scale.log()


@register_kl(dist.Normal, dist.MaskedDistribution)
def _kl_normal_masked(q: dist.Normal, p: dist.MaskedDistribution) -> Tensor:
    # an inactive entry adds neither a prior term nor an entropy term, so a guide's scale has no gradient there
    return scale_and_mask(kl_divergence(q, p.base_dist), mask=p._mask)


def copies(value: Tensor, start: Tensor, tasks: pyro.plate) -> Tensor:
    """``value`` once for each task of the plate: (D, *start.shape)."""
    # copies instead of an expanded view: guides make parameters of it, and an optimiser would update a view's entries together
    return value.expand(tasks.subsample_size, *start.shape).contiguous()


def check_tau(tau: float) -> None:
    """Check that τ is a number from 0 to infinity.

    Raises:
        InputError: τ is negative or not a number.
    """
    if math.isnan(tau) or tau < 0:
        raise InputError(
            f"tau {tau} is not allowed; it is a number from 0 (independent tasks) to inf (one shared adapter), nearest: 0"
        )
