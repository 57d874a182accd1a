"""The hierarchical Normal with a random τ: τ is a sample site with its own prior, and a guide gives its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from bora_pyro.errors import InputError, check_one_of
from bora_pyro.priors.base import PerLatent
from bora_pyro.priors.hierarchical import whitened_deviation


class HalfCauchyPrecision(TorchDistribution):
    """The distribution of τ = σ⁻² where the standard deviation σ ~ HalfCauchy(s).

        >>> tau = HalfCauchyPrecision(scale=0.1, start=100.0)
        >>> tau.cdf(torch.tensor(100.0))  # σ = s = 0.1 is the median
        tensor(0.5000)
        >>> tau.mean
        tensor(100.)

    With dσ/dτ = −½ τ^(−3/2),

        p(τ) = 2 / (π s (1 + 1/(s² τ))) · ½ τ^(−3/2) = s / (π √τ (1 + s² τ)),

    so that s² τ ~ F(1, 1), the square of a Cauchy variable. It has no finite mean.

    Args:
        scale: s, the median of σ, positive; (*batch).
        start: initial value for inference, positive; it broadcasts against ``scale``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "scale": constraints.positive,
        "start": constraints.positive,
    }
    support = constraints.positive
    has_rsample = True

    def __init__(self, scale: Tensor | float, start: Tensor | float, *, validate_args: bool | None = None) -> None:
        self.scale, self.start = torch.distributions.utils.broadcast_all(scale, start)
        super().__init__(self.scale.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """A copy of ``start``: guides that start at the mean start there. The mean of the distribution is infinite."""
        return self.start.contiguous()

    def expand(self, batch_shape: torch.Size, _instance: TorchDistribution | None = None) -> HalfCauchyPrecision:
        return HalfCauchyPrecision(self.scale.expand(batch_shape), self.start.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.scale.dtype, device=self.scale.device)
        eps = torch.finfo(u.dtype).eps  # at the ends of the interval τ would be 0 or infinite
        return (torch.tan(0.5 * math.pi * u.clamp(eps, 1 - eps)) / self.scale).square()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.scale.log() - math.log(math.pi) - 0.5 * value.log() - torch.log1p(self.scale.square() * value)

    def cdf(self, value: Tensor) -> Tensor:
        """P(τ ≤ value) = (2/π) arctan(s √value)."""
        if self._validate_args:
            self._validate_sample(value)
        return 2 / math.pi * torch.atan(self.scale * value.sqrt())


class GammaPrecision(dist.Gamma):
    """τ ~ Gamma(½, s²/2): σ² = 1/τ is scaled-inverse-χ² with one degree of freedom and scale s².

    It carries the information of one observed deviation of size s.

        >>> tau = GammaPrecision(scale=0.1, start=50.0)
        >>> tau.concentration, tau.rate, tau.mean
        (tensor(0.5000), tensor(0.0050), tensor(50.))

    Args:
        scale: s, positive; (*batch).
        start: initial value for inference, positive; it broadcasts against ``scale``.
    """

    support = constraints.positive  # torch's support includes 0, where the density is infinite

    def __init__(self, scale: Tensor | float, start: Tensor | float, *, validate_args: bool | None = None) -> None:
        scale, self.start = torch.distributions.utils.broadcast_all(scale, start)
        super().__init__(torch.full_like(scale, 0.5), 0.5 * scale.square(), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """A copy of ``start``: guides that start at the mean start there. The mean of the distribution is s⁻²."""
        return self.start.contiguous()

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> GammaPrecision:
        scale = (2 * self.rate).sqrt()
        return GammaPrecision(scale.expand(batch_shape), self.start.expand(batch_shape), validate_args=False)


#: Distributions of τ by the name that a configuration gives them; each takes ``scale`` and ``start``.
HYPERPRIORS: dict[str, Callable[[Tensor, Tensor], TorchDistribution]] = {
    "half_cauchy": HalfCauchyPrecision,
    "gamma": GammaPrecision,
}
#: What can have its own random τ.
RANDOM_PER = ("site", "layer")


class RandomPrecision(PerLatent):
    """θ_d ~ Normal(Θ, I/τ) with p(Θ) ∝ 1 and a random τ: the sample site ``precision.<name>``.

        >>> import pyro
        >>> prior, start = RandomPrecision(per="layer", start=1000), torch.zeros(2, 3, 4)
        >>> prior
        RandomPrecision(hyperprior='half_cauchy', per='layer', scale=0.1, start=1000)
        >>> trace = pyro.poutine.trace(prior.sample_latent).get_trace("x", start, pyro.plate("tasks", 5, dim=-1))
        >>> trace.nodes["precision.x"]["value"].shape, trace.nodes["theta.x"]["value"].shape
        (torch.Size([2, 1, 1]), torch.Size([5, 2, 3, 4]))

    The deviations are θ_d − Θ = z_d/√τ with z_d ~ Normal(0, I), as in the non-centred
    :class:`~bora_pyro.priors.HierarchicalNormal`. ``half_cauchy`` is σ = τ^(−1/2) ~ HalfCauchy(scale) (Gelman, Bayesian Analysis,
    2006). It is nearly flat below its scale. Its heavy tail lets the data decide above the scale. Its density is positive at
    σ = 0, where all tasks are equal. ``gamma`` is the conjugate τ ~ Gamma(½, scale²/2). It is weak too, but it nearly excludes a
    σ far below its scale.

    The entries of LoRA's A are about 1/√in, 0.06 for 256 inputs. Tasks deviate by 0.01 to 0.1, which is a τ from 10⁴ to 100. The
    default scale of 0.1 is at the upper end of that range, so that the half-Cauchy is weak there.

    **Do not use it with MAP.** The mode of the joint density, which MAP finds, does not determine τ. With z as the sample site, a
    smaller τ gives the same deviation with a smaller ‖z‖. The density grows without bound as τ goes to 0, and tasks become
    independent. With θ_d as the sample site, the mode would be at θ_d = Θ with τ → ∞ under ``half_cauchy``. Use
    :class:`~bora_pyro.priors.LearnedPrecision` to find τ in a MAP fit; its τ is a good ``start``. The bound of a mean-field guide
    can be highest where the deviations keep their prior and τ is far too large. Compare its τ with the learned one.

    Args:
        hyperprior: the distribution of τ: ``half_cauchy`` or ``gamma``.
        per: what has its own τ: each ``site`` (a kind of layer and a factor, for example ``q_proj.lora_A``), a number; or each
            ``layer`` of each site, (layers, 1, ...).
        scale: order of magnitude of a deviation, in the unit of the weights; the median of σ with ``half_cauchy``.
        start: initial value of τ for inference; ``sites`` returns it too, because given weights do not determine τ.

    Raises:
        InputError: ``hyperprior`` or ``per`` is unknown, or ``scale`` or ``start`` is not positive and finite.
    """

    def __init__(self, hyperprior: str = "half_cauchy", per: str = "site", *, scale: float = 0.1, start: float = 100.0) -> None:
        check_one_of("hyperprior", hyperprior, HYPERPRIORS)
        check_one_of("per", per, RANDOM_PER)
        for name, number, default in (("scale", scale, 0.1), ("start", start, 100)):
            if not 0 < number < math.inf:
                raise InputError(f"{name} {number} is not allowed; give a finite number above 0, for instance {default}")
        self.hyperprior, self.per, self.scale, self.start = hyperprior, per, float(scale), float(start)

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        tau = self._start(start)
        hyperprior = HYPERPRIORS[self.hyperprior](torch.full_like(tau, self.scale), tau)
        # outside the plate of tasks: one τ for all tasks
        tau = pyro.sample(f"precision.{name}", hyperprior.to_event(tau.dim()))
        return whitened_deviation(name, start, tasks, tau**-0.5, mask)

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        tau = self._start(mean)
        return {
            f"precision.{name}": tau,
            f"prior_mean.{name}": mean,
            f"theta.{name}_decentered": tau**0.5 * (theta - mean),
        }

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._start(start) if sites is None else sites[f"precision.{name}"]

    def _start(self, like: Tensor) -> Tensor:
        """The initial τ; ``like`` is (layers, *shape)."""
        shape = (len(like),) + (1,) * (like.dim() - 1) if self.per == "layer" else ()
        return like.new_full(shape, self.start)

    def __repr__(self) -> str:
        numbers = f"scale={self.scale:g}, start={self.start:g}"
        return f"RandomPrecision(hyperprior={self.hyperprior!r}, per={self.per!r}, {numbers})"
