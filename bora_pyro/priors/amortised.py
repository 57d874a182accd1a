"""The prior of ABMLL: each entry has a mean and a scale of its own, which all tasks share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.errors import InputError, check_one_of
from bora_pyro.priors.base import PerLatent, copies, event, flat
from bora_pyro.priors.scale_prior import POSITIVITIES, ScalePrior

#: Distributions of the global point (μ₀, σ₀) by the name that a configuration gives them.
GLOBAL_PRIORS = ("flat", "normal_gamma")


class AmortisedNormal(PerLatent):
    """θ_d ~ Normal(μ₀, σ₀²) with a mean μ₀ and a scale σ₀ for each entry, both shared by all tasks and learned as a point.

        >>> import pyro
        >>> prior, start = AmortisedNormal(scale=0.05), torch.zeros(2, 3, 4)
        >>> prior
        AmortisedNormal(scale=0.05)
        >>> trace = pyro.poutine.trace(prior.sample_latent).get_trace("x", start, pyro.plate("tasks", 5, dim=-1))
        >>> [(name, tuple(trace.nodes[name]["value"].shape)) for name in ("prior_mean.x", "prior_scale.x", "theta.x")]
        [('prior_mean.x', (2, 3, 4)), ('prior_scale.x', (2, 3, 4)), ('theta.x', (5, 2, 3, 4))]

    This is the prior of Amortized Bayesian Meta-Learning for LoRA (Zhang, Snell & Griffiths, 2025, arXiv 2508.14285) on the
    latents of the adapter. The paper has it on the elements of ΔW, with low-rank means and scales. It does not say which constant
    it adds to the scales, how they stay positive, or what p(μ₀, σ₀) is. These are the options here.

    **Do not use it with MAP.** With θ_d as a point the density grows without bound as σ₀ goes to 0 and θ_d to μ₀. The guide
    ``task_normal`` gives each task a Normal, and the bound is then finite. ``bora meta-fit`` fits the two by inner steps.

    Args:
        scale: σ₀ at the start, the same for every entry, in the unit of the weights: the paper's constant c, to which the learned
            part is added before ``positivity``. The default, 0.01, is a sixth of an entry of A at the start of LoRA with 256
            inputs: small enough that a draw hardly changes the base, and not so small that tasks could not differ.
        positivity: ``softplus``, σ = log(1 + exp u), or ``exp``: how a guide writes σ₀ as a real number u. Both are nearly the
            same for small scales. Softplus, the default, grows more slowly for large ones.
        learned: whether σ₀ is learned; otherwise it stays ``scale``. By default it is, as in the paper.
        global_prior: p(μ₀, σ₀). ``flat``, the default, is ∝ 1, as p(Θ) ∝ 1 is BoRA's: it adds no constant that nobody has given.
            ``normal_gamma`` is μ₀ ~ Normal(start, 1) and σ₀⁻² ~ Gamma(1, scale²), the family of Ravi & Beatson (2019), with
            constants that put the start in its middle.

    Raises:
        InputError: ``scale`` is not a finite number above 0, or a name is unknown.
    """

    def __init__(
        self, scale: float = 0.01, *, positivity: str = "softplus", learned: bool = True, global_prior: str = "flat"
    ) -> None:
        if not 0 < scale < math.inf:
            raise InputError(f"scale is {scale}; give a finite number above 0, for instance 0.01")
        check_one_of("positivity", positivity, POSITIVITIES)
        check_one_of("global_prior", global_prior, GLOBAL_PRIORS)
        self.scale, self.positivity, self.learned, self.global_prior = float(scale), positivity, learned, global_prior

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        dims, scales = start.dim(), torch.full_like(start, self.scale)
        of_mean = flat(start, dims, mask) if self._is_flat else event(dist.Normal(start, 1.0), dims, mask)
        mean = pyro.sample(f"prior_mean.{name}", of_mean)
        if self.learned:
            of_scale = ScalePrior(scales, precision=not self._is_flat, positivity=self.positivity)
            scales = pyro.sample(f"prior_scale.{name}", event(of_scale, dims, mask))
        with tasks:
            # copies of the mean: a guide makes parameters of them
            of_task = dist.Normal(copies(mean, start, tasks), copies(scales, start, tasks))
            return pyro.sample(f"theta.{name}", event(of_task, dims, mask, tasks))

    @property
    def _is_flat(self) -> bool:
        return self.global_prior == "flat"

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        scales = {f"prior_scale.{name}": torch.full_like(mean, self.scale)} if self.learned else {}
        return {f"prior_mean.{name}": mean} | scales | {f"theta.{name}": theta}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        if sites is None or not self.learned:
            return start.new_tensor(self.scale**-2)
        return sites[f"prior_scale.{name}"].square().reciprocal()

    def __repr__(self) -> str:
        options = ["positivity='exp'"] * (self.positivity == "exp") + ["learned=False"] * (not self.learned)
        options += [f"global_prior={self.global_prior!r}"] * (not self._is_flat)
        return f"AmortisedNormal({', '.join([f'scale={self.scale:g}', *options])})"
