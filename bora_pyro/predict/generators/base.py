"""The base class of methods that predict an adapter from a task vector.

A new method is one file with a subclass of :class:`Method`, and one line in ``bora_pyro/predict/generators/__init__.py``. Its
options are the arguments of its class: ``--method NAME --method_option KEY=VALUE``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Method(ABC):
    """A map from the vector of a task to its adapter, which is learned from the adapters of other tasks.

        >>> import torch
        >>> class First(Method):  # always the adapter of the first task
        ...     def fit(self, vectors, latents, *, draws=None, seed=0):
        ...         self.latents = latents[0]
        ...
        ...     def generate(self, vector, *, draw=None):
        ...         return self.latents
        ...
        ...     def state(self):
        ...         return {"latents": self.latents}
        ...
        ...     def load_state(self, state):
        ...         self.latents = state["latents"]
        >>> first = First()
        >>> first.fit(torch.zeros(3, 2), torch.arange(6.0).view(3, 2))
        >>> first.generate(torch.zeros(2))
        tensor([0., 1.])

    Vectors are standardised: each entry has mean 0 and standard deviation 1 over the training tasks. An adapter is given by its
    coordinates (:class:`~bora_pyro.predict.generators.space.Space`), which have mean 0 and mean square 1 over the training tasks,
    so the mean adapter is 0. All tensors are float64. A subclass is a dataclass, whose fields are its options.

    Attributes:
        has_draws: whether ``generate`` can draw adapters from a distribution.
        uses_latents: whether the result is anything else than the mean adapter.
    """

    has_draws: ClassVar[bool] = False
    uses_latents: ClassVar[bool] = True

    @abstractmethod
    def fit(self, vectors: Tensor, latents: Tensor, *, draws: Tensor | None = None, seed: int = 0) -> None:
        """Learn from D tasks.

        Args:
            vectors: (D, hidden), the vector of each task.
            latents: (D, q), the adapter of each task.
            draws: (D, K, q), draws from the posterior of each task's adapter, for methods that model a spread.
            seed: seed of all random numbers.
        """

    @abstractmethod
    def generate(self, vector: Tensor, *, draw: int | None = None) -> Tensor:
        """The adapter (q,) of a task with the vector (hidden,).

        Args:
            vector: the vector.
            draw: number of a draw, if the method has draws; None: the centre.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that ``fit`` has found."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that ``state`` returned."""

    def chosen(self) -> dict[str, Any]:
        """What ``fit`` has chosen by itself, in values for JSON."""
        return {}
