"""What an adapter is: latent tensors for a linear layer, and what they add to its output.

A new adapter is one file with a subclass of :class:`Adapter`, and one line in ``bora_pyro/adapters/__init__.py``. Its options are
the arguments of its class: ``--adapter NAME --adapter_option KEY=VALUE``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError


def uniform_fan_in(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform on ±1/√fan_in, the fan-in being the last dimension: PEFT's ``kaiming_uniform_(a=√5)`` for A."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Factors:
    """A change of a linear layer as LoRA writes it, ΔW = (α/r) B A.

        >>> Factors(torch.ones(2, 3), torch.ones(4, 2), alpha=4.0).delta()[0].tolist()
        [4.0, 4.0, 4.0]

    Attributes:
        lora_A: A, (..., r, in).
        lora_B: B, (..., out, r).
        alpha: α.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[-2]

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """ΔW, (..., out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)


class Adapter(ABC):
    """Latent tensors that change a linear layer.

        >>> class Shift(Adapter):  # a number added to each output
        ...     def start(self, slot, weight, generator):
        ...         return Start({"shift": torch.zeros(slot.out_features)})
        ...
        ...     def output(self, x, tensors):
        ...         return tensors["shift"][:, None].to(x.dtype)
        >>> tensors = {"shift": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}  # of two rows
        >>> Shift().add(torch.zeros(2, 1, 2), torch.ones(2, 1, 5), tensors).tolist()
        [[[1.0, 2.0]], [[3.0, 4.0]]]

    Every adapter adds nothing at its start, has a gradient there that is not zero everywhere, and names as latents exactly the
    tensors that are learned. A subclass gives ``start`` and one of ``delta`` and ``output``. An adapter that holds another one
    merges that one's latents and fixed tensors into its own start.

    Attributes:
        shared: names of the latents that are meant to have one value for all tasks; the prior is what makes them so
            (:func:`~bora_pyro.priors.with_shared`).
    """

    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        """The tensors of one layer of ``slot`` as a fit begins.

        Args:
            slot: the kind of layer, with its sizes.
            weight: gives the frozen weight of this layer, (out, in) float32.
            generator: of whatever is random.
        """

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """ΔW, (..., out, in); None where the change depends on the layer's input.

        Args:
            tensors: latents (..., *shape), fixed tensors and buffers (*shape) of this layer by name.
        """
        return None

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What is added to the layer's output; by default x ΔWᵀ.

        Args:
            x: the layer's input (rows, tokens, in_features).
            tensors: latents (rows, *shape), fixed tensors and buffers (*shape) of this layer by name.

        Returns:
            (rows, tokens, out_features) in the precision of ``x``.
        """
        delta = self.delta(tensors)
        assert delta is not None, f"{type(self).__name__} gives neither delta nor output"
        return x @ delta.to(x.dtype).mT

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The changed output of the layer; an adapter that can do both in one pass overrides this.

        Args:
            output: the layer's own output (rows, tokens, out_features).
            x: the layer's input.
            tensors: as for :meth:`output`.
        """
        return output + self.output(x, tensors)

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        """The same change exactly as LoRA matrices, for export and diagnostics; None where it has no such form."""
        return None

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latents of one layer whose LoRA form is these matrices: ``factors`` undone.

        Args:
            factors: the matrices; their scale α/r is that of this adapter.
            fixed: the adapter's fixed tensors of the layer.

        Raises:
            InputError: no latents of this adapter have this form.
        """
        raise InputError(f"LoRA matrices cannot be read as {self}")

    def kept_per_token(self, slot: Slot) -> int:
        """How many numbers of each token a layer of ``slot`` keeps for the backward pass, for the estimate of memory."""
        return 0

    def callbacks(self) -> Sequence[Any]:
        """What acts between the steps of a fit for this adapter: :class:`~bora_pyro.inference.callbacks.Callback`."""
        return ()
