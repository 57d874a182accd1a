"""Another prior for each latent of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

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

    def of(self, name: str) -> Prior:
        """The prior of the latent ``name``."""
        return self.priors.get(name.rpartition(".")[-1], self.other)

    def sample(self, name: str, start: Tensor, tasks: pyro.plate) -> Tensor:
        return self.of(name).sample(name, start, tasks)

    def mean(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return self.of(name).mean(name, sites, theta)

    def averages(self, name: str) -> bool:
        return self.of(name).averages(name)

    def sites(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        return self.of(name).sites(name, theta, mean)

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
