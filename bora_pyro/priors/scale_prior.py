"""The distribution of the scales σ₀ of a prior, when they are learned as a point.

>>> ScalePrior(torch.full((2,), 0.01)).mean
tensor([0.0100, 0.0100])
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

#: How a positive number is written as a real one, by the name that a configuration gives it. A guide reads it from the support.
POSITIVITIES: dict[str, Any] = {"softplus": constraints.softplus_positive, "exp": constraints.positive}


class ScalePrior(TorchDistribution):
    """p(σ₀) ∝ 1 for each entry; or, with ``precision``, σ₀⁻² ~ Gamma(1, s²), whose mean is s⁻², where s is ``start``.

        >>> scale = torch.tensor([0.1, 0.2])
        >>> ScalePrior(scale).log_prob(torch.tensor([3.0, 4.0]))
        tensor([0., 0.])
        >>> ScalePrior(scale, precision=True).log_prob(scale)  # log 2 − log s − 1
        tensor([1.9957, 1.3026])

    With λ = σ⁻² and |dλ/dσ| = 2 σ⁻³ the second density is 2 s² σ⁻³ exp(−s² σ⁻²). It is a density of σ, so a point estimate is its
    mode as a density of σ.

    Args:
        start: s, where inference begins, positive, (*batch).
        precision: whether the precision has a Gamma distribution.
        positivity: one of ``POSITIVITIES``: how a guide writes σ₀ as a real number.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"start": constraints.positive}
    has_rsample = True

    def __init__(
        self, start: Tensor, *, precision: bool = False, positivity: str = "softplus", validate_args: bool | None = None
    ) -> None:
        self.start, self.precision, self.positivity = start, precision, positivity
        super().__init__(start.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        return POSITIVITIES[self.positivity]

    @property
    def mean(self) -> Tensor:
        """A copy of ``start``: guides that start at the mean start there. Neither distribution has a mean."""
        return self.start.clone(memory_format=torch.contiguous_format)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> ScalePrior:
        start = self.start.expand(batch_shape)
        return ScalePrior(start, precision=self.precision, positivity=self.positivity, validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """A draw; ``start`` itself where the distribution is improper."""
        if not self.precision:
            return self.start.expand(self._extended_shape(sample_shape))
        return dist.Gamma(torch.ones_like(self.start), self.start.square()).rsample(sample_shape).rsqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if not self.precision:
            return torch.zeros_like(value)
        ratio = self.start / value
        return torch.log(2 * ratio.square() / value) - ratio.square()
