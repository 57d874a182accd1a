"""Pyro's own mean-field Normal guide."""

from __future__ import annotations

from collections.abc import Mapping

from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides.base import check_no_masks, init_to_sites
from bora_pyro.model import BoRA


def auto_normal_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
) -> AutoNormal:
    """``pyro.infer.autoguide.AutoNormal``, unchanged, with the initial standard deviation ``scale`` at all sites.

    For each site it samples an auxiliary site and a point mass. The KL divergence is therefore estimated from draws, and its
    gradient is noisier than that of :func:`~bora_pyro.guides.normal_guide`, which has the same family of distributions.
    """
    check_no_masks(model, "auto_normal")
    return AutoNormal(model, init_loc_fn=init_to_sites(sites), init_scale=scale, create_plates=getattr(model, "plates", None))
