"""AdamW for a guide: one rate for Θ and one for the whitened deviations, which must reach their prior's scale within a fit.

The deviations are δ_d = z_d/√τ. AdamW moves an entry of z by at most its rate in a step. With the rate of Θ, a fit of 60 steps at
0.01 moves z by 0.3 of the prior's standard deviation at most. The deviations would then be too small for their τ, and a τ that is
learned from them would be too small. So z has a rate of its own if necessary (:func:`deviation_rate`).

When τ changes, the gradient with respect to z changes by the same factor as τ^-1/2. The moments of AdamW are multiplied by this
factor (:func:`rescale`). Otherwise the large gradients at an early, small τ would hold z back for hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.guides.base import task_sites, tensor_key
from bora_pyro.inference.schedule import schedule

#: AdamW's settings. The second moment of the deviations has a shorter memory, because their scale changes with τ.
BETAS, DEVIATION_BETAS, EPS = (0.9, 0.999), (0.9, 0.98), 1e-12
# The ending that Pyro's LocScaleReparam gives a site of whitened values.
_WHITENED = "_decentered"


def deviation_parameters(guide: AutoGuide) -> dict[str, str]:
    """The latent of each parameter of a guide that is the centre of a whitened deviation, by the parameter's name.

    Args:
        guide: the guide after its first run.
    """
    names: dict[str, str] = {}
    for site in task_sites(guide):
        if site.endswith(_WHITENED):
            latent = site.removeprefix("theta.").removesuffix(_WHITENED)
            # a point estimate, Pyro's own AutoNormal, and the guides of this library
            names |= dict.fromkeys((site, f"locs.{site}", tensor_key("loc", site)), latent)
    # Pyro's name of a parameter with a constraint, even if the constraint is the real line
    found = {name: name.removesuffix("_unconstrained") for name, _ in guide.named_parameters()}
    return {name: names[plain] for name, plain in found.items() if plain in names}


def deviation_rate(learning_rate: float, reach: float, total_steps: int, warmup: float) -> float:
    """The largest rate of the whitened deviations.

        >>> deviation_rate(0.01, 4.0, 60, 0.1)  # the schedule's mean is about a half
        0.13...
        >>> deviation_rate(0.01, 4.0, 6000, 0.1)
        0.01

    Args:
        learning_rate: the largest rate of all other parameters, which is the smallest allowed value.
        reach: the distance that an entry can move in the whole fit, in standard deviations of its prior.
        total_steps: steps of the fit.
        warmup: fraction of the steps in which the rate rises.
    """
    return max(learning_rate, reach / sum(schedule(step, total_steps, warmup) for step in range(total_steps)))


def adamw(parameters: Iterable[Parameter], deviations: Collection[Parameter] = ()) -> torch.optim.AdamW:
    """AdamW without weight decay, which would be a second prior. The parameters in ``deviations`` have a group of their own."""
    own = {id(parameter) for parameter in deviations}
    groups = [
        {"params": [parameter for parameter in parameters if id(parameter) not in own], "betas": BETAS},
        {"params": [*deviations], "betas": DEVIATION_BETAS},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, eps=EPS, fused=True)


def take_step(optimizer: torch.optim.Optimizer, rate: float, of_deviations: float) -> None:
    """Take a step with these rates, and delete the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = of_deviations if group["betas"] == DEVIATION_BETAS else rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def rescale(optimizer: torch.optim.Optimizer, factors: Iterable[tuple[Parameter, Tensor]]) -> None:
    """Multiply AdamW's moments of some parameters as if all their gradients had been multiplied by a factor."""
    for parameter, factor in factors:
        if state := optimizer.state.get(parameter):
            state["exp_avg"] *= factor
            state["exp_avg_sq"] *= factor.square()


def gradient_factors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By latent: the factor by which the gradient with respect to z = √τ δ changes with τ, (τ_before / τ_after)^1/2."""
    return {name: (tau / after[name]).sqrt() for name, tau in before.items()}
