"""A skewed Normal with tails of its own, for a single number such as log τ."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform


class SinhArcsinh(Transform):
    """y = (sinh(t (asinh z + e)) − sinh(t e)) / (t cosh(t e)), with skewness e and tails t (Jones and Pewsey, 2009).

        >>> SinhArcsinh(torch.tensor(0.0), torch.tensor(1.0))(torch.tensor(2.0))  # the identity
        tensor(2.)
        >>> SinhArcsinh(torch.tensor(0.5), torch.tensor(1.5))(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([-1.4212,  0.0000,  4.3147])

    It is standardised so that 0 goes to 0 with slope 1: the median, and the scale there, stay as they are. With e > 0 the upper
    tail is the longer one. If z is Normal, y has the tails of exp(−|y|^(2/t)/2). At t = 2 they are those of an exponential
    distribution.

    Args:
        skew: e.
        tail: t, above 0.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, skew: Tensor, tail: Tensor) -> None:
        super().__init__()
        self.skew, self.tail = skew, tail

    def _call(self, x: Tensor) -> Tensor:
        centre = self.tail * self.skew
        return (torch.sinh(self.tail * (torch.asinh(x) + self.skew)) - torch.sinh(centre)) / (self.tail * torch.cosh(centre))

    def _inverse(self, y: Tensor) -> Tensor:
        centre = self.tail * self.skew
        return torch.sinh(torch.asinh(y * self.tail * torch.cosh(centre) + torch.sinh(centre)) / self.tail - self.skew)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        rise = torch.cosh(self.tail * (torch.asinh(x) + self.skew)).log() - torch.cosh(self.tail * self.skew).log()
        return rise - 0.5 * torch.log1p(x.square())

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, SinhArcsinh) and torch.equal(self.skew, other.skew) and torch.equal(self.tail, other.tail)


def skewed_normal(loc: Tensor, scale: Tensor, skew: Tensor, tail: Tensor) -> dist.TransformedDistribution:
    """loc + scale · y with y the :class:`SinhArcsinh` of a standard Normal; the median is ``loc``."""
    base = dist.Normal(torch.zeros_like(loc), torch.ones_like(scale), validate_args=False)
    return dist.TransformedDistribution(base, [SinhArcsinh(skew, tail), dist.transforms.AffineTransform(loc, scale)])
