"""LoRA (Hu et al., 2022; the BoRA paper's equation 4): W = W_full + (α/r) B A."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Factors, ScaledAdapter, uniform_fan_in
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot


class RowLinear(torch.autograd.Function):
    """x Aᵀ for each row: x (rows, tokens, in), A (rows, r, in) or (r, in).

    The value is that of ``x @ A.mT``. The gradient of A is computed as gᵀ x, (r, in), whose last dimension is the long one.
    Autograd would compute xᵀ g, (in, r), and transpose it, which is several times slower on CPUs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor) -> Tensor:
        return x @ a.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent_of_x: Tensor, tangent_of_a: Tensor) -> Tensor:
        x, a = ctx.saved_tensors
        return tangent_of_x @ a.mT + x @ tangent_of_a.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, a = ctx.saved_tensors
        needs_x, needs_a = ctx.needs_input_grad
        gradient_of_a = gradient.mT @ x if needs_a else None
        if gradient_of_a is not None and a.dim() == 2:
            gradient_of_a = gradient_of_a.sum(0)
        return gradient @ a if needs_x else None, gradient_of_a


@dataclass(frozen=True)
class LoRA(ScaledAdapter):
    """Two low-rank factors per layer: A (r, in) starts at random, and B (out, r) starts at zero.

        >>> LoRA(rank=4)
        LoRA(rank=4, alpha=4.0)
        >>> start = LoRA(rank=4).start(Slot("q_proj", ("q_proj",), 16, 32), None, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'lora_A': (4, 16), 'lora_B': (32, 4)}

    Args:
        rank: r, at least 1.
        alpha: α; the change is scaled by α/r. Default: the rank, so that the scale is 1.

    Raises:
        InputError: the rank is below 1, or alpha is not positive and finite.
    """

    @property
    def own_scaling(self) -> float | None:
        """The factor of ``lora_B lora_A`` in ΔW; None if it is a latent."""
        return self.scaling

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        lora_a = uniform_fan_in((self.rank, slot.in_features), generator)
        return Start({"lora_A": lora_a, "lora_B": torch.zeros(slot.out_features, self.rank)})

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.factors(tensors).delta()

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        a, b = self._factors(x, tensors)
        return RowLinear.apply(x, a) @ (self.scaling * b).mT

    def add(self, output: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        a, b = self._factors(x, tensors)
        return torch.baddbmm(output, RowLinear.apply(x, a), b.mT, alpha=self.scaling)

    def _factors(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A (rows, r, in), or (r, in) if A is fixed, and B (rows, out, r), in the precision of ``x``."""
        return tensors["lora_A"].to(x.dtype), tensors["lora_B"].to(x.dtype)

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        assert self.alpha is not None
        return Factors(tensors["lora_A"], tensors["lora_B"], self.alpha)

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"lora_A": factors.lora_A, "lora_B": factors.lora_B}

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        a, b = LoRA._factors(self, x, tensors)
        gradient = self.scaling * gradient
        return {"lora_A": (x, gradient @ b), "lora_B": (x @ a.mT, gradient)}

    def kept_per_token(self, slot: Slot) -> int:
        return self.rank
