"""How tasks share: the prior on the adapters' latents.

    >>> HierarchicalNormal(tau=100)
    HierarchicalNormal(tau=100)
    >>> prior_from_tau(float("inf"))
    Pooled()

A prior sees a name, a starting value and the plate of tasks; it knows neither adapters nor language models. The two limits
of the hierarchy are priors of their own: :class:`Independent` (τ → 0) and :class:`Pooled` (τ → ∞).
"""

from bora_pyro.priors.base import Prior, StandardNormal
from bora_pyro.priors.from_tau import prior_from_tau
from bora_pyro.priors.hierarchical import FORMS, HierarchicalNormal
from bora_pyro.priors.limits import Independent, Pooled

__all__ = ["FORMS", "HierarchicalNormal", "Independent", "Pooled", "Prior", "StandardNormal", "prior_from_tau"]
