"""How the posterior is approximated: guides for the model, each started where the adapters start.

MAP is Pyro's own ``AutoDelta``; what it needs here is the right start and tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoDelta, AutoGuide, init_to_mean
from torch import Tensor

from bora_pyro.model import BoRA

# Each guide keeps its parameters to itself: with Pyro's global parameter store a second guide in the same process would
# silently take over the first one's. The setting must stand before any guide is built.
pyro.settings.set(module_local_params=True)


def init_to_start(site: dict[str, Any]) -> Tensor:
    """The site's mean as a tensor of its own: Θ and independent tasks at the adapter's start, deviations at zero.

    ``init_to_mean`` may give an expanded view, whose entries share memory: an optimiser would update them together.
    """
    return init_to_mean(site).clone(memory_format=torch.contiguous_format)


def map_guide(model: BoRA) -> AutoDelta:
    """Maximum a posteriori: a point mass at every site (``pyro.infer.autoguide.AutoDelta``)."""
    return AutoDelta(model, init_loc_fn=init_to_start)


#: Guides by the name that a configuration gives them.
GUIDES: dict[str, Callable[[BoRA], AutoGuide]] = {"map": map_guide}
