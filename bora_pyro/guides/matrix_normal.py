"""The base of Normals over matrices whose axes are not the entries: a mean, a factor of each entry, and a matrix as columns.

>>> to_columns(torch.zeros(2, 5)).shape, to_columns(torch.zeros(5, 2)).shape
(torch.Size([5, 2]), torch.Size([5, 2]))
"""

from __future__ import annotations

import torch
from torch import Tensor

from bora_pyro.priors.real_events import RealEvents


class MatrixNormal(RealEvents):
    """The law of x = m + stretch · y, where y is a Normal with mean 0 over matrices, which a subclass defines.

    The last two dimensions of an event are a matrix, read as n columns of r numbers, where r is the shorter dimension.

    Args:
        loc: m, (*batch, *event).
        stretch: a factor of each entry; it broadcasts against ``loc``.
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    def __init__(self, loc: Tensor, *, stretch: Tensor | float, event_dim: int) -> None:
        super().__init__(loc, event_dim=event_dim)
        self.stretch = torch.as_tensor(stretch, dtype=loc.dtype, device=loc.device).expand(loc.shape)

    def stretched(self, columns: Tensor) -> Tensor:
        """x for the columns of y, (*sample, *batch, *event[:-2], n, r)."""
        return self.loc + self.stretch * from_columns(columns, self.loc)

    def columns_of(self, value: Tensor) -> Tensor:
        """The columns of y for a value of x: the inverse of ``stretched``."""
        return to_columns((value - self.loc) / self.stretch)

    def log_prob_of(self, densities: Tensor, *others: Tensor) -> Tensor:
        """The log-density of x: log-densities by column and axis, minus ``others`` and log |stretch|, summed over each event."""
        found, *less = (
            each.flatten(each.dim() - self.event_dim).sum(-1) for each in (densities, self.stretch.abs().log(), *others)
        )
        return found - sum(less)


def to_columns(matrix: Tensor) -> Tensor:
    """(..., a, b) -> (..., n, r): n columns of r numbers, where r is the shorter dimension."""
    return matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix


def from_columns(columns: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_columns``, for matrices of the shape of ``like``."""
    return columns.mT if like.shape[-2] <= like.shape[-1] else columns
