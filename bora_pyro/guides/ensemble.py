"""The guide of a deep ensemble: a mixture of the point estimates of several fits, with equal weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, check_at_least
from bora_pyro.guides.base import SiteGuide, tensor_key
from bora_pyro.model import BoRA

#: Name of this guide in a run folder. It is not in ``GUIDES``: it is made of whole fits, and nothing of it is fitted.
ENSEMBLE = "ensemble"


class EnsembleGuide(SiteGuide):
    """(1/K) Σ_k δ(θ − θ⁽ᵏ⁾) for K estimates, the members: a deep ensemble (Lakshminarayanan et al., 2017).

        >>> import bora_pyro as bp
        >>> from bora_pyro.guides import make_parameters
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> guide = EnsembleGuide(model, members=3)
        >>> make_parameters(guide, model)
        >>> site = "prior_mean.q_proj.lora_B"
        >>> guide.give([{name: value + k for name, value in guide.median().items()} for k in range(3)])
        >>> [float(guide.member(k)[site].mean()) for k in (0, 1, 2, 3)]
        [0.0, 1.0, 2.0, 0.0]

    All sites of a draw are of one member. The members are buffers, because they come from fits of their own: the guide has no
    parameters. Its centre, ``median()``, is one of the members and not their mean. Members that were fitted from different starts
    have no common basis, so the mean of their matrices A and B is no useful adapter.

    Args:
        model: the BoRA model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        members: K, the number of members. They are copies of the centre until ``give`` is called.

    Raises:
        InputError: ``members`` is below 2.
    """

    def __init__(self, model: Callable[..., Any], sites: Mapping[str, Tensor] | None = None, *, members: int = 2) -> None:
        check_at_least("members", members, 2)
        super().__init__(model, sites)
        self.members = members

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        # the centre is stored as the values of the sites, so a run folder needs it once
        self.register_buffer(tensor_key("loc", name), centre.clone(), persistent=False)
        self.register_buffer(tensor_key("members", name), centre.expand(self.members, *centre.shape).clone())

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        return dist.Delta(self.get("loc", name), event_dim=event_dim)

    @torch.no_grad()
    def give(self, members: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the values of the sample sites of all members, as ``model.sites_given(theta, mean)`` returns them.

        Raises:
            InputError: there are not K of them.
        """
        if len(members) != self.members:
            raise InputError(f"{len(members)} members are given; the guide has {self.members}")
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            to_real = biject_to(site["fn"].support).inv
            self.get("members", name).copy_(torch.stack([to_real(values[name]) for values in members]))

    def member(self, number: int) -> dict[str, Tensor]:
        """The sample sites of member ``number``, from 0; after the last member the first one comes again."""
        sites = self.prototype_trace.iter_stochastic_nodes()
        row = number % self.members
        return {name: biject_to(site["fn"].support)(self.get("members", name)[row]) for name, site in sites}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw a member, each with the same probability."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates, values = self._create_plates(*args, **kwargs), dict[str, Tensor]()
        drawn = self.member(int(torch.randint(self.members, ())))
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value, event_dim = drawn[name], site["fn"].event_dim
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                    value = value.index_select(frame.dim - event_dim, plates[frame.name].indices.to(value.device))
                values[name] = pyro.sample(name, dist.Delta(value, event_dim=event_dim))
        return values


def ensemble_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    members: int = 2,
) -> EnsembleGuide:
    """A mixture of K point masses with equal weights (:class:`EnsembleGuide`).

    Args:
        model: the BoRA model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        data: not used.
        scale: not used; a point mass has no standard deviation.
        temperature: not used; the members have been fitted with theirs.
        members: K, the number of members.

    Raises:
        InputError: ``members`` is below 2.
    """
    return EnsembleGuide(model, sites, members=members)
