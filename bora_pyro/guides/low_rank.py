"""The guide whose covariance is a low-rank matrix plus a diagonal, for every site and task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, register_kl

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import check_at_least
from bora_pyro.guides.base import SiteGuide, check_no_masks
from bora_pyro.model import BoRA
from bora_pyro.priors import Flat, StandardNormal
from bora_pyro.priors.real_events import RealEvents


class LowRankNormal(RealEvents):
    """Normal(m, diag(s²) + F Fᵀ) over all n entries of an event of any shape.

        >>> event = torch.zeros(5, 2, 3)  # five events of 2 x 3
        >>> normal = LowRankNormal(event, event + 1, torch.zeros(5, 2, 3, 4), event_dim=2)
        >>> normal.batch_shape, normal.event_shape, normal.log_prob(event)[0].item()
        (torch.Size([5]), torch.Size([2, 3]), -5.5136...)

    Args:
        loc: m, (*batch, *event).
        scale: s, of the same shape.
        factor: F, (*batch, *event, k).
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor, *, event_dim: int, validate_args: bool | None = None) -> None:
        super().__init__(loc, event_dim=event_dim, validate_args=validate_args)
        self.scale, self.factor = scale, factor
        batch_shape, n = self.batch_shape, math.prod(self.event_shape)
        self._flat = LowRankMultivariateNormal(
            loc.reshape(*batch_shape, n),
            factor.reshape(*batch_shape, n, factor.shape[-1]),
            scale.square().reshape(*batch_shape, n),
            validate_args=False,
        )

    @property
    def variance(self) -> Tensor:
        return self.scale.square() + self.factor.square().sum(-1)

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> LowRankNormal:
        shape = (*batch_shape, *self.event_shape)
        loc, scale, factor = self.loc.expand(shape), self.scale.expand(shape), self.factor.expand(*shape, self.factor.shape[-1])
        return LowRankNormal(loc, scale, factor, event_dim=self.event_dim, validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self._flat.rsample(sample_shape).reshape(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._flat.log_prob(value.reshape(*value.shape[: value.dim() - self.event_dim], -1))

    def entropy(self) -> Tensor:
        return self._flat.entropy()


def divergence_from_entries(q: Any, p: Independent) -> Tensor:
    """KL(q ‖ p) for a prior p of independent entries, Normal or flat, from the moments and the entropy of q: (*batch).

    Args:
        q: a distribution with ``loc``, its mean, ``variance`` (of each entry), ``event_dim`` and ``entropy()``.
        p: the prior, with as many event dimensions.
    """
    base, dims = p.base_dist, p.reinterpreted_batch_ndims
    if dims != q.event_dim or not isinstance(base, Flat | dist.Normal):
        raise NotImplementedError  # as torch's kl_divergence without a closed form; the ELBO then estimates the divergence
    if isinstance(base, Flat):
        return -q.entropy()
    if isinstance(base, StandardNormal):
        excess = q.variance + q.loc.square()
    else:
        excess = (q.variance + (q.loc - base.loc).square()) / base.scale.square() + 2 * base.scale.log()
    entries = 0.5 * (excess + math.log(2 * math.pi))
    return entries.flatten(entries.dim() - dims).sum(-1) - q.entropy() if dims else entries - q.entropy()


register_kl(LowRankNormal, Independent)(divergence_from_entries)


class LowRankGuide(SiteGuide):
    """q(x) = Normal(m, diag(s²) + F Fᵀ) at every site, with its own m, s and F for each task: entries may be correlated.

    The columns of F start at small random values, so that they differ. At a site that is not real, such as a random τ, the
    distribution is that of the logarithm.

    Args:
        model: the BoRA model, or any other Pyro model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        rank: k, the number of columns of F.
        scale: the initial standard deviations, in units of the prior's.
        seed: seed of the initial F.

    Raises:
        InputError: the rank is below 1, the scale is not positive, or the adapter masks entries.
    """

    def __init__(
        self, model: BoRA, sites: Mapping[str, Tensor] | None = None, *, rank: int = 2, scale: float = 0.1, seed: int = 0
    ) -> None:
        check_at_least("rank of the covariance", rank, 1)
        check_no_masks(model, "low_rank")
        super().__init__(model, sites, scale=scale)
        self._rank, self._generator = rank, torch.Generator().manual_seed(seed)

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        self.put("loc", name, centre, event_dim)
        self.put("log_scale", name, deviation.log().expand(centre.shape), event_dim)
        noise = torch.randn((*centre.shape, self._rank), generator=self._generator, dtype=centre.dtype).to(centre.device)
        # the columns together start with a tenth of the diagonal's variance
        self.put("factor", name, noise * deviation.expand(centre.shape)[..., None] * (0.1 / self._rank) ** 0.5, event_dim + 1)

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        loc, scale, factor = self.get("loc", name), self.get("log_scale", name).exp(), self.get("factor", name)
        if event_dim:
            return LowRankNormal(loc, scale, factor, event_dim=event_dim)
        return dist.Normal(loc, (scale.square() + factor.square().sum(-1)).sqrt(), validate_args=False)


def low_rank_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    rank: int = 2,
) -> LowRankGuide:
    """:class:`LowRankGuide` as a :class:`~bora_pyro.guides.GuideBuilder`, with the option ``rank``.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> type(low_rank_guide(model)).__name__
    'LowRankGuide'
    """
    return LowRankGuide(model, sites, scale=scale, rank=rank)
