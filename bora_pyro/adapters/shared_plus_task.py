"""Two LoRA pairs per layer whose changes are added: one pair for all tasks together, and one pair for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Factors, uniform_fan_in
from bora_pyro.adapters.lora import LoRA
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot

#: The beginnings of the names of the latents of the two pairs: that of all tasks, and that of a task.
SHARED, OWN = "shared", "lora"


@dataclass(frozen=True)
class SharedPlusTaskLoRA(LoRA):
    """W = W_full + (α/r) B_0 A_0 + (α/r) B_d A_d: a shared pair and the task's own, both learned.

        >>> adapter, slot = SharedPlusTaskLoRA(rank=4), Slot("q_proj", ("q_proj",), 16, 32)
        >>> start = adapter.start(slot, None, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'shared_A': (4, 16), 'shared_B': (32, 4), 'lora_A': (4, 16), 'lora_B': (32, 4)}
        >>> from bora_pyro.priors import HierarchicalNormal, with_shared
        >>> with_shared(HierarchicalNormal(tau=100), adapter.shared)
        ByLatent({'shared_A': Pooled(), 'shared_B': Pooled()}, other=HierarchicalNormal(tau=100))

    It is the plain case of :class:`~bora_pyro.adapters.MTLoRA`, which has a rank and a scale for each pair. The default run of
    the released BoRA code learns these two pairs. The prior is what makes ``shared_A`` and ``shared_B`` common to all tasks:
    :func:`~bora_pyro.priors.with_shared` pools the latents that an adapter declares as shared, and puts any given prior on the
    others. The released code has no prior on the task's own pair (here ``Independent()``, τ = 0), or it penalises the norms of
    that pair, which pulls it to zero and not to a mean Θ.

    Both A start at random, independently of each other. Both B start at zero. In LoRA's form (``factors``) the two pairs are one
    pair of rank 2r: [A_0; A_d] and [B_0, B_d].

    Args:
        rank: r of each of the two pairs.
        alpha: α; both changes are scaled by α/r. Default: the rank, so that the scale is 1.
    """

    shared: ClassVar[tuple[str, ...]] = ("shared_A", "shared_B")

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        return Start(start_of_pair(SHARED, self.rank, slot, generator) | start_of_pair(OWN, self.rank, slot, generator))

    def relative_scale(self, pair: str, tensors: Mapping[str, Tensor]) -> float | Tensor:
        """The scale of a pair in units of α/r: a number, or (..., 1, 1).

        Args:
            pair: ``SHARED`` or ``OWN``.
            tensors: as for ``factors``.
        """
        return 1.0

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        assert self.alpha is not None
        pairs = [pair for pair in (SHARED, OWN) if f"{pair}_A" in tensors]
        # the sum of two products as one product: [B_0, B_d] [A_0; A_d] = B_0 A_0 + B_d A_d
        lora_a = torch.cat([tensors[f"{pair}_A"] for pair in pairs], dim=-2)
        scales = [self.relative_scale(pair, tensors) for pair in pairs]
        parts = [tensors[f"{pair}_B"] for pair in pairs]
        parts = [b if isinstance(scale, float) and scale == 1 else scale * b for b, scale in zip(parts, scales, strict=True)]
        rank = lora_a.shape[-2]
        # rounded once, so that α is exactly 2α for two pairs of rank r
        return Factors(lora_a, torch.cat(parts, dim=-1), float(Fraction(self.alpha) * rank / self.rank))

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for pair in (SHARED, OWN):
            if f"{pair}_A" in tensors:
                own = {f"lora_{factor}": tensors[f"{pair}_{factor}"] for factor in ("A", "B")}
                maps = super().linear_maps(x, self.relative_scale(pair, tensors) * gradient, own) or {}
                found |= {name.replace("lora", pair): value for name, value in maps.items()}
        return found

    def kept_per_token(self, slot: Slot) -> int:
        return 2 * self.rank

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        a, b, r = factors.lora_A, factors.lora_B, self.rank
        return {"shared_A": a[:r], "shared_B": b[:, :r], "lora_A": a[r:], "lora_B": b[:, r:]}

    def _factors(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        both = self.factors(tensors)
        return super()._factors(x, {"lora_A": both.lora_A, "lora_B": both.lora_B})


def start_of_pair(pair: str, rank: int, slot: Slot, generator: Generator) -> dict[str, Tensor]:
    """The start of a pair, as LoRA's: A (r, in) at random, and B (out, r) at zero."""
    lora_a = uniform_fan_in((rank, slot.in_features), generator)
    return {f"{pair}_A": lora_a, f"{pair}_B": torch.zeros(slot.out_features, rank)}
