"""The mean adapter, whatever the vector: the baseline that uses no vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bora_pyro.predict.generators.base import Method


@dataclass
class Mean(Method):
    """The mean of the training tasks' adapters. It is Θ of a fit in which all tasks have one τ: there Σ_d τ (θ_d − Θ) = 0.

    >>> method = Mean()
    >>> method.fit(torch.zeros(3, 2), torch.tensor([[1.0], [2.0], [-3.0]]))
    >>> method.generate(torch.ones(2))
    tensor([0.], dtype=torch.float64)
    """

    uses_latents: ClassVar[bool] = False

    def fit(self, vectors: Tensor, latents: Tensor, *, draws: Tensor | None = None, seed: int = 0) -> None:
        self._size = latents.shape[1]

    def generate(self, vector: Tensor, *, draw: int | None = None) -> Tensor:
        return torch.zeros(self._size, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._size = 0  # without a use for coordinates, a stored generator has none
