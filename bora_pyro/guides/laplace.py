"""Laplace's approximation of the hierarchy: a Normal around the MAP whose precision is the curvature there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, shown
from bora_pyro.guides.around_map import AroundMap, start_sites
from bora_pyro.guides.curvature import diagonal_fisher
from bora_pyro.guides.held_out import HeldOut, positive_numbers
from bora_pyro.model import BoRA, Weights

#: The smallest precision. With a flat prior and no documents the precision would be 0.
LEAST = 1.0


@dataclass(frozen=True)
class Coordinates:
    """Values of a latent along directions in which its curvature is diagonal.

    Attributes:
        values: (D, *any).
        curvature: h along the same directions, of the same shape.
        share: how many directions one of these stands for, 1 or a fraction: some coordinates are not independent of each other.
    """

    values: Tensor
    curvature: Tensor
    share: float = 1.0


class LaplaceGuide(AroundMap):
    """The Normal posterior of a hierarchy whose log-likelihood has the diagonal curvature h around the MAP.

    Each entry is a separate linear-Gaussian hierarchy, with τ from the prior and h_d from the documents of task d. Its posterior
    is known exactly. With Θ̂ and θ̂ the MAP,

        Θ ~ Normal(Θ̂, 1 / Σ_d (1/τ + 1/h_d)⁻¹),
        θ_d | Θ ~ Normal(θ̂_d + τ/(τ + h_d) (Θ − Θ̂), 1/(τ + h_d)).

    Θ and the tasks are drawn jointly, and no scale is fitted. With a linear-Gaussian likelihood the guide is the exact posterior.
    With a language model, h approximates the Hessian (:func:`laplace_guide`). A prior that is not Normal is replaced by the
    Normal prior with the same precision. Other sites of the prior (such as a random τ) stay fixed. No standard deviation exceeds
    1, not even with a flat prior and no documents.

    Args:
        model: the BoRA model.
        sites: the MAP, as ``model.sites_given(theta, mean)`` returns it.
        curvature: h, (D, layers, *shape) by latent, not negative.
        draw_mean: whether Θ is drawn with the tasks. If not, it stays at Θ̂, and only the deviations of the tasks are drawn
            (empirical Bayes). Θ has a flat prior, and adapters have more entries than there are tokens for, so that the draws of
            Θ are very wide.
        temperatures: temperatures that held-out documents choose from (:meth:`settle`), as numbers or as a text with commas; none
            leaves the curvature as it is.

    Raises:
        InputError: a latent has no curvature or one of another shape; the sites are not those of the model's prior; or the prior
            does not treat each latent separately.
    """

    def __init__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor],
        curvature: Mapping[str, Any],
        *,
        draw_mean: bool = True,
        temperatures: str | Sequence[float] = (),
    ) -> None:
        super().__init__(model, sites)
        self.draw_mean = draw_mean
        self.temperatures = positive_numbers("temperatures", temperatures) if temperatures else []
        for name in model.starts:
            self.begin(name, curvature)

    def begin(self, name: str, curvature: Mapping[str, Any]) -> None:
        """Check and store the curvature of a latent."""
        shape = (self.model.num_tasks, *self.model.starts[name].shape)
        if name not in curvature or curvature[name].shape != shape:
            found = f"of shape {tuple(curvature[name].shape)}" if name in curvature else "missing"
            raise InputError(f"the curvature of {name!r} is {found}; give shape {shape}, as diagonal_fisher does")
        self.keep("curvature", name, curvature[name])

    def of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        """The distribution of Θ around ``mean``, (layers, *shape); a point if Θ is not drawn."""
        return self.normal_of_mean(name, mean, tau) if self.draw_mean else dist.Delta(mean, event_dim=mean.dim())

    def normal_of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        """The posterior of Θ around ``mean``, (layers, *shape)."""
        precision = (1 / (1 / tau + 1 / self.kept("curvature", name))).sum(0).clamp(min=LEAST)
        return dist.Normal(mean, precision**-0.5, validate_args=False).to_event(mean.dim())

    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        """How much the centre of θ_d moves when Θ is ``shift`` away from its own centre: (D, layers, *shape)."""
        h = self.kept("curvature", name)
        return torch.where(tau + h > 0, tau / (tau + h), 0.0) * shift

    def of_tasks(self, name: str, loc: Tensor, tau: Tensor, slope: Tensor) -> dist.TorchDistribution:
        """The distribution of the tasks' site around ``loc``, given Θ; ``slope`` is the site's derivative with respect to θ."""
        scale = slope * (tau + self.kept("curvature", name)).clamp(min=LEAST) ** -0.5
        return dist.Normal(loc, scale, validate_args=False).to_event(loc.dim() - 1)

    def tau(self, name: str) -> Tensor:
        """τ of a latent, which broadcasts against (D, layers, *shape)."""
        return self.model.prior.precision(name, self.model.starts[name], self.median())

    def deviation(self, name: str) -> Tensor:
        """θ̂_d − Θ̂ of a latent, (D, layers, *shape)."""
        return self.kept("theta", name) - self.kept("prior_mean", name)

    def estimate(self) -> Weights:
        """θ̂ of all tasks, (D, layers, *shape) by name of the latent."""
        return {name: self.kept("theta", name) for name in self.model.starts}

    def integrates_mean(self, name: str) -> bool:
        """Whether Θ of a latent is unknown, with a flat prior."""
        return f"prior_mean.{name}" in self._sites

    def coordinates(self, name: str, values: Tensor) -> list[Coordinates]:
        """Values of a latent, (D, layers, *shape), along the directions in which its curvature is diagonal."""
        return [Coordinates(values, self.kept("curvature", name))]

    def temper(self, temperature: float) -> None:
        """Divide the curvature by a temperature."""
        for name in self.model.starts:
            self.kept("curvature", name).div_(temperature)

    def settle(self, held_out: HeldOut) -> dict[str, Any]:
        """Choose the temperature with the lowest held-out loss of the mixture of draws; the first one of several."""
        if not self.temperatures or not held_out.tokens.sum():
            return {}
        losses, now = [], 1.0
        for temperature in self.temperatures:
            self.temper(temperature / now)
            now = temperature
            losses.append(float(held_out.nll().sum() / held_out.tokens.sum()))
        best = self.temperatures[losses.index(min(losses))]
        self.temper(best / now)
        return {"temperature": best, "temperatures": dict(zip(map(str, self.temperatures), losses, strict=True))}


def laplace_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    draw_mean: bool = True,
    temperatures: str | Sequence[float] = "",
) -> LaplaceGuide:
    """Laplace's approximation with h the diagonal of the empirical Fisher information, Σ_n (∇ log p(w_n | θ̂_d))².

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
        >>> point = bp.fit(model, data, epochs=1)
        >>> bool(laplace_guide(model, point.sites(), data=data).kept("curvature", "q_proj.lora_B").max() > 0)
        True

    It takes one pass over the training documents, with one gradient per document. Nothing is fitted afterwards.

    Args:
        model: the BoRA model.
        sites: the MAP; default: the start of the adapters.
        data: the documents of the fit. Without them h is 0, and the guide is the prior around the MAP.
        scale: not used; the standard deviations follow from the curvature.
        temperature: h is divided by it. Below 1 the prior has less weight against the likelihood, as in a tempered ELBO.
        draw_mean: as for :class:`LaplaceGuide`.
        temperatures: as for :class:`LaplaceGuide`, in place of ``temperature``.

    Raises:
        InputError: both ``temperature`` and ``temperatures`` are given.
    """
    check_temperatures(temperature, temperatures)
    sites = start_sites(model) if sites is None else sites
    theta, _ = model.weights_given(sites)
    if data is None:
        fisher = {name: torch.zeros_like(value) for name, value in theta.items()}
    else:
        fisher = diagonal_fisher(model, theta, data.train)
    curvature = {name: value / temperature for name, value in fisher.items()}
    return LaplaceGuide(model, sites, curvature, draw_mean=draw_mean, temperatures=temperatures)


def check_temperatures(temperature: float, temperatures: str | Sequence[float]) -> None:
    """Check that a temperature is either given or chosen."""
    if temperatures and temperature != 1:
        raise InputError(f"temperature is {temperature:g} and temperatures are {shown(temperatures)}; leave one of them out")
