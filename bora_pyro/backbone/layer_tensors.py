"""The tensors that belong to the adapted layers: latents, fixed tensors, buffers and masks, one layer on top of another.

>>> slot = Slot("q_proj", ("a.q_proj", "b.q_proj"), 3, 2)
>>> class Part:
...     def start(self, slot, weight, generator):
...         return Start({"x": torch.rand(2, generator=generator)}, masks={"x": torch.tensor([True, False])})
>>> class Frozen:
...     slots, device = [slot], torch.device("cpu")
...
...     def weight(self, slot, layer):
...         return torch.zeros(2, 3)
>>> tensors = LayerTensors.of([Part()], Frozen())
>>> tensors.latents["q_proj.x"].shape, tensors.masks["q_proj.x"].shape
(torch.Size([2, 2]), torch.Size([2, 2]))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor

from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError

#: Tensors by ``<slot>.<name>``.
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """The tensors of one layer as a fit begins, by name.

    Attributes:
        latents: (*shape), the tensors under the prior; all tasks begin with the same values.
        fixed: (*shape), tensors that all tasks share and that never change. They follow from the seed and the layer's weight,
            and are built anew wherever a fit is read.
        buffers: (*shape), tensors that all tasks share and that change during a fit otherwise than by its gradient, as counts or
            a bias. They belong to checkpoints, to the best state and to the run folder.
        masks: by the name of a latent, (*shape) or what broadcasts against it, bool: which of its entries are active. With one
            dimension more, (D, *shape), each task has a mask of its own (ranks by task). An inactive entry counts as 0 in the
            adapter, and the prior says nothing of it. A mask may change during a fit, as a buffer may.
    """

    latents: Tensors = field(default_factory=dict)
    fixed: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    masks: Tensors = field(default_factory=dict)


class Layers(Protocol):
    """What is asked of the backbone."""

    slots: list[Slot]

    @property
    def device(self) -> torch.device:
        """Where the tensors go."""

    def weight(self, slot: Slot, layer: int) -> Tensor:
        """The frozen weight of one layer, (out, in) float32."""


class Part(Protocol):
    """An adapter or a router: whatever brings tensors to a layer."""

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        """The tensors of one layer of ``slot``.

        Args:
            slot: the kind of layer.
            weight: gives the frozen weight of this layer, (out, in) float32.
            generator: of whatever is random.
        """


@dataclass
class LayerTensors:
    """The tensors of all layers, (layers, *shape) by ``<slot>.<name>``; a task's own masks are (D, layers, *shape).

    Attributes:
        latents: where inference begins.
        fixed, buffers, masks: as for :class:`Start`.
    """

    latents: Tensors = field(default_factory=dict)
    fixed: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    masks: Tensors = field(default_factory=dict)
    # (store, key, name within the layer) of what all tasks share, by slot
    _shared: dict[str, list[tuple[Tensors, str, str]]] = field(default_factory=dict, repr=False)
    _names: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, parts: Sequence[Part], backbone: Layers, *, seed: int = 0) -> LayerTensors:
        """Start every part in every layer, one slot after another.

        Args:
            parts: the adapter and the router.
            backbone: the frozen model, which knows its slots and the weight of each layer.
            seed: of whatever is random.

        Raises:
            InputError: two parts use one name.
        """
        tensors, generator = cls(), torch.Generator().manual_seed(seed)
        for slot in backbone.slots:
            for part in parts:
                layers = [part.start(slot, partial(backbone.weight, slot, layer), generator) for layer in range(slot.layers)]
                for kind in ("latents", "fixed", "buffers", "masks"):
                    tensors._add(kind, slot, [getattr(layer, kind) for layer in layers], layers[0].latents, backbone.device)
        return tensors

    def _add(
        self, kind: str, slot: Slot, layers: Sequence[Tensors], latents: Mapping[str, Tensor], device: torch.device | str
    ) -> None:
        store: Tensors = getattr(self, kind)
        others = [other for other in (self.latents, self.fixed, self.buffers) if kind != "masks"]
        for name, first in layers[0].items():
            key = f"{slot.name}.{name}"
            if any(key in other for other in others):
                raise InputError(f"two tensors of a layer are called {name!r}; give those of the router names of their own")
            by_task = kind == "masks" and first.dim() > latents[name].dim()
            store[key] = torch.stack([layer[name] for layer in layers], dim=int(by_task)).to(device)
            if kind == "latents":
                self._names.setdefault(slot.name, []).append(name)
            elif kind in ("fixed", "buffers"):
                self._shared.setdefault(slot.name, []).append((store, key, name))

    def names(self, slot: Slot) -> list[str]:
        """The names of a slot's latents within a layer."""
        return self._names.get(slot.name, [])

    def mask(self, name: str, task: Tensor | None = None) -> Tensor | None:
        """The mask of a latent: (layers, *shape), or (rows, layers, *shape) for the tasks ``task`` where each has its own.

        Without ``task`` an entry is active where it is so in any task. None: all entries are active.
        """
        mask = self.masks.get(name)
        if mask is None or mask.dim() <= self.latents[name].dim():
            return mask
        return mask.any(0) if task is None else mask[task.to(mask.device)]

    def at_layer(self, slot: Slot, layer: int, latents: Mapping[str, Tensor], task: Tensor | None = None) -> Tensors:
        """The tensors of one layer by name: latents with their masks, fixed tensors and buffers.

        Args:
            slot: the kind of layer.
            layer: its number within the slot.
            latents: (..., *shape) by name within the layer.
            task: (rows,) whose latents the rows are, where tasks have masks of their own; None: an entry counts that is active
                in any task.
        """
        found = dict(latents)
        if self.masks:
            for name, value in latents.items():
                mask = self.mask(f"{slot.name}.{name}", task)
                if mask is not None:
                    own = mask.dim() > self.latents[f"{slot.name}.{name}"].dim()
                    found[name] = value * (mask[:, layer] if own else mask[layer]).to(value)
        for store, key, name in self._shared.get(slot.name, ()):
            found[name] = store[key][layer]
        return found

    def state(self) -> Tensors:
        """Buffers and masks, as a checkpoint has them: ``buffers/<slot>.<name>`` and ``masks/<slot>.<latent>``."""
        stores = {"buffers": self.buffers, "masks": self.masks}
        return {f"{kind}/{name}": value.clone() for kind, store in stores.items() for name, value in store.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave, or a part of it; names that are not its own are passed over."""
        for kind, store in (("buffers", self.buffers), ("masks", self.masks)):
            for name, value in store.items():
                if (stored := state.get(f"{kind}/{name}")) is not None:
                    store[name] = stored.to(value.device, copy=True)
