"""LoRA with A frozen at its random start (LoRA-FA, Zhang et al., 2023): only B is learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.adapters.base import TensorSpec
from bora_pyro.adapters.lora import LoRA
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError


@dataclass(frozen=True)
class FrozenALoRA(LoRA):
    """LoRA whose A (r, in) stays at its random start, shared by all tasks, and whose B (out, r) is learned.

        >>> adapter, slot = FrozenALoRA(rank=4), Slot("q_proj", ("q_proj",), 16, 32)
        >>> sorted(adapter.latents(slot)), sorted(adapter.fixed(slot))
        (['lora_B'], ['lora_A'])

    With A fixed, ΔW is linear in B: a Normal prior on B is one on ΔW, and adapters of different tasks are comparable
    without a choice of gauge.
    """

    def latents(self, slot: Slot) -> dict[str, TensorSpec]:
        return {"lora_B": super().latents(slot)["lora_B"]}

    def fixed(self, slot: Slot) -> dict[str, TensorSpec]:
        return {"lora_A": super().latents(slot)["lora_A"]}

    def from_lora(self, factors: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not torch.equal(factors["lora_A"], fixed["lora_A"].to(factors["lora_A"])):
            raise InputError(f"the A of these matrices is not the frozen one of {self}; read them as plain LoRA")
        return {"lora_B": factors["lora_B"]}
