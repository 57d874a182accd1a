"""A Normal for each task, and a point for what all tasks share: the guide of ABMLL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.distributions import biject_to
from torch.nn import Parameter

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import check_one_of
from bora_pyro.guides.base import SiteGuide, tensor_key
from bora_pyro.model import BoRA
from bora_pyro.priors.scale_prior import POSITIVITIES

#: The kinds of tensors: the centre of a site on the real line, and the scale of a task's site before positivity.
LOC, RAW_SCALE = "loc", "raw_scale"


class TaskNormalGuide(SiteGuide):
    """q(θ_d) = Normal(μ_d, σ_d²) at the sites inside the plate of tasks, and a point mass at all other sites.

        >>> import pyro, torch
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        ...     with pyro.plate("tasks", 2):
        ...         pyro.sample("x", dist.Normal(mean, 2.0).to_event(1))
        >>> guide = TaskNormalGuide(model)
        >>> trace = pyro.poutine.trace(guide).get_trace()
        >>> type(trace.nodes["mean"]["fn"]).__name__, trace.nodes["x"]["fn"].base_dist.scale.shape
        ('Delta', torch.Size([2, 3]))

    ``TraceMeanField_ELBO`` computes the KL divergence of the tasks from a Normal prior exactly. At a point mass the KL term is
    −log p of the point: Θ, and scales or precisions of the prior, are estimates, as in ABMLL (Zhang, Snell & Griffiths, 2025).
    Under the guide ``normal`` Θ has a spread too.

    Args:
        model: the BoRA model, or any other Pyro model with a plate ``tasks``.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        scale: the initial standard deviations σ_d, in units of the prior's.
        positivity: how σ_d is written as a real number, ``softplus`` or ``exp``.

    Raises:
        InputError: ``scale`` is not a finite number above 0, or ``positivity`` is unknown.
    """

    def __init__(
        self, model: Any, sites: Mapping[str, Tensor] | None = None, *, scale: float = 0.1, positivity: str = "softplus"
    ) -> None:
        check_one_of("positivity", positivity, POSITIVITIES)
        super().__init__(model, sites, scale=scale)
        self._positive = biject_to(POSITIVITIES[positivity])

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        self.put(LOC, name, centre, event_dim)
        if self.of_tasks(name):
            self.put(RAW_SCALE, name, self.raw(deviation).expand(centre.shape), event_dim)

    def raw(self, scale: Tensor) -> Tensor:
        """The real numbers that stand for scales."""
        return self._positive.inv(scale)

    def scale_of(self, raw: Tensor) -> Tensor:
        """The scales that real numbers stand for."""
        return self._positive(raw)

    def of_tasks(self, name: str) -> bool:
        """Whether a site is inside the plate of tasks, after the guide's first run."""
        return any(frame.name == "tasks" for frame in self.prototype_trace.nodes[name]["cond_indep_stack"])

    def parameter(self, kind: str, name: str) -> Parameter:
        """The parameter ``kind`` of the site ``name`` itself, which an optimiser changes."""
        return getattr(self, f"{tensor_key(kind, name)}_unconstrained")

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        loc, scale = self.get(LOC, name), self._positive(self.get(RAW_SCALE, name))
        return dist.Normal(loc, scale, validate_args=False).to_event(event_dim)

    def _posterior(
        self, name: str, prior: dist.TorchDistribution, values: Mapping[str, Tensor], plates: Mapping[str, pyro.plate]
    ) -> dist.TorchDistribution:
        if self.of_tasks(name):
            return super()._posterior(name, prior, values, plates)
        return dist.Delta(biject_to(prior.support)(self.get(LOC, name)), event_dim=prior.event_dim)


def task_normal_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    positivity: str = "softplus",
) -> TaskNormalGuide:
    """The guide as a :class:`~bora_pyro.guides.GuideBuilder`; ``data`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
    >>> guide = task_normal_guide(model, scale=0.1)
    >>> one, other = guide(split.batches()[0]), guide(split.batches()[0])
    >>> [bool((one[name] == other[name]).all()) for name in ("prior_mean.q_proj.lora_A", "theta.q_proj.lora_A_decentered")]
    [True, False]
    """
    return TaskNormalGuide(model, sites, scale=scale, positivity=positivity)
