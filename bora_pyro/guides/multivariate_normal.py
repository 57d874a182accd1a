"""The guide with a full covariance of each task's latents of a layer, for adapters with few latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, register_kl

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.base import SiteGuide, check_no_masks
from bora_pyro.guides.low_rank import divergence_from_entries
from bora_pyro.model import BoRA
from bora_pyro.priors.real_events import RealEvents

#: The most entries of a latent of one layer. A covariance of n entries has n (n + 1)/2 numbers, for each task and layer.
LARGEST = 512


class BlockNormal(RealEvents):
    """Normal over an event of any shape, whose entries are divided into blocks: m + L z in each block, blocks independent.

        >>> tril = torch.tensor([[1.0, 0.0], [2.0, 3.0]]).expand(4, 3, 2, 2)
        >>> normal = BlockNormal(torch.zeros(4, 3, 2), tril, event_dim=2)  # four events of three blocks
        >>> normal.batch_shape, normal.event_shape, normal.variance[0, 0].tolist()
        (torch.Size([4]), torch.Size([3, 2]), [1.0, 13.0])

    Args:
        loc: m, (*batch, *event). A block is a run of n entries of the flattened event.
        scale_tril: L, (*batch, blocks, n, n): lower triangular with a positive diagonal.
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, *, event_dim: int) -> None:
        super().__init__(loc, event_dim=event_dim)
        self.scale_tril = scale_tril
        blocks = loc.reshape(*self.batch_shape, *scale_tril.shape[-3:-1])
        self._blocks = MultivariateNormal(blocks, scale_tril=scale_tril, validate_args=False)

    @property
    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1).reshape(self.loc.shape)

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> BlockNormal:
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return BlockNormal(loc, self.scale_tril.expand(*batch_shape, *self.scale_tril.shape[-3:]), event_dim=self.event_dim)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self._blocks.rsample(sample_shape).reshape(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        leading = value.shape[: value.dim() - self.event_dim]
        return self._blocks.log_prob(value.reshape(*leading, *self.scale_tril.shape[-3:-1])).sum(-1)

    def entropy(self) -> Tensor:
        return self._blocks.entropy().sum(-1)


register_kl(BlockNormal, Independent)(divergence_from_entries)


class MultivariateNormalGuide(SiteGuide):
    """q(x) = Normal(m, L Lᵀ) for each task, latent and layer: all entries of a latent of a layer may be correlated.

        >>> import bora_pyro as bp
        >>> from bora_pyro.adapters import NOLA
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=NOLA(rank=2, bases=8))
        >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> guide = MultivariateNormalGuide(model)
        >>> guide(split.batches()[0])["theta.q_proj.coefficients_A_decentered"].shape
        torch.Size([2, 4, 8])
        >>> guide.unconstrained("theta.q_proj.coefficients_A_decentered", 2).scale_tril.shape
        torch.Size([2, 4, 8, 8])

    It is the idea of Pyro's ``AutoMultivariateNormal``, at the sites themselves, so that the KL divergence is exact. (Pyro's
    guide has one covariance of all sites together, which is far too large here.) Layers, latents, tasks and Θ are independent of
    each other. If the likelihood is Gaussian in the entries of a latent and Θ is given, the optimum of the ELBO is the exact
    posterior. L = diag(s) (I + T) with T strictly lower triangular, which begins at 0, the mean field. There are n (n + 3)/2
    parameters for n entries. A site that is no latent of layers has one covariance. A positive site, such as a random τ, has
    independent log-Normals.

    Args:
        model: the BoRA model, or any other Pyro model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        scale: the initial standard deviations s, in units of the prior's.

    Raises:
        InputError: a latent has more than ``LARGEST`` entries in a layer, ``scale`` is not above 0, or the adapter masks entries.
    """

    def __init__(self, model: BoRA, sites: Mapping[str, Tensor] | None = None, *, scale: float = 0.1) -> None:
        check_no_masks(model, "multivariate_normal")
        for name, start in getattr(model, "starts", {}).items():
            _check_size(f"a layer of {name}", start[0].numel())
        super().__init__(model, sites, scale=scale)

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        self.put("loc", name, centre, event_dim)
        self.put("log_scale", name, deviation.log().expand(centre.shape), event_dim)
        if event_dim:
            batch, event = centre.shape[: centre.dim() - event_dim], centre.shape[centre.dim() - event_dim :]
            blocks = event[0] if _latent(name) in getattr(self.model, "starts", {}) else 1
            n = math.prod(event) // blocks
            _check_size(name, n)
            self.put("below", name, centre.new_zeros(*batch, blocks, n * (n - 1) // 2), 2)

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        loc, scale = self.get("loc", name), self.get("log_scale", name).exp()
        if not event_dim:
            return dist.Normal(loc, scale, validate_args=False)
        below = self.get("below", name)  # the entries of T, (*batch, blocks, n (n − 1)/2)
        scale = scale.reshape(*below.shape[:-1], -1)
        n = scale.shape[-1]
        unit = torch.eye(n, dtype=loc.dtype, device=loc.device).flatten().expand(*below.shape[:-1], n * n)
        unit = unit.index_copy(-1, _places_below(n).to(loc.device), below).unflatten(-1, (n, n))
        return BlockNormal(loc, scale[..., None] * unit, event_dim=event_dim)


@cache
def _places_below(n: int) -> Tensor:
    """The places below the diagonal of a flattened n x n matrix."""
    row, column = torch.tril_indices(n, n, -1)
    return n * row + column


def _latent(site: str) -> str:
    """The latent of a site of Θ or of the tasks."""
    return site.removeprefix("prior_mean.").removeprefix("theta.").removesuffix("_decentered")


def _check_size(what: str, n: int) -> None:
    if n > LARGEST:
        raise InputError(
            f"guide multivariate_normal has a covariance of at most {LARGEST} entries, but {what} has {n}; use the guide "
            f"low_rank, or an adapter with fewer latents, such as nola with at most {LARGEST} bases"
        )


def multivariate_normal_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
) -> MultivariateNormalGuide:
    """:class:`MultivariateNormalGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``data`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> type(multivariate_normal_guide(model)).__name__
    'MultivariateNormalGuide'
    """
    return MultivariateNormalGuide(model, sites, scale=scale)
