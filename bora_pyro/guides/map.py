"""Maximum a posteriori."""

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
        sites: where the sites begin, as ``model.sites_given(theta, mean)`` gives them; they are copied. Default: where the
            adapters start.
        data: not needed; nor are the two below: every :class:`~bora_pyro.guides.GuideBuilder` has them.
        scale: a point has none.
        temperature: the objective has it.

    Raises:
        InputError: when the guide is first run, a site that has no value there or one of another shape.
    """
    return AutoDelta(model, init_loc_fn=init_to_sites(sites), create_plates=getattr(model, "plates", None))
