"""A hierarchy that penalises the norm of a deviation, not its square, as the released BoRA code does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import Gamma, TorchDistribution, constraints
from torch import Tensor

from bora_pyro.errors import InputError, check_one_of
from bora_pyro.priors.base import PerLatent, check_tau, copies, flat
from bora_pyro.priors.hierarchical import FORMS


class SphericalLaplace(TorchDistribution):
    """The density proportional to exp(−τ ‖x − μ‖₂) over the n entries of a vector, a matrix or any other tensor.

        >>> _ = torch.manual_seed(0)
        >>> matrices = SphericalLaplace(torch.zeros(5, 2, 3), 4.0, event_dim=2)  # five of 2 x 3
        >>> matrices.batch_shape, matrices.event_shape, matrices.sample().shape
        (torch.Size([5]), torch.Size([2, 3]), torch.Size([5, 2, 3]))

    p(x) = Γ(n/2) τⁿ / (2 π^(n/2) Γ(n)) exp(−τ ‖x − μ‖₂): the direction is uniform, and the radius ~ Gamma(n, τ). For n = 1 it is
    the Laplace distribution. The Bayesian group lasso has it as the prior of a group of coefficients (Raman et al., 2009).

    Args:
        loc: μ, (*batch, *event).
        rate: τ, positive; it broadcasts against the batch.
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"rate": constraints.positive}
    has_rsample = True

    def __init__(self, loc: Tensor, rate: Tensor | float, *, event_dim: int, validate_args: bool | None = None) -> None:
        batch_shape, event_shape = loc.shape[: loc.dim() - event_dim], loc.shape[loc.dim() - event_dim :]
        self.loc, self.entries = loc, math.prod(event_shape)
        self.rate = torch.as_tensor(rate, dtype=loc.dtype, device=loc.device).expand(batch_shape)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """(n + 1)/τ² in each entry: (*batch, *event)."""
        return self._of_entries((self.entries + 1) / self.rate.square()).expand(self.loc.shape)

    def expand(self, batch_shape: torch.Size, _instance: TorchDistribution | None = None) -> SphericalLaplace:
        batch_shape = torch.Size(batch_shape)
        loc, rate = self.loc.expand(*batch_shape, *self.event_shape), self.rate.expand(batch_shape)
        return SphericalLaplace(loc, rate, event_dim=self.event_dim, validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        direction = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        radius = Gamma(torch.full_like(self.rate, float(self.entries)), self.rate).rsample(sample_shape)
        return self.loc + self._of_entries(radius / self._norm(direction)) * direction

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        n = self.entries
        constant = math.lgamma(n / 2) - math.lgamma(n) - math.log(2) - 0.5 * n * math.log(math.pi)
        return n * self.rate.log() + constant - self.rate * self._norm(value - self.loc)

    def _norm(self, x: Tensor) -> Tensor:
        """‖x‖₂ over the event dimensions. Inference begins at x = 0; torch's gradient there is 0."""
        return torch.linalg.vector_norm(x.flatten(x.dim() - self.event_dim), dim=-1) if self.event_dim else x.abs()

    def _of_entries(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *[1] * self.event_dim)


def standard_spherical_laplace(start: Tensor, mask: Tensor | None = None) -> TorchDistribution:
    """A SphericalLaplace around 0 for each layer of ``start`` (layers, *shape); every entry has the standard deviation 1.

    >>> standard_spherical_laplace(torch.zeros(4, 2, 3)).base_dist.rate  # √(n + 1)
    tensor([2.6458, 2.6458, 2.6458, 2.6458])

    Raises:
        InputError: there is a mask: the norm of a matrix has no part for each entry.
    """
    if mask is not None:
        raise InputError("a penalty of norms has no inactive entries; use penalty normal with an adapter that masks entries")
    rate = math.sqrt(start[0].numel() + 1)
    return SphericalLaplace(torch.zeros_like(start), rate, event_dim=start.dim() - 1).to_event(1)


class HierarchicalNorm(PerLatent):
    """p(θ_d | Θ) ∝ exp(−τ Σ ‖θ_d − Θ‖₂), summed over matrices, with p(Θ) ∝ 1.

        >>> HierarchicalNorm(tau=500)
        HierarchicalNorm(tau=500)

    The sum has one term for A and one for B of each layer. This is the penalty of the released BoRA code. Its ``reg_weight``
    multiplies the sum of norms without a factor ½, so ``reg_weight`` is this τ. The penalty differs from the paper's equation 6,
    whose exponent −τ/2 ‖θ_d − Θ‖² has the squared norm. The gradient of a norm is as large for a small deviation as for a large
    one. As in the group lasso, matrices that differ much are therefore shrunk little, and the others are held at Θ.

    τ is not the precision of :class:`HierarchicalNormal`: in a matrix of n entries, an entry's deviation has the standard
    deviation √(n + 1)/τ. A Normal of precision τ' has about the same width for τ = √((n + 1) τ').

    Args:
        tau: τ, positive and finite. With a large τ tasks share much.
        form: ``noncentered`` samples the deviation in units of its standard deviation; ``centered`` samples θ_d itself, as
            the released code does. Both are the same model.

    Raises:
        InputError: τ is 0, infinite, negative or not a number, or the form is unknown.
    """

    penalty = "norm"

    def __init__(self, tau: float = 500.0, form: str = "noncentered") -> None:
        check_one_of("form", form, FORMS)
        check_tau(tau)
        if tau == 0 or math.isinf(tau):
            limit = "Independent()" if tau == 0 else "Pooled()"
            raise InputError(f"tau={tau} is a limit of HierarchicalNorm; use {limit}")
        self.tau, self.form = float(tau), form

    def scale(self, start: Tensor) -> float:
        """√(n + 1)/τ, the standard deviation of an entry's deviation; ``start`` (layers, *shape) has n entries per layer."""
        return math.sqrt(start[0].numel() + 1) / self.tau

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        prior_mean, matrix = pyro.sample(f"prior_mean.{name}", flat(start, start.dim(), mask)), start.dim() - 1
        with tasks:
            if self.form == "centered" and mask is None:
                mean = copies(prior_mean, start, tasks)
                return pyro.sample(f"theta.{name}", SphericalLaplace(mean, self.tau, event_dim=matrix).to_event(1))
            scale = self.scale(start)
            deviation = pyro.sample(f"theta.{name}_decentered", standard_spherical_laplace(start, mask))
            return pyro.deterministic(f"theta.{name}", prior_mean + scale * deviation, event_dim=start.dim())

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        if self.form == "centered":
            return super().sites_of(name, theta, mean)
        return {f"prior_mean.{name}": mean, f"theta.{name}_decentered": (theta - mean) / self.scale(mean)}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return start.new_tensor(self.scale(start) ** -2)

    def __repr__(self) -> str:
        form = "" if self.form == "noncentered" else f", form={self.form!r}"
        return f"HierarchicalNorm(tau={self.tau:g}{form})"
