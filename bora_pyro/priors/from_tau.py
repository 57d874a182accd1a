"""The prior that a value of τ stands for."""

from __future__ import annotations

import math
from collections.abc import Callable

from bora_pyro.errors import InputError, nearest
from bora_pyro.priors.base import Prior, check_tau
from bora_pyro.priors.hierarchical import HierarchicalNormal
from bora_pyro.priors.limits import Independent, Pooled
from bora_pyro.priors.norm import HierarchicalNorm

#: Hierarchies with a fixed τ, by the name that a configuration gives their penalty on θ_d − Θ.
PENALTIES: dict[str, Callable[[float, str], Prior]] = {"normal": HierarchicalNormal, "norm": HierarchicalNorm}


def prior_from_tau(tau: float, form: str = "noncentered", *, penalty: str = "normal") -> Prior:
    """The prior of precision τ, limits included: 0 is :class:`Independent`, infinity is :class:`Pooled`.

        >>> [prior_from_tau(tau) for tau in (0, 100, float("inf"))]
        [Independent(), HierarchicalNormal(tau=100), Pooled()]

    Args:
        tau: τ, from 0 to infinity.
        form: ``noncentered`` or ``centered``.
        penalty: ``normal`` (the paper) for :class:`HierarchicalNormal`, ``norm`` (the released code) for
            :class:`HierarchicalNorm`, whose τ has another unit. Their limits are the same.

    Raises:
        InputError: τ is negative or not a number; an unknown penalty.
    """
    if penalty not in PENALTIES:
        raise InputError(f"penalty {penalty!r} is not known; it is one of {', '.join(PENALTIES)}{nearest(penalty, PENALTIES)}")
    check_tau(tau)
    if tau == 0:
        return Independent()
    return Pooled() if math.isinf(tau) else PENALTIES[penalty](tau, form)
