"""The guide of a maximum a posteriori fit."""

from __future__ import annotations

from collections.abc import Mapping

from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides.base import init_to_sites
from bora_pyro.model import BoRA


def map_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
) -> AutoDelta:
    """Maximum a posteriori: a point mass at every site (``pyro.infer.autoguide.AutoDelta``).

        >>> import bora_pyro as bp, pyro
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> svi = SVI(model, map_guide(model), pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.0}), Trace_ELBO())
        >>> svi.step(split.batches()[0]) > 0
        True

    Args:
        model: the BoRA model.
        sites: initial values of the sample sites, as ``model.sites_given(theta, mean)`` returns them; they are copied. Default:
            the start of the adapters.
        data: not used; every :class:`~bora_pyro.guides.GuideBuilder` has this argument and the next two.
        scale: not used; a point mass has no standard deviation.
        temperature: not used; it is part of the objective.

    Raises:
        InputError: raised in the guide's first run, if a site has no value in ``sites`` or a value of another shape.
    """
    return AutoDelta(model, init_loc_fn=init_to_sites(sites), create_plates=getattr(model, "plates", None))
