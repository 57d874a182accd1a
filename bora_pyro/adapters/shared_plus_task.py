"""Two LoRA pairs a layer whose changes are added: one that the tasks share, and one of the task's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bora_pyro.adapters.base import TensorSpec
from bora_pyro.adapters.lora import LoRA
from bora_pyro.backbone.slots import Slot


@dataclass(frozen=True)
class SharedPlusTaskLoRA(LoRA):
    """W = W_full + (α/r) B_0 A_0 + (α/r) B_d A_d: a shared pair and the task's own, both learned.

        >>> adapter, slot = SharedPlusTaskLoRA(rank=4), Slot("q_proj", ("q_proj",), 16, 32)
        >>> {name: spec.shape for name, spec in adapter.latents(slot).items()}
        {'shared_A': (4, 16), 'shared_B': (32, 4), 'lora_A': (4, 16), 'lora_B': (32, 4)}
        >>> from bora_pyro.priors import HierarchicalNormal, with_shared
        >>> with_shared(HierarchicalNormal(tau=100), adapter.shared)
        ByLatent({'shared_A': Pooled(), 'shared_B': Pooled()}, other=HierarchicalNormal(tau=100))

    The released BoRA code's default run learns such a pair of adapters. What makes ``shared_A`` and ``shared_B`` shared is the
    prior: :func:`~bora_pyro.priors.with_shared` pools what an adapter declares as shared and leaves the rest to any prior.
    There the released code has no prior at all (that is ``Independent()`` here, τ = 0), or penalises the norms of the task's
    own factors, from zero and not from a mean Θ.

    Both A start at random, independently of each other, and both B at zero. Written as LoRA (``lora``), the two pairs are
    one of rank 2r: [A_0; A_d] and [B_0, B_d].

    Args:
        rank: r, of each of the two pairs.
        alpha: α; both changes are scaled by α/r. Default: the rank, so that the scale is 1.
    """

    shared: ClassVar[tuple[str, ...]] = ("shared_A", "shared_B")

    def latents(self, slot: Slot) -> dict[str, TensorSpec]:
        own = super().latents(slot)
        return {"shared_A": own["lora_A"], "shared_B": own["lora_B"]} | own

    def lora(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # side by side the two products are one: [B_0, B_d] [A_0; A_d] = B_0 A_0 + B_d A_d
        return {
            "lora_A": torch.cat([tensors["shared_A"], tensors["lora_A"]], dim=-2),
            "lora_B": torch.cat([tensors["shared_B"], tensors["lora_B"]], dim=-1),
        }

    def from_lora(self, factors: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        a, b, r = factors["lora_A"], factors["lora_B"], self.rank
        return {"shared_A": a[:r], "shared_B": b[:, :r], "lora_A": a[r:], "lora_B": b[:, r:]}

    def _factors(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return super()._factors(x, self.lora(tensors))
