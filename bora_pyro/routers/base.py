"""What a router is: it decides which adapter, or which mixture of adapters, reads a token.

A new router is one file with a subclass of :class:`Router`, and one line in ``bora_pyro/routers/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Generator, Tensor

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.layer_tensors import LayerTensors, Start
from bora_pyro.backbone.slots import Slot


class AdaptedModel(Protocol):
    """What a router needs of the model.

    Attributes:
        tensors: the tensors of all layers, the router's own buffers among them; ``tensors.at_layer`` gives the adapter its own.
    """

    tensors: LayerTensors

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the adapter adds to the output of a layer, (rows, tokens, out_features)."""

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The output of a layer with what the adapter adds to it."""


class Router(ABC):
    """Decides which adapters change the output of a layer for each token.

        >>> from bora_pyro.routers import ByTask
        >>> ByTask()
        ByTask()

    A router may bring latents of its own, as gates: they stand under the model's prior like those of the adapter, and the prior
    pools the ones that are named in ``shared``. It may bring buffers, which a callback of its own changes.

    Attributes:
        shared: names of the router's latents that have one value for all tasks.
        reads_all_tasks: whether a token may be read by the adapter of any task, so that the weights of all tasks are needed.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    reads_all_tasks: ClassVar[bool] = False

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        """The router's own tensors of one layer, as for an adapter; none by default."""
        return Start()

    @abstractmethod
    def change(self, model: AdaptedModel, weights: Mapping[str, Tensor], row: Tensor, task: Tensor) -> Change:
        """How the adapters change the outputs of the layers.

        Args:
            model: gives the adapter's tensors at a layer, and applies them.
            weights: latents by ``<slot>.<name>``, (tasks, layers, *shape).
            row: (rows,) where each row's task stands in the weights.
            task: (rows,) index of each row's task, for what tasks have apart from weights (masks).
        """

    def callbacks(self) -> Sequence[Any]:
        """What acts between the steps of a fit for this router, as :class:`~bora_pyro.inference.callbacks.Callback` describes."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
