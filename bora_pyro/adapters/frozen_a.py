"""LoRA with A frozen at its random start (LoRA-FA, Zhang et al., 2023): only B is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Factors
from bora_pyro.adapters.lora import LoRA
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError


@dataclass(frozen=True)
class FrozenALoRA(LoRA):
    """LoRA whose A (r, in) stays at its random start, shared by all tasks, and whose B (out, r) is learned.

        >>> start = FrozenALoRA(rank=4).start(Slot("q_proj", ("q_proj",), 16, 32), None, torch.Generator())
        >>> sorted(start.latents), sorted(start.fixed)
        (['lora_B'], ['lora_A'])

    With A fixed, ΔW is linear in B, so a Normal prior on B is a Normal prior on ΔW. The B of two tasks can be compared entry by
    entry. In plain LoRA they cannot, because (B, A) and (BG⁻¹, GA) give the same ΔW.
    """

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        latents = super().start(slot, weight, generator).latents
        return Start({"lora_B": latents["lora_B"]}, fixed={"lora_A": latents["lora_A"]})

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        maps = super().linear_maps(x, gradient, tensors)
        return None if maps is None else {"lora_B": maps["lora_B"]}

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not torch.equal(factors.lora_A, fixed["lora_A"].to(factors.lora_A)):
            raise InputError(f"the A of these matrices is not the frozen one of {self}; read them as plain LoRA")
        return {"lora_B": factors.lora_B}
