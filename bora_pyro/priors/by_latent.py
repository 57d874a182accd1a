"""Another prior for each latent of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import pyro
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.priors.base import Prior
from bora_pyro.priors.limits import Pooled


class ByLatent(Prior):
    """Each latent under a prior of its own, chosen by the last part of its name.

        >>> from bora_pyro.priors import HierarchicalNormal, Pooled
        >>> ByLatent({"shared_A": Pooled(), "shared_B": Pooled()}, other=HierarchicalNormal(tau=100))
        ByLatent({'shared_A': Pooled(), 'shared_B': Pooled()}, other=HierarchicalNormal(tau=100))

    Args:
        priors: by the latent's name within its layer (``lora_A`` stands for ``q_proj.lora_A``, ``v_proj.lora_A``, ...).
        other: the prior of every other latent.

    Raises:
        InputError: a name with a dot, which no latent's last part has; a prior by name that learns, as ``other`` may.
    """

    def __init__(self, priors: Mapping[str, Prior], *, other: Prior) -> None:
        for name, prior in priors.items():
            if "." in name:
                raise InputError(f"latent {name!r} is not allowed; give its last part alone, {name.rpartition('.')[-1]!r}")
            if prior.every:
                raise InputError(
                    f"the prior of {name!r}, {prior}, learns; give it as other, and those of the other latents by name"
                )
        self.priors, self.other = dict(priors), other
        self.every = other.every  # the only one here that may have something to learn
        self.penalty = other.penalty
        self.per_latent = all(prior.per_latent for prior in (*self.priors.values(), other))

    def of(self, name: str) -> Prior:
        """The prior of the latent ``name``."""
        return self.priors.get(name.rpartition(".")[-1], self.other)

    def _by_prior(self, names: Iterable[str]) -> list[tuple[Prior, list[str]]]:
        """The latents in the order in which they are sampled: those of a joint prior together, every other one by itself."""
        parts: list[tuple[Prior, list[str]]] = []
        for name in names:
            prior = self.of(name)
            together = [part for part in parts if part[0] is prior and not prior.per_latent]
            if together:
                together[0][1].append(name)
            else:
                parts.append((prior, [name]))
        return parts

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

    def learn(
        self,
        deviations: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        task: Tensor,
        *,
        all_reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        names = [name for name in deviations if self.of(name) is self.other]
        deviations, gradients = ({name: values[name] for name in names} for values in (deviations, gradients))
        self.other.learn(deviations, gradients, task, all_reduce=all_reduce)

    def state(self) -> dict[str, Tensor]:
        return self.other.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.other.load_state(state)

    def __repr__(self) -> str:
        return f"ByLatent({self.priors}, other={self.other})"


def with_shared(prior: Prior, shared: Collection[str]) -> Prior:
    """``prior``, but one value for all tasks of the latents in ``shared``: what an adapter declares as its ``shared``.

    >>> from bora_pyro.priors import Independent
    >>> with_shared(Independent(), ())
    Independent()
    """
    return ByLatent(dict.fromkeys(shared, Pooled()), other=prior) if shared else prior
