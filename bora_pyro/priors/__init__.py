"""Priors on the adapters' latents: how strongly tasks share.

    >>> HierarchicalNormal(tau=100)
    HierarchicalNormal(tau=100)
    >>> prior_from_tau(float("inf"))
    Pooled()

A prior gets names, starting values, masks and the plate of tasks. It does not depend on adapters or language models. The two
limits of the hierarchy are separate priors: :class:`Independent` (τ → 0) and :class:`Pooled` (τ → ∞).
"""

from bora_pyro.priors.amortised import GLOBAL_PRIORS, AmortisedNormal
from bora_pyro.priors.base import Flat, PerLatent, Prior, StandardNormal, event
from bora_pyro.priors.by_latent import ByLatent, with_shared
from bora_pyro.priors.from_tau import PENALTIES, prior_from_tau
from bora_pyro.priors.frozen import FrozenAdapters
from bora_pyro.priors.given import Given
from bora_pyro.priors.grouped import GROUPED, GroupedNormal
from bora_pyro.priors.hierarchical import FORMS, HierarchicalNormal
from bora_pyro.priors.learned import LearnedPrecision
from bora_pyro.priors.limits import Independent, Pooled
from bora_pyro.priors.norm import HierarchicalNorm, SphericalLaplace
from bora_pyro.priors.random_precision import HYPERPRIORS, RANDOM_PER, GammaPrecision, HalfCauchyPrecision, RandomPrecision

#: Priors by the name that a configuration gives them.
PRIORS: dict[str, type[Prior]] = {
    "hierarchical_normal": HierarchicalNormal,
    "learned_precision": LearnedPrecision,
    GROUPED: GroupedNormal,
    "random_precision": RandomPrecision,
    "hierarchical_norm": HierarchicalNorm,
    "independent": Independent,
    "pooled": Pooled,
    "amortised_normal": AmortisedNormal,
}

__all__ = [
    "FORMS",
    "GLOBAL_PRIORS",
    "HYPERPRIORS",
    "PENALTIES",
    "PRIORS",
    "RANDOM_PER",
    "AmortisedNormal",
    "ByLatent",
    "Flat",
    "FrozenAdapters",
    "GammaPrecision",
    "Given",
    "GroupedNormal",
    "HalfCauchyPrecision",
    "HierarchicalNorm",
    "HierarchicalNormal",
    "Independent",
    "LearnedPrecision",
    "PerLatent",
    "Pooled",
    "Prior",
    "RandomPrecision",
    "SphericalLaplace",
    "StandardNormal",
    "event",
    "prior_from_tau",
    "with_shared",
]  # fmt: skip
