"""The router of the BoRA paper: the adapter of its own task reads each document."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.slots import Slot
from bora_pyro.routers.base import AdaptedModel, Router


class ByTask(Router):
    """Gathers each row's adapter by its task: W_full + ΔW_d for every token of a document of task d (equation 5).

    >>> ByTask()
    ByTask()
    """

    def change(self, model: AdaptedModel, weights: Mapping[str, Tensor], row: Tensor, task: Tensor) -> Change:
        # one gather per latent for all layers: its backward pass is one scatter instead of one per layer
        rows = {name: value.index_select(0, row).unbind(1) for name, value in weights.items()}
        by_slot: dict[str, dict[str, tuple[Tensor, ...]]] = {}
        for key, layers in rows.items():
            slot_name, _, name = key.rpartition(".")
            by_slot.setdefault(slot_name, {})[name] = layers

        def change(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
            latents = {name: layers[layer] for name, layers in by_slot[slot.name].items()}
            tensors = model.tensors.at_layer(slot, layer, latents, task)
            # a base may lie on several devices; the adapters are then on the device of its inputs
            return model.add(output, x, {name: value.to(output.device) for name, value in tensors.items()})

        return change
