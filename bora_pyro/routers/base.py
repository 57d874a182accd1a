"""The base class of routers. A router decides which adapter, or which mixture of adapters, reads a token.

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
from bora_pyro.errors import InputError


class AdaptedModel(Protocol):
    """The part of the model that a router uses.

    Attributes:
        tensors: the tensors of all layers, including the router's own buffers; ``tensors.at_layer`` returns those of one layer.
        num_tasks: D.
    """

    tensors: LayerTensors
    num_tasks: int

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the adapter adds to the output of a layer, (rows, tokens, out_features)."""

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The output of a layer plus what the adapter adds to it."""


class Router(ABC):
    """Decides which adapters change the output of a layer for each token.

        >>> from bora_pyro.routers import ByTask
        >>> ByTask()
        ByTask()

    A router may have latents of its own, for example gates. The model's prior applies to them as to those of the adapter, and
    pools the ones that are named in ``shared``. A router may also have buffers, which its own callback changes.

    Attributes:
        shared: names of the router's latents that have one value for all tasks.
        reads_all_tasks: whether the adapter of any task may read a token, so that the weights of all tasks are needed.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    reads_all_tasks: ClassVar[bool] = False

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        """The router's own tensors of one layer at the start of a fit, as for an adapter; none by default."""
        return Start()

    def route(self, model: AdaptedModel, weights: Mapping[str, Tensor], row: Tensor, task: Tensor) -> Change:
        """As :meth:`change`, once it is clear that the weights are there which this router reads.

        Raises:
            InputError: the router reads the adapters of all tasks, and the weights are of some.
        """
        given = len(next(iter(weights.values())))
        if self.reads_all_tasks and given != model.num_tasks:
            raise InputError(
                f"{self} reads a token by the adapters of all {model.num_tasks} tasks, and those of {given} are given; "
                "what asks for single tasks needs the router by_task"
            )
        return self.change(model, weights, row, task)

    @abstractmethod
    def change(self, model: AdaptedModel, weights: Mapping[str, Tensor], row: Tensor, task: Tensor) -> Change:
        """How the adapters change the outputs of the layers.

        Args:
            model: returns the adapter's tensors at a layer, and applies them.
            weights: latents by ``<slot>.<name>``, (tasks, layers, *shape).
            row: (rows,) position of each row's task in the weights.
            task: (rows,) index of each row's task. It selects what tasks have besides weights: the masks.
        """

    def callbacks(self) -> Sequence[Any]:
        """Callbacks that this router needs during a fit (:class:`~bora_pyro.inference.callbacks.Callback`)."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
