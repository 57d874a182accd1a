"""What noise costs: ε of a number of private steps, and the noise that keeps ε below a target. Opacus computes it.

>>> round(epsilon_of(1.0, sample_rate=0.1, steps=100, delta=1e-3), 2)
5.64
>>> sigma = noise_for(3.0, sample_rate=0.1, steps=100, delta=1e-3)
>>> 2.97 < epsilon_of(sigma, sample_rate=0.1, steps=100, delta=1e-3) <= 3
True
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from functools import lru_cache

from bora_pyro.errors import InputError
from bora_pyro.federated.privacy_options import PRV, RDP

#: How the accountant is installed.
INSTALL = "pip install 'bora_pyro[privacy]'"
# Noise beyond this multiplier leaves nothing of any gradient; Opacus gives up there too.
_MOST_NOISE = 1e6
# Above this ε no document is protected, and the table of prv would be too large for the memory.
_LARGEST_OF_PRV = 50.0
# σ is solved for up to this relative error, on the side of more noise.
_TOLERANCE = 1e-3


def is_installed() -> bool:
    """Whether Opacus is there."""
    return importlib.util.find_spec("opacus") is not None


@lru_cache(maxsize=4096)
def epsilon_of(noise_multiplier: float, *, sample_rate: float, steps: int, delta: float, accountant: str = RDP) -> float:
    """ε of steps that add Gaussian noise to the sum over a Poisson sample; inf without noise.

    The neighbours are data sets that differ by one document, which is added or removed. ``rdp`` is the bound by Rényi
    divergences (Mironov, Talwar & Zhang, 2019, arXiv 1908.10530), ``prv`` that by the distribution of the privacy loss (Gopi,
    Lee & Wutschitz, 2021, arXiv 2106.02848). Where ``rdp`` is above 50, it stands for ``prv`` too, as a larger bound.

    Args:
        noise_multiplier: σ, the standard deviation of the noise over the largest norm of a document's gradient.
        sample_rate: q, the probability of each document to be in a step.
        steps: number of steps, those with an empty sample included.
        delta: δ, between 0 and 1.
        accountant: ``rdp`` or ``prv``.

    Raises:
        InputError: Opacus is not installed.
    """
    if not steps:
        return 0.0
    if not noise_multiplier:
        return math.inf
    if not is_installed():
        raise InputError(f"epsilon is computed by opacus, which is not installed; {INSTALL}")
    from opacus.accountants import create_accountant  # takes seconds to import

    def of(kind: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another order of the divergence would be tighter: the bound holds
            ledger = create_accountant(kind)
            ledger.history = [(noise_multiplier, sample_rate, steps)]
            found = float(ledger.get_epsilon(delta=delta))
        return math.inf if math.isnan(found) else max(0.0, found)

    found = of(RDP)
    return found if accountant == RDP or found > _LARGEST_OF_PRV else min(found, of(PRV))


@lru_cache(maxsize=4096)
def noise_for(epsilon: float, *, sample_rate: float, steps: int, delta: float, accountant: str = RDP) -> float:
    """The smallest σ, up to one in a thousand, with which the steps cost ε or less.

    It bisects, as ``opacus.accountants.utils.get_noise_multiplier`` does, but for a number of times that is known: where a bound
    jumps, that one goes on for ever.

    Args:
        epsilon: the target, above 0.
        sample_rate: as for `epsilon_of`.
        steps: the number of steps, one or more.
        delta: as for `epsilon_of`.
        accountant: as for `epsilon_of`.

    Raises:
        InputError: no noise is enough, or Opacus is not installed.
    """

    def costs(sigma: float) -> float:
        return epsilon_of(sigma, sample_rate=sample_rate, steps=steps, delta=delta, accountant=accountant)

    high = 1.0
    while costs(high) > epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise InputError(f"epsilon is {epsilon:g}, which no noise reaches at delta {delta:g}; give a larger epsilon or delta")
    low = high
    while low > 1 / _MOST_NOISE and costs(low) <= epsilon:
        low /= 2
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if costs(middle) <= epsilon else (middle, high)
    return high
