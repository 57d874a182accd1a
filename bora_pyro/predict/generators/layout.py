"""The latents of all layers as one flat vector, and back.

>>> layout = Layout({"q_proj.lora_A": (4, 2, 8), "q_proj.lora_B": (4, 8, 2)})
>>> layout.size
128
>>> weights = {name: torch.randn(3, *shape) for name, shape in layout.shapes.items()}  # of three tasks
>>> flat = layout.flatten(weights)
>>> flat.shape, all(torch.equal(value, weights[name]) for name, value in layout.unflatten(flat).items())
(torch.Size([3, 128]), True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The order of the latents in a flat vector.

    Attributes:
        shapes: the shape of each latent, (layers, *shape), by name.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Layout:
        """The layout of one task's latents, (layers, *shape) by name."""
        return cls({name: tuple(value.shape) for name, value in weights.items()})

    @property
    def sizes(self) -> list[int]:
        """The number of entries of each latent."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """P, the number of entries of an adapter."""
        return sum(self.sizes)

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(..., P) from latents (..., layers, *shape) by name."""
        parts = []
        for name, shape in self.shapes.items():
            value = weights[name]
            parts.append(value.reshape(*value.shape[: value.dim() - len(shape)], -1))
        return torch.cat(parts, -1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Latents (..., layers, *shape) by name, from (..., P)."""
        parts = flat.split(self.sizes, -1)
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def by_entry(self, values: Tensor) -> Tensor:
        """(P,): one number for each latent (latents,), repeated for each of its entries."""
        return values.repeat_interleave(torch.tensor(self.sizes))
