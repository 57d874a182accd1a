"""The base class of adapters. An adapter has latent tensors for a linear layer, and says what they add to its output.

A new adapter is one file with a subclass of :class:`Adapter`, and one line in ``bora_pyro/adapters/__init__.py``. Its options are
the arguments of its class: ``--adapter NAME --adapter_option KEY=VALUE``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least


def uniform_fan_in(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform on ±1/√fan_in, where fan_in is the last dimension. PEFT starts A so: ``kaiming_uniform_(a=√5)``."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Factors:
    """The change of a linear layer in LoRA's form, ΔW = (α/r) B A.

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
        >>> tensors = {"shift": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}  # for two rows
        >>> Shift().add(torch.zeros(2, 1, 2), torch.ones(2, 1, 5), tensors).tolist()
        [[[1.0, 2.0]], [[3.0, 4.0]]]

    At its start every adapter adds nothing, and its gradient is not zero everywhere. Its latents are exactly the tensors that are
    learned. A subclass defines ``start``, and one of ``delta`` and ``output``. An adapter that contains another adapter merges
    the latents and fixed tensors of the inner one into its own start.

    Attributes:
        shared: names of the latents that should have one value for all tasks. The prior gives them one value
            (:func:`~bora_pyro.priors.with_shared`).
    """

    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        """The tensors of one layer of ``slot`` at the start of a fit.

        Args:
            slot: the kind of layer, with its sizes, the path of this layer alone, and the paths of its kind (``kind_paths``).
            weight: a function that returns the frozen weight of this layer, (out, in) float32.
            generator: the source of all random numbers.
        """

    def for_tasks(self, tasks: Sequence[str] | None) -> Adapter:
        """This adapter for the tasks of a fit. An adapter whose options name tasks returns one that knows them by number.

        Args:
            tasks: names of the tasks in the order of the model. None: new tasks, which were not part of the fit.

        Raises:
            InputError: an option names a task that does not exist.
        """
        return self

    def check(self, slots: Sequence[Slot], num_tasks: int) -> None:  # noqa: B027 (most adapters fit every model)
        """Check the options that speak of layers or tasks, when a model is built.

        Args:
            slots: the adapted layers of the model.
            num_tasks: D.

        Raises:
            InputError: the adapter cannot be that of such a model.
        """

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """ΔW, (..., out, in); None if the change depends on the layer's input.

        Args:
            tensors: latents (..., *shape), fixed tensors and buffers (*shape) of this layer by name.
        """
        return None

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the adapter adds to the layer's output; by default x ΔWᵀ.

        Args:
            x: the layer's input (rows, tokens, in_features).
            tensors: latents (rows, *shape), fixed tensors and buffers (*shape) of this layer by name.

        Returns:
            (rows, tokens, out_features) in the precision of ``x``.
        """
        delta = self.delta(tensors)
        assert delta is not None, f"{type(self).__name__} defines neither delta nor output"
        return x @ delta.to(x.dtype).mT

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The layer's output plus what the adapter adds. An adapter that computes both in one pass overrides this method.

        Args:
            output: the layer's own output (rows, tokens, out_features).
            x: the layer's input.
            tensors: as for :meth:`output`.
        """
        return output + self.output(x, tensors)

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors | None:
        """The change as exact LoRA matrices, for export and diagnostics; None if it has no such form."""
        return None

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The latents of one layer for given LoRA matrices: the inverse of the method ``factors``.

        Args:
            factors: the matrices. Their scale α/r must be that of this adapter.
            fixed: the adapter's fixed tensors of the layer.

        Raises:
            InputError: no latents of this adapter give these matrices.
        """
        raise InputError(f"LoRA matrices cannot be read as {self}")

    def log_factor(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The logarithm of a factor that the adapter adds to the joint density of each task, for one layer; None if it has none.

        The model adds it up over the layers as a site ``prior_factor.adapter`` (``pyro.factor``) in the plate of tasks. It
        counts as a part of the prior. It need not be normalised.

        Args:
            tensors: latents (tasks, *shape), fixed tensors and buffers (*shape) of this layer by name.

        Returns:
            (tasks,)
        """
        return None

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        """The latents of a layer as linear maps M: for each one its input u, and the gradient with respect to its output M u.

        Kronecker-factored curvature is made of them. The gradient with respect to M is the sum of (gradient) uᵀ over tokens.

        Args:
            x: the layer's input (rows, tokens, in_features).
            gradient: the gradient with respect to the layer's output (rows, tokens, out_features).
            tensors: as for :meth:`output`.

        Returns:
            By name of the latent, M of shape (a, b): u (rows, tokens, b) and the gradient (rows, tokens, a). None if the latents
            are not the matrices of linear maps.
        """
        return None

    def kept_per_token(self, slot: Slot) -> int:
        """How many numbers per token a layer of ``slot`` keeps for the backward pass. The memory estimate uses it."""
        return 0

    def kept_per_row(self, slot: Slot) -> int:
        """How many numbers per row of a batch a layer of ``slot`` keeps besides the row's latents, for the memory estimate."""
        return 0

    def callbacks(self) -> Sequence[Any]:
        """Callbacks that this adapter needs during a fit (:class:`~bora_pyro.inference.callbacks.Callback`)."""
        return ()


@dataclass(frozen=True)
class ScaledAdapter(Adapter):
    """The base of adapters with a rank r and a scale α/r.

    Args:
        rank: r, at least 1.
        alpha: α; the change is scaled by α/r. Default: the rank, so that the scale is 1.

    Raises:
        InputError: the rank is below 1, or alpha is not positive and finite.
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if not 0 < self.scaling < math.inf:
            raise InputError(
                f"alpha {self.alpha} is not allowed; it must be positive and finite; the usual value is the rank ({self.rank})"
            )

    @property
    def scaling(self) -> float:
        """α/r."""
        assert self.alpha is not None
        return self.alpha / self.rank
