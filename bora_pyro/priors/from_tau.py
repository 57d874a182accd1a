"""The prior that a value of τ stands for."""

from __future__ import annotations

import math

from bora_pyro.priors.base import Prior, check_tau
from bora_pyro.priors.hierarchical import HierarchicalNormal
from bora_pyro.priors.limits import Independent, Pooled


def prior_from_tau(tau: float, form: str = "noncentered") -> Prior:
    """The prior of precision τ, limits included: 0 is :class:`Independent`, infinity is :class:`Pooled`.

    Raises:
        InputError: τ is negative or not a number.
    """
    check_tau(tau)
    if tau == 0:
        return Independent()
    return Pooled() if math.isinf(tau) else HierarchicalNormal(tau, form)
