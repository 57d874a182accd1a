"""The base of distributions over events of real numbers with a mean ``loc``.

>>> import torch
>>> class Point(RealEvents):
...     pass
>>> point = Point(torch.zeros(5, 2, 3), event_dim=2)
>>> point.batch_shape, point.event_shape, point.mean.shape
(torch.Size([5]), torch.Size([2, 3]), torch.Size([5, 2, 3]))
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor


class RealEvents(dist.TorchDistribution):
    """A distribution with the mean ``loc`` over events of real numbers of any shape.

    Args:
        loc: the mean, (*batch, *event).
        event_dim: number of event dimensions: the last ones of ``loc``.
        validate_args: as for every distribution of torch.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, *, event_dim: int, validate_args: bool | None = False) -> None:
        self.loc, batch = loc, loc.dim() - event_dim
        super().__init__(loc.shape[:batch], loc.shape[batch:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        return self.loc
