"""IVON, the improved variational online Newton method (Shen et al., ICML 2024): mean field with natural-gradient steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides.normal import NormalGuide
from bora_pyro.model import BoRA


class IvonGuide(NormalGuide):
    """The mean-field Normal q(x) = Normal(m, diag(s²)), which :func:`~bora_pyro.inference.fit.fit` moves by natural gradients.

    The distribution and the objective are those of the guide ``normal``; the steps differ. AdamW divides a gradient by its own
    size, so that all entries move at the same pace. IVON divides it by the entry's curvature, so that the pace of an entry is its
    own standard deviation: :mod:`bora_pyro.inference.ivon` has the formulas.

    The learning rate α of the method is ``pace`` times the learning rate of the fit, because the two have other units: α is a
    part of a Newton step. Gradients are not clipped, as that would falsify the curvature; ``reach`` bounds the steps instead.
    ``deviation_reach`` has no effect.

    Args:
        model: the BoRA model.
        sites: values of the sample sites at the start; default: the start of the adapters.
        scale: the initial standard deviations, in units of the prior's.
        pace: α over the learning rate of the fit. With the usual learning rate of a posterior, 0.003, α is about 0.1.
        beta: the memory of the mean of the gradients, β₁.
        curvature_beta: the memory of the curvature, β₂. The larger 1 − β₂, the faster and the noisier are the scales.
        reach: the largest step of an entry, in its standard deviations.

    Raises:
        InputError: an option is out of range.
    """

    def __init__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor] | None = None,
        *,
        scale: float = 0.1,
        pace: float = 30.0,
        beta: float = 0.9,
        curvature_beta: float = 0.99,
        reach: float = 1.0,
    ) -> None:
        if not 0 < pace < math.inf:
            raise InputError(f"pace is {pace}; give a finite number above 0")
        if not reach > 0:
            raise InputError(f"reach is {reach}; give a number above 0, or inf")
        for name, value in (("beta", beta), ("curvature_beta", curvature_beta)):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value}; give a number from 0 to below 1")
        super().__init__(model, sites, scale=scale)
        self.pace, self.beta, self.curvature_beta, self.reach = pace, beta, curvature_beta, reach


def ivon_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    pace: float = 30.0,
    beta: float = 0.9,
    curvature_beta: float = 0.99,
    reach: float = 1.0,
) -> IvonGuide:
    """:class:`IvonGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``data`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> ivon_guide(model, pace=10).pace
    10
    """
    return IvonGuide(model, sites, scale=scale, pace=pace, beta=beta, curvature_beta=curvature_beta, reach=reach)
