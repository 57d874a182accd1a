"""The adapter of the training task with the nearest vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bora_pyro.predict.generators.base import Method


@dataclass
class Nearest(Method):
    """The adapter of the training task whose vector has the smallest Euclidean distance; the first one of several.

    >>> import torch
    >>> method = Nearest()
    >>> method.fit(torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[4.0], [5.0], [6.0]]))
    >>> method.generate(torch.tensor([0.7]))
    tensor([6.])
    """

    def fit(self, vectors: Tensor, latents: Tensor, *, draws: Tensor | None = None, seed: int = 0) -> None:
        self._vectors, self._latents = vectors.clone(), latents.clone()

    def generate(self, vector: Tensor, *, draw: int | None = None) -> Tensor:
        return self._latents[int((self._vectors - vector).square().sum(1).argmin())]

    def state(self) -> dict[str, Tensor]:
        return {"vectors": self._vectors, "latents": self._latents}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._vectors, self._latents = state["vectors"], state["latents"]
