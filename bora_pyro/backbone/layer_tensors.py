"""The tensors of the adapted layers (latents, fixed tensors, buffers and masks), stacked over the layers of each slot.

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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError

#: Tensors by ``<slot>.<name>``.
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """The tensors of one layer at the start of a fit, by name.

    A tensor has one shape in all layers of a slot, except for its first dimension. Zeros fill up the shorter ones, and the
    entries of latents that are filled up are masked.

    Attributes:
        latents: (*shape), the tensors that have a prior. All tasks start with the same values.
        fixed: (*shape), tensors that all tasks share and that never change. They depend only on the seed and on the layer's
            weight, and are rebuilt when a fit is loaded.
        buffers: (*shape), tensors that all tasks share and that change during a fit, but not by gradients, such as counts or a
            bias. They are stored in checkpoints, in the best state and in the run folder.
        masks: bool, by the name of a latent, (*shape) or a shape that broadcasts to it: which entries are active. With one more
            dimension, (D, *shape), each task has its own mask (ranks by task), and an entry of Θ is active if it is active in any
            task. An inactive entry is 0 in the adapter and has no prior. A mask may change during a fit, like a buffer.
    """

    latents: Tensors = field(default_factory=dict)
    fixed: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    masks: Tensors = field(default_factory=dict)


class Layers(Protocol):
    """The part of the backbone's interface that is needed here."""

    slots: list[Slot]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""

    def weight(self, slot: Slot, layer: int) -> Tensor:
        """The frozen weight of one layer, (out, in) float32."""


class Part(Protocol):
    """An adapter or a router: an object that adds tensors to a layer."""

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        """The tensors of one layer of ``slot``.

        Args:
            slot: the kind of layer, with the path of this layer alone in ``paths``, and those of the kind in ``kind_paths``.
            weight: returns the frozen weight of this layer, (out, in) float32.
            generator: source of random numbers.
        """


@dataclass
class LayerTensors:
    """The tensors of all layers, by ``<slot>.<name>``.

    A tensor has the shape (layers, *shape). A mask for each task has the shape (D, layers, *shape).

    Attributes:
        latents: the initial values of the latents.
        fixed: as for :class:`Start`.
        buffers: as for :class:`Start`.
        masks: as for :class:`Start`.
    """

    latents: Tensors = field(default_factory=dict)
    fixed: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    masks: Tensors = field(default_factory=dict)
    # (store, key, name within the layer) of the fixed tensors and buffers, by slot
    _shared: dict[str, list[tuple[Tensors, str, str]]] = field(default_factory=dict, repr=False)
    _names: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, parts: Sequence[Part], backbone: Layers, *, seed: int = 0) -> LayerTensors:
        """Call ``start`` of every part for every layer, one slot after another.

        Args:
            parts: the adapter and the router.
            backbone: the frozen model, with its slots and weights.
            seed: seed of the random numbers.

        Raises:
            InputError: two tensors of a slot have the same name.
        """
        tensors, generator = cls(), torch.Generator().manual_seed(seed)
        for slot in backbone.slots:
            for part in parts:
                layers = [
                    part.start(
                        replace(slot, paths=(path,), kind_paths=slot.paths), partial(backbone.weight, slot, layer), generator
                    )
                    for layer, path in enumerate(slot.paths)
                ]
                _mask_shorter_latents(layers)
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
            store[key] = torch.stack(_filled_up([layer[name] for layer in layers]), dim=int(by_task)).to(device)
            if kind == "latents":
                self._names.setdefault(slot.name, []).append(name)
            elif kind in ("fixed", "buffers"):
                self._shared.setdefault(slot.name, []).append((store, key, name))

    def with_latents_of(self, part: Part, backbone: Layers, *, seed: int = 0) -> LayerTensors:
        """The same tensors, with the latents of one more part, such as a router for finished adapters.

        Args:
            part: the part; it has no tensors besides latents.
            backbone: as for :meth:`of`.
            seed: seed of the random numbers.

        Raises:
            InputError: a latent has the name of another tensor.
        """
        own = LayerTensors.of([part], backbone, seed=seed)
        assert not (own.fixed or own.buffers or own.masks), f"{part} has tensors besides latents"
        for name in own.latents:
            if any(name in other for other in (self.latents, self.fixed, self.buffers)):
                raise InputError(f"two tensors of a layer are called {name.rpartition('.')[-1]!r}; give each a name of its own")
        slots = self._names.keys() | own._names.keys()
        names = {slot: [*self._names.get(slot, ()), *own._names.get(slot, ())] for slot in slots}
        return replace(self, latents=self.latents | own.latents, _names=names)

    def names(self, slot: Slot) -> list[str]:
        """The names of a slot's latents within a layer."""
        return self._names.get(slot.name, [])

    def mask(self, name: str, task: Tensor | None = None) -> Tensor | None:
        """The mask of a latent, or None if all its entries are active.

        Args:
            name: the latent, ``<slot>.<name>``.
            task: (rows,) task index of each row, for masks that differ between tasks, or −1 for Θ. None: Θ.

        Returns:
            (layers, *shape), or (rows, layers, *shape) if masks differ between tasks and ``task`` is given.
        """
        mask = self.masks.get(name)
        return _of_tasks(mask, task) if mask is not None and self._by_task(name) else mask

    def _by_task(self, name: str) -> bool:
        """Whether the tasks have different masks of a latent."""
        return name in self.masks and self.masks[name].dim() > self.latents[name].dim()

    @property
    def masks_by_task(self) -> list[str]:
        """The latents of which the tasks have different masks."""
        return [name for name in self.masks if self._by_task(name)]

    def active(self, name: str, num_tasks: int) -> Tensor:
        """(D,) int64: how many entries of a latent are active in each of D tasks."""
        start, mask = self.latents[name], self.masks.get(name)
        if mask is None:
            return torch.full((num_tasks,), start.numel())
        of_task = mask if self._by_task(name) else mask[None]
        # a mask has one entry for several of the latent where it broadcasts
        return (of_task.flatten(1).sum(1) * (start.numel() // of_task[0].numel())).expand(num_tasks).cpu()

    def for_new_tasks(self) -> LayerTensors:
        """The same tensors for tasks that were not fitted: an entry is active for them if it is active in any fitted task.

        A latent of which all entries are then active has no mask any more.
        """
        masks = dict(self.masks)
        for name in self.masks_by_task:
            mask = _of_tasks(masks.pop(name), None)
            masks |= {} if mask.all() else {name: mask}
        return replace(self, masks=masks)

    def at_layer(self, slot: Slot, layer: int, latents: Mapping[str, Tensor], task: Tensor | None = None) -> Tensors:
        """The tensors of one layer, by name: latents with their masks applied, fixed tensors and buffers.

        Args:
            slot: the kind of layer.
            layer: the number of the layer within the slot.
            latents: (..., *shape), by name within the layer.
            task: (rows,) task index of each row of the latents, as for :meth:`mask`.
        """
        found = dict(latents)
        for name, value in latents.items() if self.masks else ():
            mask = self.masks.get(key := f"{slot.name}.{name}")
            if mask is not None:
                own = _of_tasks(mask[:, layer], task) if self._by_task(key) else mask[layer]
                found[name] = value * own.to(value)
        for store, key, name in self._shared.get(slot.name, ()):
            found[name] = store[key][layer]
        return found

    def state(self) -> Tensors:
        """Copies of the buffers and masks for a checkpoint: ``buffers/<slot>.<name>`` and ``masks/<slot>.<latent>``."""
        stores = {"buffers": self.buffers, "masks": self.masks}
        return {f"{kind}/{name}": value.clone() for kind, store in stores.items() for name, value in store.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore buffers and masks from the result of ``state``. Missing and unknown names are ignored."""
        for kind, store in (("buffers", self.buffers), ("masks", self.masks)):
            for name, value in store.items():
                if (stored := state.get(f"{kind}/{name}")) is not None:
                    store[name] = stored.to(value.device, copy=True)


def _of_tasks(mask: Tensor, task: Tensor | None) -> Tensor:
    """The rows of a mask (D, ...) that belong to tasks (rows,), or to Θ where the task is −1; for None Θ's, without rows."""
    of_mean = mask.any(0)
    if task is None:
        return of_mean
    task = task.to(mask.device)
    return torch.where((task < 0).view(-1, *[1] * of_mean.dim()), of_mean, mask[task])


def _mask_shorter_latents(layers: Sequence[Start]) -> None:
    """Masks for latents that do not have the same length in all layers; the entries that will be filled up are inactive."""
    for name in layers[0].latents:
        longest = max(len(layer.latents[name]) if layer.latents[name].dim() else 0 for layer in layers)
        for layer in layers:
            shape = layer.latents[name].shape
            if shape and any(len(other.latents[name]) < longest for other in layers):
                mask = layer.masks.get(name, torch.ones(shape, dtype=torch.bool))
                layer.masks[name] = mask.expand(shape) if mask.dim() == len(shape) else mask


def _filled_up(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors with zeros at the end of the first dimension, so that all have the length of the longest one."""
    longest = max(len(tensor) if tensor.dim() else 0 for tensor in tensors)
    if all(not tensor.dim() or len(tensor) == longest for tensor in tensors):
        return tensors
    return [F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, longest - len(tensor))) for tensor in tensors]
