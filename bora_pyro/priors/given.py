"""A hierarchy with known mean and precision: the prior of a new task, which was not part of the fit that learned them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from bora_pyro.errors import InputError, check_one_of, nearest
from bora_pyro.priors.base import PerLatent, StandardNormal, copies, event, flat
from bora_pyro.priors.norm import standard_spherical_laplace

#: Prefix of the names of Θ in the state of the prior.
MEAN = "tau.mean."
#: τ multiplies half the squared deviation, or the norm of the deviation.
PENALTIES = ("normal", "norm")


class Given(PerLatent):
    """θ_d ~ Normal(Θ, I/τ) with Θ and τ given: equation 6 of the BoRA paper for a new task.

        >>> prior = Given({"q_proj.lora_A": torch.zeros(2, 4, 8)}, {"q_proj.lora_A": torch.tensor(100.0)})
        >>> prior
        Given(1 latents, tau=100)

    Tasks are independent under this prior, so one task is enough. With τ = 0 the prior is flat, p(θ_d) ∝ 1, and inference begins
    at Θ. With τ = ∞, θ_d is Θ and there is nothing to infer.

    Args:
        means: Θ by latent, (layers, *shape).
        precisions: τ by latent: a number, or a tensor that broadcasts against (layers, *shape). With penalty ``norm`` it is the
            precision of the Normal with the same variance, as :meth:`~bora_pyro.priors.HierarchicalNorm.precision` returns it.
        penalty: ``normal``, or ``norm`` for the density of :class:`~bora_pyro.priors.HierarchicalNorm` around Θ.

    Raises:
        InputError: ``means`` and ``precisions`` have different names; a τ is negative or not a number, or only some of its
            entries are 0 or infinite; the penalty is unknown.
    """

    least_tasks = 1

    def __init__(self, means: Mapping[str, Tensor], precisions: Mapping[str, Tensor], *, penalty: str = "normal") -> None:
        check_one_of("penalty", penalty, PENALTIES)
        self.penalty = penalty
        if means.keys() != precisions.keys():
            name = min(means.keys() ^ precisions.keys())
            raise InputError(
                f"latent {name!r} has a mean or a precision, but not both{nearest(name, means.keys() & precisions.keys())}"
            )
        self.centres = {name: value.detach() for name, value in means.items()}
        self.tau = {name: torch.as_tensor(value).detach() for name, value in precisions.items()}
        for name, tau in self.tau.items():
            limits = (tau == 0) | tau.isinf()
            if bool(tau.isnan().any() | (tau < 0).any() | (limits.any() & ~(tau == tau.flatten()[0]).all())):
                raise InputError(
                    f"the precision of {name!r} runs from {tau.min():g} to {tau.max():g}; give numbers above 0, or 0 or inf "
                    "for all entries"
                )

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        mean, tau = self.centres[name].to(start), self.tau[name].to(start)
        if bool(tau.isinf().all()):
            return copies(mean, start, tasks)
        with tasks:
            if bool((tau == 0).all()):
                return pyro.sample(f"theta.{name}", flat(copies(mean, start, tasks), start.dim(), mask, tasks))
            if self.penalty == "norm":
                white = standard_spherical_laplace(start, mask)
            else:
                white = event(StandardNormal(torch.zeros_like(start), torch.ones_like(start)), start.dim(), mask, tasks)
            deviation = pyro.sample(f"theta.{name}_decentered", white)
            return pyro.deterministic(f"theta.{name}", mean + tau**-0.5 * deviation, event_dim=start.dim())

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return self.centres[name].to(theta)

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        tau = self.tau[name].to(theta)
        if bool(tau.isinf().all()):
            return {}
        if bool((tau == 0).all()):
            return {f"theta.{name}": theta}
        return {f"theta.{name}_decentered": tau**0.5 * (theta - self.centres[name].to(theta))}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.tau[name].to(start)

    def state(self) -> dict[str, Tensor]:
        return {f"tau.{name}": value for name, value in self.tau.items()} | {
            f"{MEAN}{name}": value for name, value in self.centres.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name in self.centres:
            self.tau[name] = state.get(f"tau.{name}", self.tau[name])
            self.centres[name] = state.get(f"{MEAN}{name}", self.centres[name])

    def __repr__(self) -> str:
        logs = [value.float().log().mean() for value in self.tau.values()]
        own = [value for value in logs if value < math.inf] or logs  # latents that all tasks share have an infinite τ
        tau = torch.stack(own).mean().exp() if own else 0.0
        penalty = "" if self.penalty == "normal" else f", penalty={self.penalty!r}"
        return f"Given({len(self.centres)} latents, tau={float(tau):g}{penalty})"
