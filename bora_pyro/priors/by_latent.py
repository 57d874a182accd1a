"""A prior that combines several priors: each latent of an adapter has its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import pyro
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.priors.base import Prior
from bora_pyro.priors.limits import Pooled


class ByLatent(Prior):
    """Each latent has its own prior, chosen by the last part of the latent's name.

        >>> from bora_pyro.priors import HierarchicalNormal, Pooled
        >>> ByLatent({"shared_A": Pooled(), "shared_B": Pooled()}, other=HierarchicalNormal(tau=100))
        ByLatent({'shared_A': Pooled(), 'shared_B': Pooled()}, other=HierarchicalNormal(tau=100))

    Args:
        priors: the priors by the latent's name within its layer (``lora_A`` for ``q_proj.lora_A``, ``v_proj.lora_A``, ...).
        other: the prior of all other latents. Only this one may learn its parameters during a fit.

    Raises:
        InputError: a name has a dot, or one of ``priors`` learns its parameters during a fit.
    """

    def __init__(self, priors: Mapping[str, Prior], *, other: Prior) -> None:
        for name, prior in priors.items():
            if "." in name:
                raise InputError(f"latent {name!r} is not allowed; give its last part alone, {name.rpartition('.')[-1]!r}")
            if prior.every:
                raise InputError(
                    f"the prior of {name!r}, {prior}, is learned during a fit; give it as other, and fixed priors by name"
                )
        self.priors, self.other = dict(priors), other
        self.every = other.every  # only ``other`` may have something to learn
        self.penalty, self.groups = other.penalty, other.groups
        self.per_latent = all(prior.per_latent for prior in (*self.priors.values(), other))

    def of(self, name: str) -> Prior:
        """The prior of the latent ``name``."""
        return self.priors.get(name.rpartition(".")[-1], self.other)

    def _by_prior(self, names: Iterable[str]) -> list[tuple[Prior, list[str]]]:
        """Groups of latents in the order in which they are sampled: a joint prior has one group, other latents are alone."""
        groups: list[tuple[Prior, list[str]]] = []
        for name in names:
            prior = self.of(name)
            joint = [group for group in groups if group[0] is prior and not prior.per_latent]
            if joint:
                joint[0][1].append(name)
            else:
                groups.append((prior, [name]))
        return groups

    def sample(
        self, starts: Mapping[str, Tensor], tasks: pyro.plate, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        sampled: dict[str, Tensor] = {}
        for prior, names in self._by_prior(starts):
            sampled |= prior.sample({name: starts[name] for name in names}, tasks, masks)
        return {name: sampled[name] for name in starts}

    def means(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prior, names in self._by_prior(theta):
            found |= prior.means(sites, {name: theta[name] for name in names})
        return {name: found[name] for name in theta}

    def averages(self, name: str) -> bool:
        return self.of(name).averages(name)

    def sites(self, theta: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prior, names in self._by_prior(theta):
            found |= prior.sites({name: theta[name] for name in names}, {name: means[name] for name in names})
        return found

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.of(name).precision(name, start, sites)

    def group_precision(self, name: str, start: Tensor) -> Tensor:
        return self.of(name).group_precision(name, start)

    def centre(self, name: str, sites: Mapping[str, Tensor]) -> Tensor:
        return self.of(name).centre(name, sites)

    def average(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prior, names in self._by_prior(theta):
            found |= prior.average(sites, {name: theta[name] for name in names})
        return found

    def of_new_task(
        self, sites: Mapping[str, Tensor], means: Mapping[str, Tensor], *, group: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for prior, names in self._by_prior(means):
            own = prior.of_new_task(sites, {name: means[name] for name in names}, group=group if prior is self.other else None)
            for values, new in zip(found, own, strict=True):
                values |= new
        return found

    def learn(
        self,
        deviations: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        task: Tensor,
        *,
        sites: Mapping[str, Tensor] | None = None,
        all_reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        names = [name for name in deviations if self.of(name) is self.other]
        deviations, gradients = ({name: values[name] for name in names} for values in (deviations, gradients))
        self.other.learn(deviations, gradients, task, sites=sites, all_reduce=all_reduce)

    def state(self) -> dict[str, Tensor]:
        return self.other.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.other.load_state(state)

    def __repr__(self) -> str:
        return f"ByLatent({self.priors}, other={self.other})"


def with_shared(prior: Prior, shared: Collection[str]) -> Prior:
    """The prior ``prior``, except that the latents in ``shared``, which an adapter declares, have one value for all tasks.

    >>> from bora_pyro.priors import Independent
    >>> with_shared(Independent(), ())
    Independent()
    """
    return ByLatent(dict.fromkeys(shared, Pooled()), other=prior) if shared else prior
