"""Laplace's approximation with a Kronecker-factored curvature: the r components of an adapter are correlated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.around_map import start_sites
from bora_pyro.guides.curvature import kronecker_fisher
from bora_pyro.guides.laplace import LEAST, Coordinates, LaplaceGuide, check_temperatures
from bora_pyro.guides.matrix_normal import from_columns, to_columns
from bora_pyro.guides.rotated_normal import RotatedNormal
from bora_pyro.model import BoRA


class KroneckerLaplaceGuide(LaplaceGuide):
    """:class:`~bora_pyro.guides.LaplaceGuide` with the curvature L_d ⊗ diag(v_d) of each task, layer and matrix.

    L is a full r x r matrix, for the shorter dimension of a matrix (LoRA's rank). The factor for the longer dimension is the
    diagonal v: a full factor would have as many entries as the layer, for each task. With L = Q diag(λ) Qᵀ the precision of a
    column j is Q diag(τ + λ v_j) Qᵀ, and all formulas of the diagonal case hold along the axes Q. (Kronecker-factored Laplace:
    Ritter et al., 2018; for LoRA: Yang et al., 2024.)

    Args:
        model: the BoRA model.
        sites: the MAP.
        curvature: for each latent ``<latent>.short``: L, (D, layers, r, r), and ``<latent>.long``: v, (D, layers, n), as
            :func:`~bora_pyro.guides.curvature.kronecker_fisher` returns them.
        draw_mean: as for ``LaplaceGuide``.
        temperatures: as for ``LaplaceGuide``.
    """

    def begin(self, name: str, curvature: Mapping[str, Any]) -> None:
        short, long = curvature[f"{name}.short"], curvature[f"{name}.long"]
        eigenvalues, basis = torch.linalg.eigh(short)
        self.keep("curvature", name, eigenvalues.clamp(min=0)[..., None, :] * long[..., None])  # (D, layers, n, r)
        self.keep("basis", name, basis[..., None, :, :])  # (D, layers, 1, r, r)

    def coordinates(self, name: str, values: Tensor) -> list[Coordinates]:
        raise InputError("the tasks of guide laplace_kronecker have no common axes; use laplace_kfac or laplace")

    def normal_of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        basis = self.kept("basis", name)
        of_tasks = 1 / (1 / tau + 1 / self.kept("curvature", name))  # (D, layers, n, r)
        precision = ((basis * of_tasks[..., None, :]) @ basis.mT).sum(0)  # (layers, n, r, r)
        eigenvalues, axes = torch.linalg.eigh(precision)
        return RotatedNormal(mean, eigenvalues.clamp(min=LEAST) ** -0.5, axes, event_dim=mean.dim())

    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        h, basis = self.kept("curvature", name), self.kept("basis", name)
        factor = torch.where(tau + h > 0, tau / (tau + h), 0.0)
        along_axes = (basis.mT @ to_columns(shift)[..., None])[..., 0]
        return from_columns((basis @ (factor * along_axes)[..., None])[..., 0], shift)

    def of_tasks(self, name: str, loc: Tensor, tau: Tensor, slope: Tensor) -> dist.TorchDistribution:
        scale = (tau + self.kept("curvature", name)).clamp(min=LEAST) ** -0.5
        return RotatedNormal(loc, scale, self.kept("basis", name), stretch=slope, event_dim=loc.dim() - 1)


def laplace_kronecker_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    draw_mean: bool = True,
    temperatures: str | Sequence[float] = "",
) -> KroneckerLaplaceGuide:
    """Laplace with one full Kronecker factor; the arguments are those of :func:`~bora_pyro.guides.laplace_guide`."""
    check_temperatures(temperature, temperatures)
    sites = start_sites(model) if sites is None else sites
    theta, _ = model.weights_given(sites)
    curvature = kronecker_fisher(model, theta, None if data is None else data.train, temperature)
    return KroneckerLaplaceGuide(model, sites, curvature, draw_mean=draw_mean, temperatures=temperatures)
