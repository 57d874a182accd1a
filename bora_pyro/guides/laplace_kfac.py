"""Laplace's approximation with the K-FAC curvature: both sides of each matrix of an adapter have their own axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.aligned_normal import AlignedNormal, scale_along
from bora_pyro.guides.around_map import start_sites
from bora_pyro.guides.kfac import KroneckerCurvature, kfac, no_curvature
from bora_pyro.guides.laplace import LEAST, Coordinates, LaplaceGuide, check_temperatures
from bora_pyro.guides.matrix_normal import from_columns, to_columns
from bora_pyro.model import BoRA


class KfacLaplaceGuide(LaplaceGuide):
    """:class:`~bora_pyro.guides.LaplaceGuide` with the curvature of :func:`~bora_pyro.guides.kfac.kfac`.

    All tasks have the same axes, and τ is the same in all directions of a matrix. So all formulas of the diagonal case hold along
    the axes.

    Args:
        model: the BoRA model.
        sites: the MAP.
        curvature: by latent, as ``kfac`` returns it.
        draw_mean: as for ``LaplaceGuide``.
        temperatures: as for ``LaplaceGuide``.

    Raises:
        InputError: as for ``LaplaceGuide``; or τ differs between the entries of a matrix.
    """

    def begin(self, name: str, curvature: Mapping[str, Any]) -> None:
        own: KroneckerCurvature = curvature[name]
        tau = self.tau(name)
        if tau.dim() >= 2 and tau.shape[-2:] != (1, 1):
            raise InputError(f"tau of {name!r} differs between the entries of a matrix; use the guide laplace, which is diagonal")
        self.keep("curvature", name, own.along)
        self.keep("long", name, own.long)
        self.keep("short", name, own.short)

    def normal_of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        precision = (1 / (1 / tau + 1 / self.kept("curvature", name))).sum(0).clamp(min=LEAST)
        return AlignedNormal(mean, precision**-0.5, *self._axes(name), event_dim=mean.dim())

    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        h, (long, short) = self.kept("curvature", name), self._axes(name)
        factor = torch.where(tau + h > 0, tau / (tau + h), 0.0)
        return from_columns(scale_along(to_columns(shift) @ short, factor, long) @ short.mT, shift)

    def of_tasks(self, name: str, loc: Tensor, tau: Tensor, slope: Tensor) -> dist.TorchDistribution:
        scale = (tau + self.kept("curvature", name)).clamp(min=LEAST) ** -0.5
        return AlignedNormal(loc, scale, *self._axes(name), stretch=slope, event_dim=loc.dim() - 1)

    def coordinates(self, name: str, values: Tensor) -> list[Coordinates]:
        h, (long, short) = self.kept("curvature", name), self._axes(name)
        n, k = long.shape[-2:]
        columns = to_columns(values) @ short
        along = long.mT @ columns
        found = [Coordinates(along, h[..., :k, :])]
        if k < n:  # the n coordinates of a part in n − k dimensions
            found.append(Coordinates(columns - long @ along, h[..., k:, :].expand(*h.shape[:-2], n, -1), share=(n - k) / n))
        return found

    def _axes(self, name: str) -> tuple[Tensor, Tensor]:
        return self.kept("long", name), self.kept("short", name)


def laplace_kfac_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    axes: int = 64,
    draw_mean: bool = True,
    temperatures: str | Sequence[float] = "",
) -> KfacLaplaceGuide:
    """The Laplace approximation with K-FAC.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
        >>> guide = laplace_kfac_guide(model, bp.fit(model, data, epochs=1).sites(), data=data, axes=8)
        >>> guide()["prior_mean.q_proj.lora_A"].shape
        torch.Size([4, 1, 256])

    Args:
        model: the BoRA model.
        sites: the MAP; default: the start of the adapters.
        data: the documents of the fit. Without them the curvature is 0, and the guide is the prior around the MAP.
        scale: not used; the standard deviations follow from the curvature.
        temperature: the curvature is divided by it.
        axes: the largest number of axes on the longer side of a matrix. The other directions have their mean curvature.
        draw_mean: as for ``LaplaceGuide``.
        temperatures: as for ``LaplaceGuide``, in place of ``temperature``.
    """
    check_temperatures(temperature, temperatures)
    sites = start_sites(model) if sites is None else sites
    theta, _ = model.weights_given(sites)
    curvature = (
        no_curvature(model, axes=axes) if data is None else kfac(model, theta, data.train, axes=axes, temperature=temperature)
    )
    return KfacLaplaceGuide(model, sites, curvature, draw_mean=draw_mean, temperatures=temperatures)
