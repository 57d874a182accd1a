"""The prior for a given value of τ."""

from __future__ import annotations

import math
from collections.abc import Callable

from bora_pyro.errors import check_one_of
from bora_pyro.priors.base import Prior, check_tau
from bora_pyro.priors.hierarchical import HierarchicalNormal
from bora_pyro.priors.limits import Independent, Pooled
from bora_pyro.priors.norm import HierarchicalNorm

#: Hierarchies with a fixed τ, by the name that a configuration gives their penalty on θ_d − Θ.
PENALTIES: dict[str, Callable[[float, str], Prior]] = {"normal": HierarchicalNormal, "norm": HierarchicalNorm}


def prior_from_tau(tau: float, form: str = "noncentered", *, penalty: str = "normal") -> Prior:
    """The prior with precision τ: 0 gives :class:`Independent`, infinity gives :class:`Pooled`.

        >>> [prior_from_tau(tau) for tau in (0, 100, float("inf"))]
        [Independent(), HierarchicalNormal(tau=100), Pooled()]

    Args:
        tau: τ, from 0 to infinity.
        form: ``noncentered`` or ``centered``.
        penalty: ``normal`` (the paper) for :class:`HierarchicalNormal`, ``norm`` (the released code) for
            :class:`HierarchicalNorm`, whose τ has another unit. Both have the same limits.

    Raises:
        InputError: τ is negative or not a number, or the penalty is unknown.
    """
    check_one_of("penalty", penalty, PENALTIES)
    check_tau(tau)
    if tau == 0:
        return Independent()
    return Pooled() if math.isinf(tau) else PENALTIES[penalty](tau, form)
