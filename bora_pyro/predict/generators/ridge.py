"""Ridge regression of the adapter on the vector: what every other method has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.predict.generators.base import Method

# The penalties that are tried, in units of the mean eigenvalue of the Gram matrix of the vectors. The largest one gives the mean
# adapter, the smallest one interpolates.
_GRID = (-8, 6, 57)


@dataclass
class Ridge(Method):
    """y = W c with the W that minimises Σ_d ‖y_d − W c_d‖² + λ ‖W‖² (Hoerl and Kennard, 1970).

        >>> generator = torch.Generator().manual_seed(0)
        >>> c = torch.randn((20, 5), generator=generator, dtype=torch.float64)
        >>> c = c - c.mean(0)
        >>> method = Ridge()
        >>> method.fit(c, c @ torch.arange(10.0, dtype=torch.float64).view(5, 2))
        >>> torch.allclose(method.generate(torch.ones(5, dtype=torch.float64)), torch.tensor([20.0, 25.0]).double())
        True

    λ has the lowest error when each task is left out in turn. That error needs no further fits: the residual of task d is
    divided by 1 − H_dd, where H is the matrix that maps y to its prediction, intercept included.

    Args:
        penalty: λ in units of the mean eigenvalue of the Gram matrix of the vectors; None: chosen as described.

    Raises:
        InputError: the penalty is not a number above 0.
    """

    penalty: float | None = None

    def __post_init__(self) -> None:
        if self.penalty is not None and not 0 < self.penalty < math.inf:
            raise InputError(f"penalty is {self.penalty}; give a finite number above 0, or leave it out to have it chosen")

    def fit(self, vectors: Tensor, latents: Tensor, *, draws: Tensor | None = None, seed: int = 0) -> None:
        values, directions = _spectrum(vectors)
        unit = float(values.mean()) or 1.0
        in_directions = directions.mT @ latents  # (D - 1, q)
        grid = [self.penalty] if self.penalty is not None else torch.logspace(*_GRID, dtype=torch.float64).tolist()
        errors = []
        for penalty in grid:
            shrink = penalty * unit / (values + penalty * unit)
            left = directions.square() @ shrink  # 1 - H_dd
            residuals = directions @ (shrink[:, None] * in_directions) / left[:, None]
            errors.append(float(residuals.square().sum()))
        # the first of several equal ones would interpolate where nothing is to be learned
        best = max(range(len(grid)), key=lambda n: (-errors[n], n))
        self._chosen = grid[best]
        dual = directions @ (in_directions / (values + self._chosen * unit)[:, None])
        self._weight = (vectors.mT @ dual).mT  # (q, hidden)

    def generate(self, vector: Tensor, *, draw: int | None = None) -> Tensor:
        return self._weight @ vector

    def state(self) -> dict[str, Tensor]:
        return {"weight": self._weight, "penalty": torch.tensor(self._chosen, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._weight, self._chosen = state["weight"], float(state["penalty"])

    def chosen(self) -> dict[str, Any]:
        return {"penalty": self._chosen}


def _spectrum(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D - 1,) and eigenvectors (D, D - 1) of the Gram matrix, orthogonal to the constant vector."""
    tasks = len(vectors)
    # an orthonormal basis of all that is orthogonal to the constant vector: the intercept takes that direction
    constant = torch.cat([vectors.new_ones(tasks, 1), torch.eye(tasks, dtype=vectors.dtype)[:, : tasks - 1]], 1)
    complement = torch.linalg.qr(constant).Q[:, 1:]
    projected = complement.mT @ vectors
    values, inner = torch.linalg.eigh(projected @ projected.mT)
    return values.clamp(min=0), complement @ inner
