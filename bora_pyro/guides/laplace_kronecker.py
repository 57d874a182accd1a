"""Laplace's approximation with a Kronecker-factored curvature: what varies together among the r components of an adapter."""

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

    The entries of an event stand as n columns of r numbers, r the shorter of its last two dimensions; each column is turned by a
    matrix of its own or by one for all.

    Args:
        loc: m, (*batch, *event), the event's last two dimensions being a matrix.
        scale: s, (*batch, *event[:-2], n, r), the standard deviation along each axis.
        basis: Q, (*batch, *event[:-2], n or 1, r, r), the axes as columns.
        stretch: a factor of each entry, broadcast against ``loc``.
        event_dim: how many of the last dimensions of ``loc`` make one x.
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
        turned = (self.basis @ (self.scale * noise)[..., None])[..., 0]
        return self.loc + self.stretch * from_columns(turned, self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        columns = to_columns((value - self.loc) / self.stretch)
        straight = (self.basis.mT @ columns[..., None])[..., 0]
        of_axes = dist.Normal(0.0, self.scale, validate_args=False).log_prob(straight)
        dims = self.event_dim
        return of_axes.flatten(of_axes.dim() - dims).sum(-1) - self.stretch.abs().log().flatten(self.stretch.dim() - dims).sum(-1)


def to_columns(matrix: Tensor) -> Tensor:
    """(..., a, b) -> (..., n, r): n columns of the shorter dimension's r numbers."""
    return matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix


def from_columns(columns: Tensor, like: Tensor) -> Tensor:
    """``to_columns`` undone, into matrices of the shape of ``like``."""
    return columns.mT if like.shape[-2] <= like.shape[-1] else columns


class KroneckerLaplaceGuide(LaplaceGuide):
    """:class:`~bora_pyro.guides.LaplaceGuide` with the curvature L_d ⊗ diag(v_d) of each task, layer and matrix.

    L is r x r, over the shorter dimension of a matrix (LoRA's rank), and full; v, over the longer one, is diagonal: its full
    factor would have as many entries as the layer itself, for each task. With L = Q diag(λ) Qᵀ the precision of a column j is
    Q diag(τ + λ v_j) Qᵀ, and all formulas of the diagonal case hold in those axes. (Kronecker-factored Laplace: Ritter et al.,
    2018; of LoRA: Yang et al., 2024.)

    Args:
        model: the BoRA model.
        sites: the MAP.
        curvature: by latent, ``<latent>.short``: L, (D, layers, r, r), and ``<latent>.long``: v, (D, layers, n), as
            :func:`~bora_pyro.guides.curvature.kronecker_fisher` gives them.
    """

    def begin(self, name: str, curvature: Weights) -> None:
        short, long = curvature[f"{name}.short"], curvature[f"{name}.long"]
        eigenvalues, basis = torch.linalg.eigh(short)
        self.keep("curvature", name, eigenvalues.clamp(min=0)[..., None, :] * long[..., None])  # (D, layers, n, r)
        self.keep("basis", name, basis[..., None, :, :])  # (D, layers, 1, r, r)

    def of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        basis = self.kept("basis", name)
        coupled = 1 / (1 / tau + 1 / self.kept("curvature", name))  # (D, layers, n, r)
        precision = ((basis * coupled[..., None, :]) @ basis.mT).sum(0)  # (layers, n, r, r)
        eigenvalues, axes = torch.linalg.eigh(precision)
        return RotatedNormal(mean, eigenvalues.clamp(min=LEAST) ** -0.5, axes, event_dim=mean.dim())

    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        h, basis = self.kept("curvature", name), self.kept("basis", name)
        factor = torch.where(tau + h > 0, tau / (tau + h), 0.0)
        straight = (basis.mT @ to_columns(shift)[..., None])[..., 0]
        return from_columns((basis @ (factor * straight)[..., None])[..., 0], shift)

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
    """The Kronecker-factored Laplace approximation; the arguments are those of the diagonal one."""
    sites = start_sites(model) if sites is None else sites
    theta, _ = model.weights_given(sites)
    return KroneckerLaplaceGuide(model, sites, kronecker_fisher(model, theta, None if data is None else data.train, temperature))
