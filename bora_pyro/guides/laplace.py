"""Laplace's approximation of the hierarchy: a Normal around the MAP whose precision is the curvature there."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.base import tensor_key
from bora_pyro.guides.curvature import diagonal_fisher
from bora_pyro.model import BoRA, Weights

#: The least precision: where the prior is flat and the data say nothing, the posterior would have none.
LEAST = 1.0


class LaplaceGuide(AutoGuide):
    """The Normal posterior of a hierarchy whose log-likelihood has the diagonal curvature h around the MAP.

    Each entry is a linear-Gaussian hierarchy of its own, with τ from the prior and h_d from task d's documents. Its posterior
    is known exactly: with Θ̂ and θ̂ the MAP,

        Θ ~ Normal(Θ̂, 1 / Σ_d (1/τ + 1/h_d)⁻¹),
        θ_d | Θ ~ Normal(θ̂_d + τ/(τ + h_d) (Θ − Θ̂), 1/(τ + h_d)),

    so Θ and the tasks are drawn together, as they depend on each other, and no scale is fitted. For a linear-Gaussian likelihood
    it is the posterior itself; for a language model h is a stand-in for the Hessian (:func:`laplace_guide`). A prior that is not
    Normal counts as the Normal of its precision; what a prior samples beside Θ and θ (a τ) is held where it is. Where the prior
    is flat and the documents say nothing, no standard deviation exceeds 1.

    Args:
        model: the BoRA model.
        sites: the MAP, as ``model.sites_given(theta, mean)`` gives it.
        curvature: h, (D, layers, *shape) by latent, not negative.

    Raises:
        InputError: a latent without curvature, or one of another shape.
    """

    def __init__(self, model: BoRA, sites: Mapping[str, Tensor], curvature: Weights) -> None:
        super().__init__(model)
        if not model.prior.per_latent:
            raise InputError(
                f"{type(self).__name__} needs a prior that treats each latent by itself, not {model.prior}; use the guide normal"
            )
        self._sites = [*sites]
        for name, value in sites.items():
            self.keep("sites", name, value)
        theta, mean = model.weights_given(sites)
        if not _agree(model.sites_given(theta, mean), sites):
            raise InputError(f"the sites are not those of {model.prior} for their θ and Θ; give model.sites_given(theta, mean)")
        for name in model.starts:
            self.keep("theta", name, theta[name])
            self.keep("prior_mean", name, mean[name])
            self.begin(name, curvature)

    def begin(self, name: str, curvature: Weights) -> None:
        """Check and keep the curvature of a latent."""
        shape = (self.model.num_tasks, *self.model.starts[name].shape)
        if name not in curvature or curvature[name].shape != shape:
            found = f"of shape {tuple(curvature[name].shape)}" if name in curvature else "missing"
            raise InputError(f"the curvature of {name!r} is {found}; give {shape}, as diagonal_fisher does")
        self.keep("curvature", name, curvature[name])

    def keep(self, kind: str, name: str, value: Tensor) -> None:
        """Keep a tensor as a part of the guide's state."""
        self.register_buffer(tensor_key(kind, name), value.detach().clone(memory_format=torch.contiguous_format))

    def kept(self, kind: str, name: str) -> Tensor:
        """What ``keep`` has kept."""
        return getattr(self, tensor_key(kind, name))

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw every site: Θ of each latent, then the tasks given Θ."""
        values: dict[str, Tensor] = {}
        tasks = pyro.plate("tasks", self.model.num_tasks, dim=-1)
        for name, start in self.model.starts.items():
            values |= self._draw(name, start, tasks)
        return {name: values[name] for name in self._sites}

    def _draw(self, name: str, start: Tensor, tasks: pyro.plate) -> dict[str, Tensor]:
        theta, mean, sites = self.kept("theta", name), self.kept("prior_mean", name), self.median()
        prior, values = self.model.prior, {}
        tau = prior.precision(name, start, sites)
        own, site_of_mean, drawn = prior.sites({name: theta}, {name: mean}), f"prior_mean.{name}", mean
        if site_of_mean in own:
            drawn = values[site_of_mean] = pyro.sample(site_of_mean, self.of_mean(name, mean, tau))
        given = theta + self.follow(name, drawn - mean, tau)
        centre, step = (prior.sites({name: value}, {name: drawn}) for value in (given, given + 1))
        for site, loc in centre.items():
            if site == site_of_mean:
                continue
            if loc.shape == theta.shape:
                # the site is an affine function of θ: its slope takes the deviations there
                with tasks:
                    values[site] = pyro.sample(site, self.of_tasks(name, loc, tau, step[site] - loc))
            else:
                values[site] = pyro.sample(site, dist.Delta(sites[site], event_dim=sites[site].dim()))
        return values

    def of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        """The distribution of Θ around ``mean``, (layers, *shape)."""
        precision = (1 / (1 / tau + 1 / self.kept("curvature", name))).sum(0).clamp(min=LEAST)
        return dist.Normal(mean, precision**-0.5, validate_args=False).to_event(mean.dim())

    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        """How far the tasks go with Θ when it is drawn ``shift`` away from its centre: (D, layers, *shape)."""
        h = self.kept("curvature", name)
        return torch.where(tau + h > 0, tau / (tau + h), 0.0) * shift

    def of_tasks(self, name: str, loc: Tensor, tau: Tensor, slope: Tensor) -> dist.TorchDistribution:
        """The distribution of the tasks' site around ``loc``, given Θ; ``slope`` is the derivative of the site by θ."""
        scale = slope * (tau + self.kept("curvature", name)).clamp(min=LEAST) ** -0.5
        return dist.Normal(loc, scale, validate_args=False).to_event(loc.dim() - 1)

    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The MAP."""
        return {name: self.kept("sites", name) for name in self._sites}


def _agree(own: Mapping[str, Tensor], sites: Mapping[str, Tensor]) -> bool:
    return own.keys() == sites.keys() and all(torch.allclose(own[name], sites[name], rtol=1e-3, atol=1e-4) for name in own)


def start_sites(model: BoRA) -> dict[str, Tensor]:
    """The sites where the adapters start."""
    starts = {name: start.expand(model.num_tasks, *start.shape) for name, start in model.starts.items()}
    return model.sites_given(starts, model.starts)


def laplace_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
) -> LaplaceGuide:
    """Laplace's approximation with h the diagonal of the empirical Fisher information, Σ_n (∇ log p(w_n | θ̂_d))².

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
        >>> point = bp.fit(model, data, epochs=1)
        >>> bool(laplace_guide(model, point.sites(), data=data).kept("curvature", "q_proj.lora_B").max() > 0)
        True

    One pass over the training documents with a gradient each; nothing is fitted afterwards.

    Args:
        model: the BoRA model.
        sites: the MAP; default: where the adapters start.
        data: the documents of the fit. Without them h is 0: the prior around the MAP.
        scale: of no use here, the curvature says it.
        temperature: h is divided by it: below 1 the likelihood counts more than the prior, as with the KL term of an ELBO.
    """
    sites = start_sites(model) if sites is None else sites
    theta, _ = model.weights_given(sites)
    if data is None:
        return LaplaceGuide(model, sites, {name: torch.zeros_like(value) for name, value in theta.items()})
    fisher = diagonal_fisher(model, theta, data.train)
    return LaplaceGuide(model, sites, {name: value / temperature for name, value in fisher.items()})
