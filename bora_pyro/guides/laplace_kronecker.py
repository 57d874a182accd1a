"""Laplace's approximation with a Kronecker-factored curvature: the r components of an adapter are correlated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides.curvature import kronecker_fisher
from bora_pyro.guides.laplace import LEAST, LaplaceGuide, start_sites
from bora_pyro.model import BoRA, Weights


class RotatedNormal(dist.TorchDistribution):
    """Normal along orthonormal axes: x = m + stretch · to_shape(Q (s · ε)), ε ~ Normal(0, I).

    The last two dimensions of an event are a matrix, read as n columns of r numbers, where r is the shorter dimension. Each
    column is rotated, by its own Q or by one Q for all columns.

    Args:
        loc: m, (*batch, *event).
        scale: s, (*batch, *event[:-2], n, r), the standard deviation along each axis.
        basis: Q, (*batch, *event[:-2], n or 1, r, r), the axes as columns.
        stretch: a factor of each entry; it broadcasts against ``loc``.
        event_dim: number of event dimensions: the last ones of ``loc``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, basis: Tensor, *, stretch: Tensor | float = 1.0, event_dim: int) -> None:
        self.loc, self.scale, self.basis = loc, scale, basis
        self.stretch = torch.as_tensor(stretch, dtype=loc.dtype, device=loc.device).expand(loc.shape)
        batch = loc.dim() - event_dim
        super().__init__(loc.shape[:batch], loc.shape[batch:], validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: torch.Size, _instance: dist.TorchDistribution | None = None) -> RotatedNormal:
        batch_shape, own = torch.Size(batch_shape), len(self.batch_shape)
        loc, scale, basis, stretch = (
            value.expand(*batch_shape, *value.shape[own:]) for value in (self.loc, self.scale, self.basis, self.stretch)
        )
        return RotatedNormal(loc, scale, basis, stretch=stretch, event_dim=self.event_dim)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        noise = torch.randn((*sample_shape, *self.scale.shape), dtype=self.loc.dtype, device=self.loc.device)
        rotated = (self.basis @ (self.scale * noise)[..., None])[..., 0]
        return self.loc + self.stretch * from_columns(rotated, self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        columns = to_columns((value - self.loc) / self.stretch)
        along_axes = (self.basis.mT @ columns[..., None])[..., 0]
        densities = dist.Normal(0.0, self.scale, validate_args=False).log_prob(along_axes)
        dims = self.event_dim
        log_stretch = self.stretch.abs().log()
        return densities.flatten(densities.dim() - dims).sum(-1) - log_stretch.flatten(log_stretch.dim() - dims).sum(-1)


def to_columns(matrix: Tensor) -> Tensor:
    """(..., a, b) -> (..., n, r): n columns of r numbers, where r is the shorter dimension."""
    return matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix


def from_columns(columns: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``to_columns``, for matrices of the shape of ``like``."""
    return columns.mT if like.shape[-2] <= like.shape[-1] else columns


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
    """

    def begin(self, name: str, curvature: Weights) -> None:
        short, long = curvature[f"{name}.short"], curvature[f"{name}.long"]
        eigenvalues, basis = torch.linalg.eigh(short)
        self.keep("curvature", name, eigenvalues.clamp(min=0)[..., None, :] * long[..., None])  # (D, layers, n, r)
        self.keep("basis", name, basis[..., None, :, :])  # (D, layers, 1, r, r)

    def of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
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
) -> KroneckerLaplaceGuide:
    """The Kronecker-factored Laplace approximation; the arguments are those of :func:`~bora_pyro.guides.laplace_guide`."""
    sites = start_sites(model) if sites is None else sites
    theta, _ = model.weights_given(sites)
    return KroneckerLaplaceGuide(model, sites, kronecker_fisher(model, theta, None if data is None else data.train, temperature))
