"""LoRA (Hu et al., 2022; the BoRA paper's equation 4): W = W_full + (α/r) B A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bora_pyro.adapters.base import Adapter, TensorSpec, uniform_fan_in, zeros
from bora_pyro.backbone import Slot
from bora_pyro.errors import InputError


@dataclass(frozen=True)
class LoRA(Adapter):
    """Two low-rank factors a layer: A (r, in), started at random, and B (out, r), started at zero.

        >>> LoRA(rank=4)
        LoRA(rank=4, alpha=4.0)
        >>> {name: spec.shape for name, spec in LoRA(rank=4).latents(Slot("q_proj", ("q_proj",), 16, 32)).items()}
        {'lora_A': (4, 16), 'lora_B': (32, 4)}

    Args:
        rank: r, at least 1.
        alpha: α; the change is scaled by α/r. Default: the rank, so that the scale is 1.

    Raises:
        InputError: a rank below 1, an alpha that is not positive and finite.
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank} is not allowed; a LoRA rank is 1 or more, the nearest valid value is 1")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if not 0 < self.scaling < math.inf:
            raise InputError(
                f"alpha {self.alpha} is not allowed; it must be positive and finite, the usual value is the rank ({self.rank})"
            )

    @property
    def scaling(self) -> float:
        """α/r."""
        assert self.alpha is not None
        return self.alpha / self.rank

    def latents(self, slot: Slot) -> dict[str, TensorSpec]:
        return {
            "lora_A": TensorSpec((self.rank, slot.in_features), uniform_fan_in),
            "lora_B": TensorSpec((slot.out_features, self.rank), zeros),
        }

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        a = tensors["lora_A"].to(x.dtype)  # (rows, r, in), or (r, in) where it is fixed
        b = tensors["lora_B"].to(x.dtype)  # (rows, out, r)
        return (x @ a.mT) @ (self.scaling * b).mT

    def lora(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"lora_A": tensors["lora_A"], "lora_B": tensors["lora_B"]}
