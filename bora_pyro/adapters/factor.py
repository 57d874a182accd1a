"""The factor that an adapter adds to the prior of each task, as one site of the Pyro model.

>>> from pyro import poutine
>>> from bora_pyro.adapters import SaRA
>>> from bora_pyro.backbone.layer_tensors import LayerTensors
>>> import torch
>>> class Frozen:
...     slots, device = [Slot("q_proj", ("a.q_proj",), 2, 2)], torch.device("cpu")
...
...     def weight(self, slot, layer):
...         return torch.eye(2)
>>> adapter = SaRA(fraction=1.0, nuclear=0.5)
>>> tensors = LayerTensors.of([adapter], Frozen())
>>> weights = {"q_proj.sparse": torch.tensor([[[3.0, 0.0, 0.0, 4.0]], [[0.0, 0.0, 0.0, 0.0]]])}  # ΔW of two tasks
>>> factor = prior_factor(adapter, Frozen.slots, tensors)
>>> trace = poutine.trace(factor).get_trace(weights, pyro.plate("tasks", 2, dim=-1))
>>> trace.nodes["prior_factor.adapter"]["fn"].log_factor.round(decimals=2)
tensor([-3.5000, -0.0000])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pyro
from torch import Tensor

from bora_pyro.adapters.base import Adapter
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.backbone.slots import Slot

#: The beginning of the name of a site that is a factor of the prior, and no likelihood, although it is observed.
PRIOR_FACTOR = "prior_factor."


#: A function that adds the factor: of the latents by ``<slot>.<name>``, (tasks, layers, *shape), and of their plate of tasks.
Factor = Callable[[Mapping[str, Tensor], pyro.plate], None]


def prior_factor(adapter: Adapter, slots: Sequence[Slot], tensors: LayerTensors) -> Factor | None:
    """A function that adds the sum of ``adapter.log_factor`` over all layers to the joint density; None if there is no factor.

    Args:
        adapter: the adapter.
        slots: the adapted layers.
        tensors: the tensors of the layers.
    """
    if type(adapter).log_factor is Adapter.log_factor:
        return None
    return partial(_add_factor, adapter, slots, tensors)


def _add_factor(
    adapter: Adapter, slots: Sequence[Slot], tensors: LayerTensors, weights: Mapping[str, Tensor], tasks: pyro.plate
) -> None:
    total: Tensor | None = None
    for slot in slots:
        latents = {name: weights[f"{slot.name}.{name}"].unbind(1) for name in tensors.names(slot)}
        for layer in range(slot.layers):
            of_layer = {name: values[layer] for name, values in latents.items()}
            factor = adapter.log_factor(tensors.at_layer(slot, layer, of_layer, tasks.indices))
            if factor is None:
                return
            total = factor if total is None else total + factor
    if total is not None:
        with tasks:
            pyro.factor(f"{PRIOR_FACTOR}adapter", total)
