"""The steps of IVON (Shen et al., "Variational learning is effective for large deep networks", ICML 2024, algorithm 1).

q = Normal(m, s²) in each entry, and L = E_q[ℓ] + T KL(q ‖ p) is the objective in nats, with ℓ = −log p(documents | x). The method
keeps the curvature of ℓ plus that of the prior; here that is h = T/s², so that the standard deviations are its only state:

    ĥ ← ĝ (x − m)/s² + T/v    for a draw x, the gradient ĝ of ℓ there, and a prior of variance v (0 = 1/v for a flat prior)
    h ← h + ρ (ĥ − h) + ρ² (ĥ − h)²/(2h),    ρ = 1 − β₂
    g ← β₁ g + (1 − β₁) (∂L/∂m),    m ← m − α g / ((1 − β₁ᵗ) h)

The gradient with respect to log s that a reparametrised draw gives, with the exact KL divergence, is
∂L/∂log s = ĝ (x − m) + T s²/v − T. So (ĥ − h)/h = (∂L/∂log s)/T =: y, whatever the prior is, and the step is

    log s ← log s − ½ log(1 + ρ y + (ρ y)²/2),    m ← m − α s² g / ((1 − β₁ᵗ) T).

It needs the gradients of m and log s alone, which the ELBO of any model gives. Two differences to the paper: the prior's part of
the gradient of m is in the mean g too, and ρ follows the schedule of the learning rate as α does, so that the scales settle.

A fit's loss is L/N for N training observations, so gradients are multiplied by N. In a step that draws some of the tasks, the
prior of a task has a weight w, and so has the expected gradient of its documents; the gradients are divided by w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.guides.base import tensor_key
from bora_pyro.guides.ivon import IvonGuide

if TYPE_CHECKING:
    from bora_pyro.inference.optimizer import Rates


def scale_of(guide: AutoGuide) -> dict[str, str]:
    """By name of each parameter m of a guide that IVON moves, the name of its log s; empty for all other guides.

    Args:
        guide: the guide after its first run.
    """
    if not isinstance(guide, IvonGuide):
        return {}
    names = {name.removesuffix("_unconstrained"): name for name, _ in guide.named_parameters()}
    loc, scale = tensor_key("loc", ""), tensor_key("log_scale", "")
    return {name: names[scale + plain.removeprefix(loc)] for plain, name in names.items() if plain.startswith(loc)}


def natural_step(
    loc: Tensor,
    log_scale: Tensor,
    mean_gradient: Tensor,
    steps: Tensor,
    *,
    factor: Tensor,
    alpha: float,
    guide: IvonGuide,
    rho: float,
    gradients: tuple[Tensor, Tensor],
) -> None:
    """Take a step in place.

        >>> import bora_pyro as bp
        >>> guide = IvonGuide(bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2), beta=0.0)
        >>> m, log_s, one = torch.tensor([3.0]), torch.tensor([0.0]), torch.ones(1)
        >>> settings = {"factor": one, "alpha": 0.5, "rho": 1.0, "guide": guide}
        >>> natural_step(m, log_s, torch.zeros(1), one, gradients=(torch.tensor([2.0]), torch.tensor([0.0])), **settings)
        >>> m, log_s
        (tensor([2.]), tensor([0.]))

    Args:
        loc: m, (rows, ...) or any shape.
        log_scale: log s, of the same shape.
        mean_gradient: g in units of T, of the same shape.
        steps: number t of this step, which broadcasts against ``loc``.
        factor: N/(w T), which broadcasts against ``loc``.
        alpha: α.
        guide: the guide with β₁ and the largest step.
        rho: ρ.
        gradients: those of the loss with respect to m and log s.
    """
    of_loc, of_scale = gradients
    y = (rho * factor) * of_scale
    log_scale.sub_(torch.log1p(y + 0.5 * y.square()), alpha=0.5)
    mean_gradient.lerp_(factor * of_loc, 1 - guide.beta)
    scale = log_scale.exp()
    most = guide.reach * scale
    loc.sub_((alpha / (1 - guide.beta**steps) * scale.square() * mean_gradient).clamp(-most, most))


def settings_of(rates: Rates, guide: IvonGuide) -> dict[str, Any]:
    """α and ρ of a step, and the guide, as arguments of :func:`natural_step`."""
    part = rates.part
    return {"alpha": part * rates.shared * guide.pace, "rho": part * (1 - guide.curvature_beta), "guide": guide}


class Ivon(torch.optim.Optimizer):
    """IVON for parameters that every step changes.

    Args:
        parameters: the guide's parameters by name, or some of them.
        guide: the guide.
    """

    def __init__(self, parameters: Mapping[str, Parameter], guide: IvonGuide) -> None:
        pairs = {name: scale for name, scale in scale_of(guide).items() if name in parameters}
        self.guide, self.pairs = guide, [(parameters[name], parameters[scale]) for name, scale in pairs.items()]
        super().__init__([loc for loc, _ in self.pairs], {})

    @torch.no_grad()
    def take_step(self, rates: Rates) -> None:
        """Take a step with these rates, and delete the gradients."""
        settings = settings_of(rates, self.guide)
        for loc, log_scale in self.pairs:
            if loc.grad is None or log_scale.grad is None:
                continue
            state = self.state[loc]
            if not state:
                state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(loc)
            state["step"] += 1
            factor, gradients = loc.new_tensor(rates.nats), (loc.grad, log_scale.grad)
            natural_step(loc, log_scale, state["exp_avg"], state["step"].to(loc), factor=factor, gradients=gradients, **settings)
            loc.grad = log_scale.grad = None
