"""Coordinates of adapters: standardised with the training tasks alone, in the linear basis of their deviations.

>>> layout = Layout({"q_proj.lora_B": (2, 3)})
>>> latents = torch.randn((4, 6), generator=torch.Generator().manual_seed(0))  # four tasks
>>> space = Space.of(latents, layout)
>>> torch.equal(space.standard.restore(space.standard.standardise(latents)), latents)
True
>>> coordinates = space.coordinates(latents)
>>> coordinates.shape, torch.allclose(space.latents(coordinates), latents, atol=1e-6)
(torch.Size([4, 3]), True)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.predict.generators.layout import Layout

# Directions with less than this share of the largest singular value are rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Standard:
    """The mean adapter of the training tasks, and one scale for each latent.

    The scale is the root mean square of the deviations from the mean, over tasks and entries, rounded to a power of two. The
    matrices A and B then weigh about the same. A division by a power of two is exact, so ``restore`` gives back every float32
    number that ``standardise`` was given (unless an entry of the mean is more than 2²⁸ times as large).

    Attributes:
        layout: the latents.
        centre: (P,) float32.
        scales: (latents,) float64.
    """

    layout: Layout
    centre: Tensor
    scales: Tensor

    @classmethod
    def of(cls, latents: Tensor, layout: Layout) -> Standard:
        """The standard of training tasks with the adapters (D, P)."""
        centre = latents.double().mean(0).float()
        deviations = (latents.double() - centre.double()).split(layout.sizes, -1)
        scales = torch.stack([part.square().mean().sqrt() for part in deviations])
        # a latent that all tasks share has no deviations
        return cls(layout, centre, torch.where(scales > 0, scales, 1.0).log2().round().exp2())

    def standardise(self, latents: Tensor) -> Tensor:
        """Adapters (..., P) in standard units, float64."""
        return (latents.double() - self.centre.double()) / self.layout.by_entry(self.scales)

    def restore(self, standardised: Tensor) -> Tensor:
        """Adapters (..., P) float32: ``standardise`` undone."""
        return (standardised.double() * self.layout.by_entry(self.scales) + self.centre.double()).float()


@dataclass(frozen=True, eq=False)
class Space:
    """The linear space of the training tasks' adapters around their mean.

    The basis has the directions of the singular value decomposition of the standardised adapters of D tasks, D − 1 at most. No
    linear method can leave this space, and it makes the output of a decoder small: an adapter has 10⁴ to 10⁷ entries. Draws of a
    posterior are projected on it. What they lose is the spread of a single task, which is in other directions for the most part.

    Attributes:
        standard: mean and scales.
        basis: (P, q) float32, orthonormal columns.
        unit: the root mean square of the training tasks' coordinates before they are divided by it.
        share: share of the variance between the training tasks that the basis keeps.
    """

    standard: Standard
    basis: Tensor
    unit: float
    share: float = 1.0

    @classmethod
    def of(cls, latents: Tensor, layout: Layout, *, components: int | None = None) -> Space:
        """The space of training tasks.

        Args:
            latents: (D, P), the adapters.
            layout: the latents.
            components: the largest number of directions, those with the largest variance; None: all.
        """
        standard = Standard.of(latents, layout)
        deviations = standard.standardise(latents)
        _, values, directions = torch.linalg.svd(deviations, full_matrices=False)
        rank = int((values > _ROUNDING * values[0]).sum()) if float(values[0]) else 0
        kept = min(rank, len(latents) - 1) if components is None else min(rank, len(latents) - 1, components)
        total = float(values.square().sum())
        # the largest entry of a direction is positive: the sign of a singular vector is arbitrary
        chosen = directions[:kept]
        signs = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
        basis = (chosen * signs).mT.float().contiguous()
        unit = float((deviations @ basis.double()).square().mean().sqrt()) if kept else 1.0
        return cls(standard, basis, unit, float(values[:kept].square().sum()) / total if total else 1.0)

    @property
    def components(self) -> int:
        """q, the number of coordinates."""
        return self.basis.shape[1]

    def coordinates(self, latents: Tensor) -> Tensor:
        """(..., q) float64, the coordinates of adapters (..., P). Over the training tasks their mean square is 1."""
        return self.standard.standardise(latents) @ self.basis.double() / self.unit

    def latents(self, coordinates: Tensor) -> Tensor:
        """(..., P) float32, the adapters with the coordinates (..., q)."""
        return self.standard.restore(self.unit * coordinates @ self.basis.double().mT)

    def without_basis(self) -> Space:
        """The mean adapter alone."""
        return Space(self.standard, self.basis[:, :0].clone(), 1.0, 0.0)

    def state(self) -> dict[str, Tensor]:
        """The tensors of the space."""
        numbers = torch.tensor([self.unit, self.share], dtype=torch.float64)
        return {"centre": self.standard.centre, "scales": self.standard.scales, "basis": self.basis, "numbers": numbers}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], layout: Layout) -> Space:
        """The space that has this state."""
        unit, share = state["numbers"].tolist()
        return cls(Standard(layout, state["centre"], state["scales"]), state["basis"], unit, share)
