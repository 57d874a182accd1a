"""The base of guides that are computed around the MAP of a hierarchy: Θ of each latent, and the tasks given Θ."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.guides.base import tensor_key
from bora_pyro.model import BoRA


class AroundMap(AutoGuide):
    """A guide whose centre is the MAP, without anything to fit: a distribution of Θ, and one of each task's weights given Θ.

    A subclass defines both for one latent, in the units of the weights. Which sites have these values depends on the prior.
    Other sites of the prior (such as a random τ) stay fixed.

    Args:
        model: the BoRA model.
        sites: the MAP, as ``model.sites_given(theta, mean)`` returns it.

    Raises:
        InputError: the sites are not those of the model's prior, or the prior does not treat each latent separately.
    """

    def __init__(self, model: BoRA, sites: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        if not model.prior.per_latent:
            raise InputError(
                f"{type(self).__name__} needs a prior that treats each latent separately, not {model.prior}; use the guide normal"
            )
        self._sites = [*sites]
        for name, value in sites.items():
            self.keep("sites", name, value)
        theta, mean = model.weights_given(sites)
        if not _agree(model.sites_given(theta, mean), sites):
            raise InputError(f"sites do not belong to the prior {model.prior}; give model.sites_given(theta, mean)")
        for name in model.starts:
            self.keep("theta", name, theta[name])
            self.keep("prior_mean", name, mean[name])

    def keep(self, kind: str, name: str, value: Tensor) -> None:
        """Store a copy of a tensor in the guide's state."""
        self.register_buffer(tensor_key(kind, name), value.detach().clone(memory_format=torch.contiguous_format))

    def kept(self, kind: str, name: str) -> Tensor:
        """The tensor that ``keep`` stored."""
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
                # the site is an affine function of θ: its slope scales the standard deviations
                with tasks:
                    values[site] = pyro.sample(site, self.of_tasks(name, loc, tau, step[site] - loc))
            else:
                values[site] = pyro.sample(site, dist.Delta(sites[site], event_dim=sites[site].dim()))
        return values

    @abstractmethod
    def of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        """The distribution of Θ around ``mean``, (layers, *shape)."""

    @abstractmethod
    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        """How much the centre of θ_d moves when Θ is ``shift`` away from its own centre: (D, layers, *shape)."""

    @abstractmethod
    def of_tasks(self, name: str, loc: Tensor, tau: Tensor, slope: Tensor) -> dist.TorchDistribution:
        """The distribution of the tasks' site around ``loc``, given Θ; ``slope`` is the site's derivative with respect to θ."""

    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The MAP."""
        return {name: self.kept("sites", name) for name in self._sites}


def _agree(own: Mapping[str, Tensor], sites: Mapping[str, Tensor]) -> bool:
    return own.keys() == sites.keys() and all(torch.allclose(own[name], sites[name], rtol=1e-3, atol=1e-4) for name in own)


def start_sites(model: BoRA) -> dict[str, Tensor]:
    """The values of the sample sites at the start of the adapters."""
    starts = {name: start.expand(model.num_tasks, *start.shape) for name, start in model.starts.items()}
    return model.sites_given(starts, model.starts)
