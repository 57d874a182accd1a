"""What an adapter is: latent tensors for a linear layer, and what they add to its output.

A new adapter is one file with a subclass of :class:`Adapter`, and one line in ``bora_pyro/adapters/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError


@dataclass(frozen=True)
class TensorSpec:
    """The shape of one tensor of one layer, and how its first value is drawn.

    Attributes:
        shape: without the dimensions of tasks and layers.
        start: ``start(shape, generator)`` gives the value that all tasks share at the beginning.
    """

    shape: tuple[int, ...]
    start: Callable[[tuple[int, ...], Generator], Tensor]


def zeros(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """The zero tensor; the generator is not used."""
    return torch.zeros(shape)


def uniform_fan_in(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform on ±1/√fan_in, the fan-in being the last dimension: PEFT's ``kaiming_uniform_(a=√5)`` for A."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Adapter(ABC):
    """Latent tensors that change a linear layer.

        >>> class Shift(Adapter):  # a number added to each output
        ...     def latents(self, slot):
        ...         return {"shift": TensorSpec((slot.out_features,), zeros)}
        ...
        ...     def output(self, x, tensors):
        ...         return tensors["shift"][:, None].to(x.dtype)
        >>> tensors = {"shift": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}  # of two rows
        >>> Shift().add(torch.zeros(2, 1, 2), torch.ones(2, 1, 5), tensors).tolist()
        [[[1.0, 2.0]], [[3.0, 4.0]]]

    Every adapter adds nothing at its start, has a gradient there that is not zero everywhere, and declares exactly the
    tensors that are learned.

    Attributes:
        shared: names of the latents that are meant to have one value for all tasks; the prior is what makes them so
            (:func:`~bora_pyro.priors.with_shared`).
    """

    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def latents(self, slot: Slot) -> dict[str, TensorSpec]:
        """The tensors that a prior is put on, for one layer of ``slot``."""

    def fixed(self, slot: Slot) -> dict[str, TensorSpec]:
        """Tensors that all tasks share and that are never learned (random bases, masks); none by default."""
        return {}

    @abstractmethod
    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What is added to the layer's output.

        Args:
            x: the layer's input (rows, tokens, in_features).
            tensors: latents (rows, *shape) and fixed tensors (*shape) of this layer by name.

        Returns:
            (rows, tokens, out_features) in the precision of ``x``.
        """

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The changed output of the layer; an adapter that can do both in one pass overrides this.

        Args:
            output: the layer's own output (rows, tokens, out_features).
            x: the layer's input.
            tensors: as for :meth:`output`.
        """
        return output + self.output(x, tensors)

    def lora(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same change as LoRA matrices ``lora_A`` (..., r, in) and ``lora_B`` (..., out, r), for export.

        Raises:
            InputError: this adapter's change is no product of two low-rank matrices.
        """
        raise InputError(f"{self} cannot be written as LoRA matrices")

    def from_lora(self, factors: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latents of one layer whose LoRA form is these matrices: ``lora`` undone.

        Args:
            factors: ``lora_A`` (r, in) and ``lora_B`` (out, r).
            fixed: the adapter's fixed tensors of the layer.

        Raises:
            InputError: no latents of this adapter have this form.
        """
        raise InputError(f"LoRA matrices cannot be read as {self}")
