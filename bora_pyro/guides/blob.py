"""BLoB, Bayesian low-rank adaptation by backpropagation (Wang et al., NeurIPS 2024): A is Normal, B is a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.guides.base import SiteGuide, is_real
from bora_pyro.model import BoRA

#: The latents that are random if none are named.
RANDOM = "lora_A"


class BlobGuide(SiteGuide):
    """q(A) = Normal(M, diag(Ω²)) with Ω = G ⊙ G, and a point mass at all other latents (Wang et al., arXiv 2406.11675).

    B starts at 0, so a random A alone changes nothing at first, and the noise of ΔW = s B A lies in the space of the columns of
    B. The paper's prior of A is Normal(0, σ_p²), and KL(q ‖ p) = Σ (M² + Ω²)/(2 σ_p²) − log(Ω/σ_p) − ½. Here the prior is that
    of the model: Θ_A and the deviations of A are both Normal, each with the KL divergence from its own prior. A point mass adds
    −log p to the objective, as in MAP.

    The paper prefers G to a softplus because Ω then converges faster. The sign of an entry of G means nothing. All documents of
    a task share one draw in each step. The paper's flipout gives each document its own signs of a common draw. It only reduces
    the variance of the gradients, and is not used here.

    Args:
        model: the BoRA model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        random: the latents that are Normal, by the ends of their names, as a sequence or as a text with commas.
        scale: the initial Ω, in units of the prior's standard deviation.

    Raises:
        InputError: a name in ``random`` is that of no latent, the scale is not above 0, or a site is not real.
    """

    def __init__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor] | None = None,
        *,
        random: str | Sequence[str] = RANDOM,
        scale: float = 0.1,
    ) -> None:
        names = [name.strip() for name in (random.split(",") if isinstance(random, str) else random)]
        known = sorted({latent.rpartition(".")[2] for latent in model.starts})
        for name in names:
            if not any(_ends(latent, name) for latent in model.starts):
                raise InputError(
                    f"guide blob makes the latent {shown(name)} random, which {model.adapter} does not have; it has "
                    f"{', '.join(known)}{nearest(name, known)} (--guide_option random=NAME)"
                )
        super().__init__(model, sites, scale=scale)
        self._random = names

    def is_random(self, site: str) -> bool:
        """Whether a sample site is Normal: one of a latent that is named in ``random``."""
        latent = site.removeprefix("prior_mean.").removeprefix("theta.").removesuffix("_decentered")
        return any(_ends(latent, name) for name in self._random)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if not is_real(site["fn"].support):
                raise InputError(
                    f"BlobGuide cannot take {name!r}, which is not a real number, as a random tau; use the guide normal"
                )

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        self.put("loc", name, centre, event_dim)
        if self.is_random(name):
            self.put("root_scale", name, deviation.sqrt().expand(centre.shape), event_dim)  # G

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        loc = self.get("loc", name)
        if not self.is_random(name):
            return dist.Delta(loc, event_dim=event_dim)
        return dist.Normal(loc, self.get("root_scale", name).square(), validate_args=False).to_event(event_dim)


def _ends(latent: str, name: str) -> bool:
    return latent == name or latent.endswith(f".{name}")


def blob_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    random: str | Sequence[str] = RANDOM,
) -> BlobGuide:
    """:class:`BlobGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``data`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
    >>> guide = blob_guide(model)
    >>> guide.is_random("prior_mean.q_proj.lora_A"), guide.is_random("theta.q_proj.lora_B_decentered")
    (True, False)
    """
    return BlobGuide(model, sites, random=random, scale=scale)
