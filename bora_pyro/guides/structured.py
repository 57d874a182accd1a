"""A Normal guide with the structure of the hierarchy: each task's deviation depends on Θ and on τ as it does in the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.guides.base import tensor_key
from bora_pyro.guides.normal import NormalGuide
from bora_pyro.guides.sinh_arcsinh import skewed_normal
from bora_pyro.model import BoRA

#: The largest initial standard deviation of a deviation, in units of the prior's: documents make it narrower than the prior.
WIDEST = 0.99
_MEAN, _GROUP, _THETA, _WHITENED, _TAU = "prior_mean.", "group.", "theta.", "_decentered", "precision."


class StructuredNormalGuide(NormalGuide):
    """q(Θ) q(τ) Π_d q(δ_d | Θ, τ), with one mean and one standard deviation for every entry, as many as mean field has.

        >>> import bora_pyro as bp
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> sites = StructuredNormalGuide(model)(split.batches()[0])
        >>> sites["theta.q_proj.lora_A_decentered"].shape
        torch.Size([2, 4, 1, 256])

    The documents determine θ_d = Θ + δ_d better than Θ or δ_d. So the two are negatively correlated in the posterior, and a
    mean-field guide, which cannot say this, makes Θ and δ_d too narrow. Suppose that the documents of task d have the curvature h
    in an entry, and that θ_d = r would fit them best. The posterior of δ_d given Θ and τ is then

        Normal(h/(h + τ) (r − Θ), 1/(h + τ)).

    The guide has this form in every entry (structured variational inference: Hoffman and Blei, 2015). Its parameters are, for the
    reference τ₀ at which it was built, log(h/τ₀) and the mean m of the whitened deviation z_d = √τ₀ δ_d at the centre μ of Θ.
    With s² = τ/(h + τ), s₀² = τ₀/(h + τ₀),

        z_d | Θ, τ ~ Normal(m √(τ₀/τ) s²/s₀² − √τ (1 − s²) (Θ − μ), s²).

    The standard deviation alone gives the slope, so that the structure needs no further parameter. For a linear-Gaussian
    likelihood with known τ, the optimum of the ELBO is the exact posterior. The logarithm of a random τ has a skewed distribution
    (:class:`~bora_pyro.guides.sinh_arcsinh.SinhArcsinh`). In the centred form, the site is θ_d itself. If tasks have groups,
    the mean Θ_g of the task's group is in the place of Θ, and the means of the groups have a mean-field Normal. Sites without
    such a pair (under independent or pooled tasks, and in an adaptation, where Θ is given) have a mean-field Normal.

    Args:
        model: the BoRA model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        scale: the initial standard deviations, in units of the prior's; those of deviations are at most ``WIDEST``.

    Raises:
        InputError: ``scale`` is not above 0.
    """

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        latent = _latent_of(name)
        if latent is None or not self._follows(latent):
            super().begin(name, centre, deviation, event_dim)
            if name.startswith(_TAU):
                for kind in ("skew", "log_tail"):
                    self.put(kind, name, torch.zeros_like(centre), event_dim)
            return
        self.put("loc", name, centre, event_dim)
        relative = centre.new_tensor(min(self._scale, WIDEST))  # s₀
        self.put("log_curvature", name, (relative**-2 - 1).log().expand(centre.shape), event_dim)
        tau = self.model.prior.precision(latent, self.model.starts[latent])
        self.register_buffer(tensor_key("tau", latent), tau.detach().clone(memory_format=torch.contiguous_format))

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        if not name.startswith(_TAU):
            return super().unconstrained(name, event_dim)
        loc, log_scale, skew, log_tail = (self.get(kind, name) for kind in ("loc", "log_scale", "skew", "log_tail"))
        return skewed_normal(loc, log_scale.exp(), skew, log_tail.exp()).to_event(event_dim)

    def given(
        self, name: str, event_dim: int, values: Mapping[str, Tensor], plates: Mapping[str, pyro.plate]
    ) -> dist.TorchDistribution:
        latent = self._latent(name)
        if latent is None:
            return self.unconstrained(name, event_dim)
        loc, log_curvature = self.get("loc", name), self.get("log_curvature", name)
        first = getattr(self, tensor_key("tau", latent))
        tau = self.model.prior.precision(latent, self.model.starts[latent], values)
        if tau.dim() > values[_MEAN + latent].dim():  # a τ for each task
            first, tau = (value[plates["tasks"].indices.to(value.device)] for value in (first, tau))
        ratio = tau / first
        share = torch.sigmoid(ratio.log() - log_curvature)  # s² = τ/(h + τ)
        shift = self._shift(latent, values, plates)
        if name.endswith(_WHITENED):
            mean = loc * share / (torch.sigmoid(-log_curvature) * ratio.sqrt()) - tau.sqrt() * (1 - share) * shift
            scale = share.sqrt()
        else:
            mean, scale = loc + share * shift, (share / tau).sqrt()
        return dist.Normal(mean, scale, validate_args=False).to_event(event_dim)

    def _shift(self, latent: str, values: Mapping[str, Tensor], plates: Mapping[str, pyro.plate]) -> Tensor:
        """How far the centre of the tasks, Θ or the mean of each task's group, is from that at the guide's own centre."""
        above = (_MEAN + latent, f"{_GROUP}{latent}{_WHITENED}")
        with poutine.block():  # the means of groups have no row for each task, though they are read inside the plate of tasks
            at_centre = {site: self.get("loc", site) for site in above if site in values}
        shift = self.model.prior.centre(latent, values) - self.model.prior.centre(latent, at_centre)
        if shift.dim() > values[_MEAN + latent].dim():
            shift = shift[plates["tasks"].indices.to(shift.device)]
        return shift

    def _follows(self, latent: str) -> bool:
        """Whether a latent of the tasks depends on Θ: Θ is a site, and τ is neither 0 nor infinite."""
        if _MEAN + latent not in self.prototype_trace.nodes or latent not in self.model.starts:
            return False
        tau = self.model.prior.precision(latent, self.model.starts[latent])
        return bool((tau > 0).all()) and not bool(tau.isinf().any())

    def _latent(self, name: str) -> str | None:
        """The latent of a site of the tasks that depends on Θ, as ``begin`` has decided; None for other sites."""
        latent = _latent_of(name)
        return latent if latent is not None and hasattr(self, tensor_key("tau", latent)) else None

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The centre of every site; deviations at the centres of Θ and τ."""
        values = super().median(*args, **kwargs)
        for name in values:
            latent = self._latent(name)
            if latent is not None and name.endswith(_WHITENED):
                tau = self.model.prior.precision(latent, self.model.starts[latent], values)
                ratio, log_curvature = tau / getattr(self, tensor_key("tau", latent)), self.get("log_curvature", name).detach()
                share = torch.sigmoid(ratio.log() - log_curvature) / torch.sigmoid(-log_curvature)
                values[name] = values[name] * share / ratio.sqrt()
        return values


def _latent_of(name: str) -> str | None:
    """The latent of a site of the tasks; None for other sites."""
    return name.removeprefix(_THETA).removesuffix(_WHITENED) if name.startswith(_THETA) else None


def structured_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
) -> StructuredNormalGuide:
    """:class:`StructuredNormalGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``data`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> type(structured_guide(model)).__name__
    'StructuredNormalGuide'
    """
    return StructuredNormalGuide(model, sites, scale=scale)
