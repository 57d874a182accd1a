"""A Normal with full covariance in a few directions of each layer, and a point mass in all others."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, register_kl

from bora_pyro.guides.low_rank import divergence_from_entries
from bora_pyro.priors.real_events import RealEvents


class SubspaceNormal(RealEvents):
    """x = m + P L ε for each layer: P has k orthonormal columns, L is lower triangular, and ε (k,) is standard Normal.

        >>> m, basis = torch.zeros(5, 2, 3, 4), torch.eye(12)[:, :2].expand(5, 2, 12, 2)  # five events of two layers
        >>> normal = SubspaceNormal(m, basis, torch.eye(2).expand(5, 2, 2, 2), event_dim=3)
        >>> normal.batch_shape, normal.event_shape, normal.sample().ne(0).sum().item()
        (torch.Size([5]), torch.Size([2, 3, 4]), 20)

    The densities and the entropy are those of the coordinates Pᵀ(x − m): x has no density over all its entries. The log-density
    of a value outside the subspace around m is that of its projection.

    Args:
        loc: m, (*batch, layers, *shape).
        basis: P, (*batch, layers, n, k), where n is the number of entries of ``shape``.
        scale_tril: L, (*batch, layers, k, k).
        event_dim: number of event dimensions: the last ones of ``loc``, with that of the layers.
    """

    def __init__(self, loc: Tensor, basis: Tensor, scale_tril: Tensor, *, event_dim: int) -> None:
        super().__init__(loc, event_dim=event_dim)
        self.basis, self.scale_tril = basis, scale_tril
        # each layer has its own Normal; only the factor L is needed, and not the covariance
        self._coordinates = MultivariateNormal(
            scale_tril.new_zeros(scale_tril.shape[-1]), scale_tril=scale_tril, validate_args=False
        )

    @property
    def variance(self) -> Tensor:
        return (self.basis @ self.scale_tril).square().sum(-1).view(self.loc.shape)

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> SubspaceNormal:
        loc, basis, scale_tril = (
            value.expand(*batch_shape, *value.shape[len(self.batch_shape) :]) for value in (self.loc, self.basis, self.scale_tril)
        )
        return SubspaceNormal(loc, basis, scale_tril, event_dim=self.event_dim)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        coordinates = self._coordinates.rsample(sample_shape)
        return self.loc + (self.basis @ coordinates[..., None]).view(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        shift = (value - self.loc).flatten(1 - self.event_dim)
        return self._coordinates.log_prob((self.basis.mT @ shift[..., None])[..., 0]).sum(-1)

    def entropy(self) -> Tensor:
        k = self.scale_tril.shape[-1]
        logs = self.scale_tril.diagonal(dim1=-2, dim2=-1).log()
        return (logs.sum(-1) + 0.5 * k * (1 + math.log(2 * math.pi))).sum(-1)


register_kl(SubspaceNormal, Independent)(divergence_from_entries)
