"""SWAG: a Normal with the mean and the spread of the steps of a fit (Maddox et al., 2019; for LoRA: Onal et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, check_at_least
from bora_pyro.guides.base import SiteGuide, is_real, tensor_key
from bora_pyro.guides.from_steps import FromSteps
from bora_pyro.guides.held_out import HeldOut, positive_numbers
from bora_pyro.model import BoRA

#: The values of ``scales`` that are tried if none are given.
SCALES = "0.1,0.3,1,3"
# The random weights of the columns, which all sites share.
_WEIGHTS = "_swag_weights"


class SwagGuide(SiteGuide, FromSteps):
    """θ = m + c (σ ε₁ / √2 + D ε₂ / √(2 (n − 1))), with ε₁ and ε₂ standard Normal (Maddox et al., 2019, equation 1).

    m is the mean of the steps of the fit, σ² the variance of each entry over them, and D has the last n ≤ K deviations from the
    running mean. All sites share ε₂: Θ and the tasks' deviations are drawn with the correlations that they had in the fit. With
    less than two columns there is no second term. The scale c is chosen by held-out documents (:meth:`settle`).

    During the fit the guide is a point mass, and the objective is that of MAP. A fit has these differences
    (:class:`~bora_pyro.guides.from_steps.FromSteps`):

    - The learning rate stays constant after the warm-up. With a rate that falls to 0 the steps would show how fast it falls.
    - The steps after the warm-up count. Mean and variance give step s, counted from there, the weight s (s + 1): a MAP estimate
      still moves when the fit starts, and the weights forget that. The columns have equal weights; with the default options they
      span the last two and a half epochs, which have 80 % of the weights in a fit of six.
    - The state that is kept is the mean of the epoch with the lowest validation perplexity, with the spread up to there.

    The spread is that of AdamW's steps: its size depends on the learning rate, hence the scale. It takes K + 1 numbers for each
    parameter, twice during the fit.

    Args:
        model: the BoRA model.
        sites: values of the sample sites at the start; default: the start of the adapters.
        columns: K.
        per_epoch: how many columns an epoch gives.
        scales: the values of c that held-out documents choose from, as numbers or as a text with commas.

    Raises:
        InputError: ``columns`` is below 2, ``per_epoch`` below 1, a scale is not a positive number, or a site is not real.
    """

    scale: Tensor
    filled: Tensor

    def __init__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor] | None = None,
        *,
        columns: int = 5,
        per_epoch: int = 2,
        scales: str | Sequence[float] = SCALES,
    ) -> None:
        check_at_least("columns", columns, 2)
        check_at_least("per_epoch", per_epoch, 1)
        super().__init__(model, sites)
        self.columns, self.per_epoch, self.scales = columns, per_epoch, positive_numbers("scales", scales)
        # the scale without held-out documents: 1, or the nearest one that is allowed
        self.register_buffer("scale", torch.tensor(min(self.scales, key=lambda scale: max(scale, 1 / scale))))
        self.register_buffer("filled", torch.tensor(-1))  # n; -1 before the end of a fit
        self._kinds = ("variance", *(f"column{number}" for number in range(columns)))
        self._weights = [0.0] * columns

    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        self.put("loc", name, centre, event_dim)
        for kind in self._kinds:  # zeros that take no memory
            self.register_buffer(tensor_key(kind, name), centre.new_zeros(()).expand(centre.shape))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if not is_real(site["fn"].support):
                raise InputError(
                    f"SwagGuide cannot take {name!r}, which is not a real number, as a random tau; use the guide normal"
                )

    def begin_fit(self) -> None:
        self.filled.fill_(-1)

    def take_steps(self, variances: Mapping[str, Tensor], columns: Sequence[Mapping[str, Tensor]], number: int) -> None:
        for kind, tensors in zip(self._kinds, (variances, *columns), strict=True):
            for parameter, value in tensors.items():
                # Pyro's name of a parameter with a constraint, even if the constraint is the real line
                site = parameter.removesuffix("_unconstrained").removeprefix("loc/")
                setattr(self, f"{kind}/{site}", value)
        self.filled.fill_(number)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        for name, value in state_dict.items():  # the zeros have no memory to copy into
            if name.partition("/")[0] in self._kinds and name in self._buffers:
                setattr(self, name, torch.empty_like(value, memory_format=torch.contiguous_format))
        return super().load_state_dict(state_dict, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site; during the fit, their current values."""
        if int(self.filled) >= 0:
            standard = dist.Normal(self.scale.new_zeros(self.columns), 1.0).to_event(1)
            noise, n = pyro.sample(_WEIGHTS, standard, infer={"is_auxiliary": True}), int(self.filled)
            self._weights = (noise * (self.scale / (2 * (n - 1)) ** 0.5 if n > 1 else 0.0)).tolist()
        return super().forward(*args, **kwargs)

    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        loc = self.get("loc", name)
        if int(self.filled) < 0:
            return dist.Delta(loc, event_dim=event_dim)
        variance, *columns = (pyro.subsample(getattr(self, tensor_key(kind, name)), event_dim=event_dim) for kind in self._kinds)
        for weight, column in zip(self._weights, columns, strict=True):
            loc = torch.add(loc, column, alpha=weight)
        return dist.Normal(loc, self.scale * (variance / 2).sqrt(), validate_args=False).to_event(event_dim)

    def settle(self, held_out: HeldOut) -> dict[str, Any]:
        """Choose the scale with the lowest held-out loss of the mixture of draws; the first one of several."""
        if int(self.filled) < 0 or not held_out.tokens.sum():
            return {}
        losses, chosen = [], float(self.scale)
        for scale in self.scales if len(self.scales) > 1 else ():
            self.scale.fill_(scale)
            losses.append(float(held_out.nll().sum() / held_out.tokens.sum()))
        if losses:
            chosen = self.scales[losses.index(min(losses))]
            self.scale.fill_(chosen)
        by_scale = dict(zip(map(str, self.scales), losses, strict=False))
        return {"scale": chosen, "scales": by_scale, "notes": self._notes(chosen) if losses else []}

    def _notes(self, scale: float) -> list[str]:
        ends = {min(self.scales): "smallest", max(self.scales): "largest"}
        if scale not in ends:
            return []
        return [f"the scale {scale:g} is the {ends[scale]} of those that were tried; give others as --guide_option scales=..."]


def swag_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    columns: int = 5,
    per_epoch: int = 2,
    scales: str | Sequence[float] = SCALES,
) -> SwagGuide:
    """:class:`SwagGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``data``, ``scale`` and ``temperature`` are not used.

    >>> import bora_pyro as bp
    >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
    >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
    >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
    >>> point = bp.fit(model, data, epochs=1)
    >>> swag = bp.fit(model, data, guide=swag_guide(model, point.sites(), scales="1"), epochs=2, callbacks=[])
    >>> one, other = (bp.Posterior(swag).draw(number)["q_proj.lora_B"] for number in (0, 1))
    >>> bool((one != other).any())
    True
    """
    return SwagGuide(model, sites, columns=columns, per_epoch=per_epoch, scales=scales)
