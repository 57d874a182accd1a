"""AdamW for a guide: one rate for Θ and one for the whitened deviations, which must reach their prior's scale within a fit.

The deviations are δ_d = z_d/√τ. AdamW moves an entry of z by at most its rate in a step. With the rate of Θ, a fit of 60 steps at
0.01 moves z by 0.3 of the prior's standard deviation at most. The deviations would then be too small for their τ, and a τ that is
learned from them would be too small. So z has a rate of its own if necessary (:func:`deviation_rate`).

Under a small τ the prior is much wider than the posterior, and such a rate would be far too large. AdamW's step has about the
same size r in every entry, and mostly random signs. It then raises a task's −log p(documents) by about r² t/2, where t is the
trace of the task's Fisher information with respect to z. The moments that AdamW keeps give t: it is the variance of the
gradient over the steps of an epoch, times their number. The rate is limited so that a step costs a task ``NATS`` at most
(:meth:`Rates.of_deviations`).

This limit knows the curvature only where the fit is. Far from there it can be much larger, for instance if tokens that are
predicted with certainty hide it, and a deep base diverges. The learning rate is what a user chooses so that this does not happen.
So a deviation δ moves no faster than other parameters do: the rate of z is at most the learning rate times √τ. It may always be
large enough to move an entry by ``LEAST_REACH`` standard deviations of the prior in the whole fit.

The means of groups of tasks (:class:`~bora_pyro.priors.GroupedNormal`) are whitened too. They are treated in the same way, with
τ_g in place of τ.

When τ changes, the gradient with respect to z changes by the same factor as τ^-1/2. The moments of AdamW are multiplied by this
factor (:func:`rescale`). Otherwise the large gradients at an early, small τ would hold z back for hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.nn import Parameter

from bora_pyro.guides.base import task_sites, tensor_key
from bora_pyro.guides.ivon import IvonGuide
from bora_pyro.inference.ivon import Ivon
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.schedule import COSINE, schedule
from bora_pyro.priors import Prior

#: The largest rise of a task's −log p(documents) that the noise of one step may cause.
NATS = 10.0
#: The largest rate that a reach gives to deviations, in standard deviations of their prior.
LARGEST = 0.15
#: The distance that an entry of z can move in every fit of enough steps, in standard deviations of its prior, under any τ.
LEAST_REACH = 2.0
#: AdamW's settings. The second moment of the deviations has a shorter memory, because their scale changes with τ.
BETAS, DEVIATION_BETAS, EPS = (0.9, 0.999), (0.9, 0.98), 1e-12
# The ending that Pyro's LocScaleReparam gives a site of whitened values.
_WHITENED = "_decentered"
#: Before the names of the sites of groups of tasks, and of their factors.
GROUP = "group."


def deviation_parameters(guide: AutoGuide) -> dict[str, str]:
    """The latent of each parameter of a guide that is the centre of a whitened deviation, by the parameter's name.

    Args:
        guide: the guide after its first run.
    """
    white = (site for site in task_sites(guide) if site.endswith(_WHITENED))
    return _centres(guide, {site: site.removeprefix("theta.").removesuffix(_WHITENED) for site in white})


def group_parameters(guide: AutoGuide) -> dict[str, str]:
    """The latent of each parameter of a guide that is the centre of whitened means of groups, by the parameter's name.

    Args:
        guide: the guide after its first run.
    """
    sites = (name for name, _ in guide.prototype_trace.iter_stochastic_nodes())
    return _centres(guide, {site: site.removeprefix(GROUP).removesuffix(_WHITENED) for site in sites if site.startswith(GROUP)})


def _centres(guide: AutoGuide, latents: Mapping[str, str]) -> dict[str, str]:
    """The latent of each parameter that is the centre of a site, by the parameter's name; ``latents`` are those of the sites."""
    names: dict[str, str] = {}
    for site, latent in latents.items():
        # a point estimate, Pyro's own AutoNormal, and the guides of this library
        names |= dict.fromkeys((site, f"locs.{site}", tensor_key("loc", site)), latent)
    # Pyro's name of a parameter with a constraint, even if the constraint is the real line
    found = {name: name.removesuffix("_unconstrained") for name, _ in guide.named_parameters()}
    return {name: names[plain] for name, plain in found.items() if plain in names}


def deviation_rate(learning_rate: float, reach: float, total_steps: int, warmup: float, kind: str = COSINE) -> float:
    """The largest rate of the whitened deviations: with it an entry can move the distance ``reach``, if the fit is not too short.

        >>> deviation_rate(0.01, 4.0, 60, 0.1)  # the schedule's mean is about a half
        0.12...
        >>> deviation_rate(0.01, 4.0, 6000, 0.1)
        0.01

    Args:
        learning_rate: the largest rate of all other parameters, which is the smallest allowed value.
        reach: the distance that an entry can move in the whole fit, in standard deviations of its prior.
        total_steps: steps of the fit.
        warmup: fraction of the steps in which the rate rises.
        kind: the schedule.
    """
    whole = reach / sum(schedule(step, total_steps, warmup, kind) for step in range(total_steps))
    return max(learning_rate, min(whole, LARGEST))


@dataclass(frozen=True)
class Rates:
    """The learning rates of one step.

        >>> rates = Rates(part=0.5, shared=0.01, deviations=0.06, per_square=torch.tensor(1e6))
        >>> rates.of_deviations(noise=torch.tensor([1e-4, 0.2]))
        tensor([0.0300, 0.0050])

    Attributes:
        part: the rate as a fraction of its largest value, from the schedule.
        shared: largest rate of all parameters but the whitened deviations.
        deviations: largest rate of the whitened deviations.
        per_square: N²/S, with N training observations and S steps in an epoch; one number, or one for each task, (D,). The loss
            is in nats per observation, so this factor turns the variance of a task's gradient over the steps into the trace of
            its Fisher information.
        least: the rate of z that the learning rate does not limit.
        nats: N/T. This factor turns the gradient of the loss into that of the objective in nats, in units of the temperature T.
    """

    part: float
    shared: float
    deviations: float
    per_square: Tensor
    least: float = 0.0
    nats: float = 1.0

    def of_deviations(self, noise: Tensor) -> Tensor:
        """The rate of each task's whitened deviations, limited so that a step costs the task at most ``NATS``.

        It is that of all other parameters as long as the variance of a task's gradient is not known.

        Args:
            noise: variance over the steps of each task's gradient with respect to z, summed over its entries, (tasks,).
        """
        # groups of tasks, whose number is another, have the mean factor
        trace = (self.per_square if self.per_square.numel() in (1, len(noise)) else self.per_square.mean()).to(noise) * noise
        limited = (2 * NATS / trace).sqrt().clamp(max=self.deviations)
        return self.part * torch.where(trace > 0, limited, self.shared)

    def entries(self, limited: Tensor, tau: Tensor, dims: int) -> Tensor:
        """The rates of the entries of a parameter z, so that δ = z/√τ moves no faster than other parameters.

            >>> rates = Rates(part=1.0, shared=0.01, deviations=0.06, per_square=torch.tensor(1.0), least=0.02)
            >>> rates.entries(torch.tensor([0.06, 0.03]), torch.tensor([1.0, 16.0, 100.0]), 2)
            tensor([[0.0200, 0.0400, 0.0600],
                    [0.0200, 0.0300, 0.0300]])

        Args:
            limited: the rates of its tasks, (tasks,).
            tau: τ, which broadcasts against the parameter.
            dims: number of dimensions of the parameter, (tasks, ...).
        """
        allowed = self.part * (self.shared * tau.sqrt()).clamp(min=self.least)
        return torch.minimum(limited.view(-1, *[1] * (dims - 1)), allowed.to(limited))


def largest_rates(options: FitOptions, observations: float, steps_per_epoch: int, factors: Sequence[Tensor] = ()) -> Rates:
    """The rates of a fit at the top of its schedule.

    Args:
        options: the options of the fit.
        observations: N, the number of training observations.
        steps_per_epoch: S, the number of steps in an epoch.
        factors: what callbacks multiply the gradient of each task by, apart from clipping.
    """
    steps = steps_per_epoch * options.epochs
    kind = options.schedule or COSINE
    of_deviations, least = (
        deviation_rate(options.learning_rate, reach, steps, options.warmup, kind)
        for reach in (options.deviation_reach, min(options.deviation_reach, LEAST_REACH))
    )
    per_square = torch.tensor(observations**2 / steps_per_epoch)
    for factor in factors:
        per_square = per_square / factor.to(per_square).square()
    nats = observations / options.temperature
    return Rates(1.0, options.learning_rate, of_deviations, per_square, least=least, nats=nats)


def variance(first: Tensor, second: Tensor, steps: Tensor) -> Tensor:
    """The variance of a task's gradient over the steps, summed over the entries, from AdamW's moments of deviations: (tasks,).

    A gradient that stays the same has none: it is a signal, and no noise.

    Args:
        first: mean of the gradients, (tasks, ...).
        second: mean of their squares, (tasks, ...).
        steps: number of steps of each task, (tasks,) or one number.
    """
    mean = first.square().flatten(1).sum(1) / (1 - DEVIATION_BETAS[0] ** steps).square()
    return (second.flatten(1).sum(1) / (1 - DEVIATION_BETAS[1] ** steps) - mean).clamp(min=0)


def adamw(
    parameters: Iterable[Parameter], deviations: Collection[Parameter] = (), groups_of_tasks: Collection[Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW without weight decay, which would be a second prior.

    Args:
        parameters: all parameters.
        deviations: those of them that are whitened deviations of tasks, (tasks, ...).
        groups_of_tasks: those that are whitened deviations of groups of tasks, (groups, ...).
    """
    own = {id(parameter) for parameter in (*deviations, *groups_of_tasks)}
    groups = [
        {"params": [parameter for parameter in parameters if id(parameter) not in own], "betas": BETAS},
        {"params": [*deviations], "betas": DEVIATION_BETAS},
        {"params": [*groups_of_tasks], "betas": DEVIATION_BETAS},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, eps=EPS, fused=True)


def optimizer_of(
    guide: AutoGuide, parameters: Mapping[str, Parameter], deviations: Iterable[str] = (), groups_of_tasks: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """The optimiser of a guide's parameters: IVON of a guide that asks for it, AdamW of all others.

    Args:
        guide: the guide after its first run.
        parameters: its parameters by name, or some of them.
        deviations: the names of those that are whitened deviations of tasks.
        groups_of_tasks: the names of those that are whitened deviations of groups of tasks.
    """
    if isinstance(guide, IvonGuide):
        return Ivon(parameters, guide)
    own = ([parameters[name] for name in names] for names in (deviations, groups_of_tasks))
    return adamw(parameters.values(), *own)


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer, rates: Rates, tau: Mapping[Parameter, Tensor] | None = None) -> None:
    """Take a step with these rates, and delete the gradients.

    Args:
        optimizer: the optimiser.
        rates: the rates.
        tau: τ of the whitened deviations, which broadcasts against the parameter; without it, the learning rate limits none.
    """
    if isinstance(optimizer, Ivon):
        optimizer.take_step(rates)
        return
    slower: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        group["lr"] = rates.part * rates.shared
        if group["betas"] == DEVIATION_BETAS:
            limited = rates.of_deviations(_noise(optimizer, group["params"]))
            group["lr"] = largest = float(limited.max())
            for value in group["params"]:
                own = limited if tau is None else rates.entries(limited, tau[value], value.dim())
                if float(own.min()) < largest:  # fused AdamW has one rate; entries with a lower one go only a part of the way
                    part = (own / largest).view(*own.shape, *[1] * (value.dim() - own.dim()))
                    slower.append((value, value.detach().clone(), part))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for value, old, part in slower:
        value.copy_(old.lerp(value, part.expand_as(value)))


def _noise(optimizer: torch.optim.Optimizer, parameters: list[Parameter]) -> Tensor:
    """The variance of each task's gradient, (tasks,), over all parameters (tasks, ...)."""
    noise = torch.zeros(len(parameters[0]), device=parameters[0].device)
    for state in (optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state):
        noise += variance(state["exp_avg"], state["exp_avg_sq"], state["step"].to(noise))
    return noise


@torch.no_grad()
def rescale(optimizer: torch.optim.Optimizer, factors: Iterable[tuple[Parameter, Tensor]]) -> None:
    """Multiply the optimiser's moments of some parameters as if all their gradients had been multiplied by a factor."""
    for parameter, factor in factors:
        if state := optimizer.state.get(parameter):
            state["exp_avg"] *= factor
            if "exp_avg_sq" in state:
                state["exp_avg_sq"] *= factor.square()


def precisions(prior: Prior, starts: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """τ of each latent in ``names``, and τ_g of each name ``group.<latent>``, which broadcast against the whitened values.

    Args:
        prior: the prior.
        starts: initial values of the latents, (layers, *shape).
        names: latents, or ``group.<latent>`` for the means of groups of tasks.
    """
    of_groups = {name: name.removeprefix(GROUP) for name in names if name.startswith(GROUP)}
    return {
        name: prior.group_precision(of_groups[name], starts[of_groups[name]])
        if name in of_groups
        else prior.precision(name, starts[name])
        for name in names
    }


def gradient_factors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of `precisions`: the factor (τ_before / τ_after)^1/2 by which the gradient of a whitened value changes."""
    return {name: (tau / after[name]).sqrt() for name, tau in before.items()}
