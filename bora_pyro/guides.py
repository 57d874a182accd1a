"""How the posterior is approximated: guides for the model, each started where the adapters start.

MAP is Pyro's own ``AutoDelta``; what it needs here is the right start and tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuide, init_to_mean
from torch import Tensor

from bora_pyro.errors import InputError, nearest
from bora_pyro.model import BoRA

# Each guide keeps its parameters to itself: with Pyro's global parameter store a second guide in the same process would
# silently take over the first one's. The setting must stand before any guide is built.
pyro.settings.set(module_local_params=True)


def init_to_start(site: dict[str, Any]) -> Tensor:
    """The site's mean as a tensor of its own: Θ and independent tasks at the adapter's start, deviations at zero.

    ``init_to_mean`` may give an expanded view, whose entries share memory: an optimiser would update them together.
    """
    return init_to_mean(site).clone(memory_format=torch.contiguous_format)


def map_guide(model: BoRA, sites: Mapping[str, Tensor] | None = None) -> AutoDelta:
    """Maximum a posteriori: a point mass at every site (``pyro.infer.autoguide.AutoDelta``).

    Args:
        model: the BoRA model.
        sites: where the sites begin, as ``model.sites_given(theta, mean)`` gives them; they are copied. Default: where the
            adapters start.

    Raises:
        InputError: when the guide is first run, a site that has no value there or one of another shape.
    """
    if sites is None:
        return AutoDelta(model, init_loc_fn=init_to_start)
    return AutoDelta(model, init_loc_fn=partial(_init_to_given, sites=dict(sites)))


def _init_to_given(site: dict[str, Any], sites: dict[str, Tensor]) -> Tensor:
    name, shape = site["name"], site["fn"].shape()
    if name not in sites:
        raise InputError(
            f"sites has no value of {name!r}; give model.sites_given(theta, mean) of the model itself{nearest(name, sites)}"
        )
    if sites[name].shape != shape:
        raise InputError(f"sites has {name!r} of shape {tuple(sites[name].shape)}; the model's is {tuple(shape)}")
    return sites[name].detach().clone(memory_format=torch.contiguous_format)


#: Guides by the name that a configuration gives them.
GUIDES: dict[str, Callable[[BoRA], AutoGuide]] = {"map": map_guide}
