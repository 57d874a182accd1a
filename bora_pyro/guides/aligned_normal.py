"""A Normal over matrices whose axes are given for both sides: the product of axes of the longer and of the shorter side."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.guides.matrix_normal import MatrixNormal, to_columns


def scale_along(columns: Tensor, factor: Tensor, long: Tensor) -> Tensor:
    """Multiply columns by a factor along each axis of the longer side: U f Uᵀ x, plus f₀ times the part of x without an axis.

    Args:
        columns: x, (..., n, r).
        factor: f, (..., k, r); if k < n, f₀ is one row more.
        long: U, (..., n, k), orthonormal columns.
    """
    n, k = long.shape[-2:]
    coordinates = long.mT @ columns
    if k == n:
        return long @ (factor * coordinates)
    rest = factor[..., k:, :]
    return rest * columns + long @ ((factor[..., :k, :] - rest) * coordinates)


class AlignedNormal(MatrixNormal):
    """Normal(m, Σ) over matrices, where Σ is diagonal along the products of axes of the two sides.

        >>> long, short = torch.eye(3)[:, :1].expand(2, 3, 1), torch.eye(2).expand(2, 2, 2)
        >>> normal = AlignedNormal(torch.zeros(2, 2, 3), torch.ones(2, 2, 2), long, short, event_dim=3)
        >>> normal.log_prob(torch.zeros(2, 2, 3)) / math.log(2 * math.pi)  # twelve standard Normals
        tensor(-6.0000)

    Args:
        loc: m, (*batch, layers, a, b), with n = max(a, b) and r = min(a, b).
        scale: the standard deviation along each pair of axes, (*batch, layers, k, r). If k < n, there is one row more, for the
            directions of the longer side that have no axis.
        long: axes of the longer side as orthonormal columns, (layers, n, k).
        short: axes of the shorter side, (layers, r, r).
        stretch: a factor of each entry; it broadcasts against ``loc``.
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, long: Tensor, short: Tensor, *, stretch: Tensor | float = 1.0, event_dim: int
    ) -> None:
        self.scale, self.long, self.short = scale, long, short
        super().__init__(loc, stretch=stretch, event_dim=event_dim)

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> AlignedNormal:
        own = len(self.batch_shape)
        loc, scale, stretch = (value.expand(*batch_shape, *value.shape[own:]) for value in (self.loc, self.scale, self.stretch))
        return AlignedNormal(loc, scale, self.long, self.short, stretch=stretch, event_dim=self.event_dim)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        noise = torch.randn((*sample_shape, *to_columns(self.loc).shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.stretched(scale_along(noise, self.scale, self.long) @ self.short.mT)

    def log_prob(self, value: Tensor) -> Tensor:
        white = scale_along(self.columns_of(value) @ self.short, 1 / self.scale, self.long)
        n, k = self.long.shape[-2:]
        # the row without axes stands for n − k directions
        multiplicity = torch.tensor([1.0] * k + [float(n - k)] * (k < n), dtype=self.loc.dtype, device=self.loc.device)
        densities = -0.5 * (white.square() + math.log(2 * math.pi))
        return self.log_prob_of(densities, multiplicity[:, None] * self.scale.log())
