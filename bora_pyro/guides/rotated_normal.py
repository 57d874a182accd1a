"""A Normal along rotated axes, for matrices whose columns have correlated entries.

>>> matrix = torch.zeros(3, 2, 5)  # three matrices of five columns with two numbers
>>> along = RotatedNormal(matrix, torch.ones(3, 5, 2), torch.eye(2).expand(3, 1, 2, 2), event_dim=2)
>>> along.batch_shape, along.event_shape, along.sample().shape
(torch.Size([3]), torch.Size([2, 5]), torch.Size([3, 2, 5]))
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


class RotatedNormal(dist.TorchDistribution):
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

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, basis: Tensor, *, stretch: Tensor | float = 1.0, event_dim: int) -> None:
        self.loc, self.scale, self.basis = loc, scale, basis
        self.stretch = torch.as_tensor(stretch, dtype=loc.dtype, device=loc.device).expand(loc.shape)
        batch = loc.dim() - event_dim
        super().__init__(loc.shape[:batch], loc.shape[batch:], validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> RotatedNormal:
        batch_shape, own = torch.Size(batch_shape), len(self.batch_shape)
        loc, scale, basis, stretch = (
            value.expand(*batch_shape, *value.shape[own:]) for value in (self.loc, self.scale, self.basis, self.stretch)
        )
        return RotatedNormal(loc, scale, basis, stretch=stretch, event_dim=self.event_dim)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        noise = torch.randn((*sample_shape, *self.scale.shape), dtype=self.loc.dtype, device=self.loc.device)
        rotated = (self.basis @ (self.scale * noise)[..., None])[..., 0]
        return self.loc + self.stretch * from_columns(rotated, self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        columns = to_columns((value - self.loc) / self.stretch)
        along_axes = (self.basis.mT @ columns[..., None])[..., 0]
        densities = dist.Normal(0.0, self.scale, validate_args=False).log_prob(along_axes)
        dims = self.event_dim
        log_stretch = self.stretch.abs().log()
        return densities.flatten(densities.dim() - dims).sum(-1) - log_stretch.flatten(log_stretch.dim() - dims).sum(-1)


def to_columns(matrix: Tensor) -> Tensor:
    """(..., a, b) -> (..., n, r): n columns of r numbers, where r is the shorter dimension."""
    return matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix


def from_columns(columns: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_columns``, for matrices of the shape of ``like``."""
    return columns.mT if like.shape[-2] <= like.shape[-1] else columns
