"""A Normal along rotated axes, for matrices whose columns have correlated entries.

>>> matrix = torch.zeros(3, 2, 5)  # three matrices of five columns with two numbers
>>> along = RotatedNormal(matrix, torch.ones(3, 5, 2), torch.eye(2).expand(3, 1, 2, 2), event_dim=2)
>>> along.batch_shape, along.event_shape, along.sample().shape
(torch.Size([3]), torch.Size([2, 5]), torch.Size([3, 2, 5]))
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.guides.matrix_normal import MatrixNormal


class RotatedNormal(MatrixNormal):
    """Normal along orthonormal axes: x = m + stretch · to_shape(Q (s · ε)), ε ~ Normal(0, I).

    The last two dimensions of an event are a matrix, read as n columns of r numbers, where r is the shorter dimension. Each
    column is rotated, by its own Q or by one Q for all columns.

    Args:
        loc: m, (*batch, *event).
        scale: s, (*batch, *event[:-2], n, r), the standard deviation along each axis.
        basis: Q, (*batch, *event[:-2], n or 1, r, r), the axes as columns.
        stretch: a factor of each entry; it broadcasts against ``loc``.
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, basis: Tensor, *, stretch: Tensor | float = 1.0, event_dim: int) -> None:
        self.scale, self.basis = scale, basis
        super().__init__(loc, stretch=stretch, event_dim=event_dim)

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> RotatedNormal:
        batch_shape, own = torch.Size(batch_shape), len(self.batch_shape)
        loc, scale, basis, stretch = (
            value.expand(*batch_shape, *value.shape[own:]) for value in (self.loc, self.scale, self.basis, self.stretch)
        )
        return RotatedNormal(loc, scale, basis, stretch=stretch, event_dim=self.event_dim)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        noise = torch.randn((*sample_shape, *self.scale.shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.stretched((self.basis @ (self.scale * noise)[..., None])[..., 0])

    def log_prob(self, value: Tensor) -> Tensor:
        along_axes = (self.basis.mT @ self.columns_of(value)[..., None])[..., 0]
        return self.log_prob_of(dist.Normal(0.0, self.scale, validate_args=False).log_prob(along_axes))
