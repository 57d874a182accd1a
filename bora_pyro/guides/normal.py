"""The mean-field Normal guide: a mean and a standard deviation for every entry."""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides.base import SiteGuide
from bora_pyro.model import BoRA


class NormalGuide(SiteGuide):
    """q(x) = Normal(m, diag(s²)) at every site: Θ, each task's deviation, and the logarithm of a positive site.

        >>> import pyro, torch
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        >>> guide = NormalGuide(model)
        >>> pyro.poutine.trace(guide).get_trace().nodes["x"]["fn"].base_dist.scale
        tensor([0.2000, 0.2000, 0.2000], grad_fn=<ExpBackward0>)

    ``TraceMeanField_ELBO`` computes the KL divergence from a Normal prior exactly, and for a flat prior the entropy. In the
    non-centred form the deviations are in units of the prior's scale, so that s = 1 means that the documents of the task carry no
    information. A mean-field posterior is too narrow if entries are correlated (Turner & Sahani, 2011). Θ and the deviations are:
    the data determine Θ + δ_d better than Θ or δ_d.
    """

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        self.put("loc", name, centre, event_dim)
        self.put("log_scale", name, deviation.log().expand(centre.shape), event_dim)

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        return dist.Normal(self.get("loc", name), self.get("log_scale", name).exp(), validate_args=False).to_event(event_dim)


def normal_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
) -> NormalGuide:
    """The mean-field Normal as a :class:`~bora_pyro.guides.GuideBuilder`; ``data`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
    >>> draw = normal_guide(model, scale=0.1)(split.batches()[0])
    >>> draw["theta.q_proj.lora_A_decentered"].shape
    torch.Size([2, 4, 1, 256])
    """
    return NormalGuide(model, sites, scale=scale)
