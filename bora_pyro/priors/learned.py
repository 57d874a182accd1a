"""The hierarchical Normal whose τ is learned during the fit, from held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor

from bora_pyro.errors import InputError, check_at_least, check_one_of
from bora_pyro.priors.base import PerLatent
from bora_pyro.priors.hierarchical import whitened_deviation

PER = ("site", "layer", "task", "model")
#: τ stays between these bounds: identical tasks reach the upper one, tasks with nothing in common the lower one.
BOUNDS = (1e-3, 1e9)
# The weight of earlier values in the running sums, and the number of documents with slope 0 that are added to shrink the mean.
_DECAY, _SHRINKAGE = 0.5, 2.0


class LearnedPrecision(PerLatent):
    """θ_d ~ Normal(Θ, I/τ) with p(Θ) ∝ 1, where held-out documents adjust τ during the fit.

        >>> LearnedPrecision(per="layer", start=1000)
        LearnedPrecision(per='layer', start=1000)

    The deviations are δ_d = z_d/√τ with z_d ~ Normal(0, I), as in the non-centred
    :class:`~bora_pyro.priors.HierarchicalNormal`, so that τ scales them directly. Every ``every`` steps the prior computes from
    some validation documents

        slope = Σ_n ⟨δ_d(n) − δ̄, ∇ log p(w_n | θ_d(n))⟩,  δ̄ = mean_d δ_d.

    It is the derivative of the documents' log-likelihood with respect to log c, where the factor c multiplies the deviations from
    the tasks' mean. A negative slope means that the deviations are too large for held-out documents, and τ rises. A positive
    slope lowers τ.

    For a linear-Gaussian hierarchy the expected slope is zero exactly at the true τ₀ of the tasks, for any number of tasks: with
    r_d = ȳ_d − ȳ and δ_d = g r_d, E Σ_d r_d (θ_d − ȳ − g r_d) = (D − 1)(1/τ₀ − g (1/τ₀ + 1/h)), which is zero for
    g = h/(h + τ₀). This is the g of the MAP under τ₀. So the learned τ is the prior's where the deviations are at their optimum
    for the present τ. Deviations that have not moved enough would be too small under τ₀, and τ would fall instead. So a fit gives
    them a rate with which they reach the prior's scale (``deviation_reach``). No diagonal curvature is needed, in contrast to the
    evidence at an optimum (MacKay's γ/Σδ²).

    The step in log τ is ``rate`` a (1 + a²), where a is the mean slope of the last documents divided by their root mean square
    slope, from −1 to 1. The step is large if the documents agree and small if they do not. If all agree, τ is still far away, and
    the step is twice ``rate``. It does not shrink with the learning rate, because the best τ keeps rising while a fit begins to
    overfit. So the last τ varies from step to step. The mean of the steps (``average``) has the geometric mean of τ.

    The slope of a task grows with its deviation. So one task that differs from all others can lower τ for all of them. With
    ``robust`` the slopes of a document are multiplied by min(1, m²/|δ_d − δ̄|²), where m is the mean of |δ_d − δ̄| over the
    documents. A task then counts at most as much as a typical one (Huber's weights). The expected slope of a task given its
    deviation is zero at the true τ₀ in a linear-Gaussian hierarchy, so weights that depend on the deviation do not move the zero.

    Args:
        per: what has its own τ: each ``site`` (a kind of layer and a factor, for example ``q_proj.lora_A``); each ``layer`` of
            each site; each ``task`` (times a τ of the site); or the whole ``model``.
        start: τ before the first step.
        every: steps between two updates of τ; one update costs about as much as a training step.
        rate: half the largest change of log τ in one update.
        robust: limit what a task with large deviations contributes to a τ that it shares with others.

    Raises:
        InputError: ``per`` is unknown, ``start`` is outside the bounds, ``every`` is below 1, or ``rate`` is not positive and
            finite.
    """

    def __init__(
        self, per: str = "site", start: float = 100.0, *, every: int = 4, rate: float = 1.5, robust: bool = False
    ) -> None:
        check_one_of("per", per, PER)
        if not BOUNDS[0] <= start <= BOUNDS[1]:
            raise InputError(f"start {start} is not allowed; tau is learned between {BOUNDS[0]:g} and {BOUNDS[1]:g}")
        check_at_least("every", every, 1)
        if not 0 < rate < math.inf:
            raise InputError(f"rate is {rate}; give a finite number above 0")
        self.per, self.start, self.every, self.rate = per, float(start), every, rate
        self._robust = robust
        #: τ by latent: one number, (layers, 1, ...) or (D, 1, 1, ...), which broadcasts against (D, layers, *shape).
        self.tau: dict[str, Tensor] = {}
        # by group: the running sums of the slopes and of the numbers of documents
        self._sums: dict[str, Tensor] = {}

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        self.begin(name, start, tasks.size)
        tau = self.tau[name]
        return whitened_deviation(name, start, tasks, (tau[tasks.indices] if self.per == "task" else tau) ** -0.5, mask)

    def begin(self, name: str, start: Tensor, tasks: int) -> None:
        """Create τ of the latent ``name`` before its first use.

        Args:
            name: name of the latent.
            start: initial value of Θ, (layers, *shape).
            tasks: D.
        """
        if name not in self.tau:
            shapes = {"layer": (len(start),) + (1,) * (start.dim() - 1), "task": (tasks,) + (1,) * start.dim()}
            self.tau[name] = start.new_full(shapes.get(self.per, ()), self.start)

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        tau = self.tau.get(name, theta.new_tensor(self.start))
        return {f"prior_mean.{name}": mean, f"theta.{name}_decentered": tau**0.5 * (theta - mean)}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.tau.get(name, start.new_tensor(self.start))

    def learn(
        self,
        deviations: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        task: Tensor,
        *,
        sites: Mapping[str, Tensor] | None = None,
        all_reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        # (documents, layers) each
        slopes = {name: (gradients[name] * deviation).flatten(2).sum(-1) for name, deviation in deviations.items()}
        by_group = self._by_group(slopes, task)
        if self._robust:
            squares = {name: deviation.square().flatten(2).sum(-1) for name, deviation in deviations.items()}
            by_group = _with_weights(by_group, self._by_group(squares, task), all_reduce)
        sums = {
            key: torch.stack([group_slopes.sum(0), counted.sum(0), group_slopes.square().sum(0)])
            for key, (group_slopes, counted) in by_group.items()
        }
        totals = all_reduce(torch.cat([value.flatten() for value in sums.values()])).split(
            [value.numel() for value in sums.values()]
        )
        steps = {key: self._step(key, *total.view(3, -1)) for key, total in zip(sums, totals, strict=True)}
        for name, tau in self.tau.items():
            change = steps["model" if self.per == "model" else name].view(tau.shape if self.per == "layer" else ())
            if self.per == "task":
                change = change + steps["tasks"].view(tau.shape)
            self.tau[name] = (tau * torch.exp(-change)).clamp(*BOUNDS)

    def _by_group(self, slopes: dict[str, Tensor], task: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By group of τ: the slopes, (documents, members), and 1 for each document that counts for a member, otherwise 0.

        The members of a group are several τ whose slopes are divided by one root mean square.
        """
        all_documents = torch.ones(len(task), 1, device=task.device)
        if self.per == "model":
            return {"model": (torch.stack([slope.sum(1) for slope in slopes.values()]).sum(0)[:, None], all_documents)}
        if self.per == "layer":
            return {name: (slope, all_documents.expand_as(slope)) for name, slope in slopes.items()}
        groups = {name: (slope.sum(1, keepdim=True), all_documents) for name, slope in slopes.items()}
        if self.per == "task":
            of_task = torch.nn.functional.one_hot(task, len(next(iter(self.tau.values())))).to(all_documents.dtype)
            document_slopes = torch.stack([slope.sum(1) for slope in slopes.values()]).sum(0)[:, None]
            groups["tasks"] = (document_slopes * of_task, of_task)
        return groups

    def _step(self, key: str, slopes: Tensor, counts: Tensor, squares: Tensor) -> Tensor:
        """The step in −log τ of each member of a group, (members,).

        Args:
            key: the group.
            slopes: sums of the slopes, (members,).
            counts: numbers of documents, (members,).
            squares: sums of the squared slopes, (members,).
        """
        # divide by the root mean square of this update's slopes, over all tasks: slopes grow a hundredfold during a fit
        scale = (squares.sum() / counts.sum()).sqrt().clamp(min=torch.finfo(slopes.dtype).tiny)
        new = torch.stack([slopes / scale, counts])
        self._sums[key] = new + _DECAY * self._sums.get(key, torch.zeros_like(new))
        total, documents = self._sums[key]
        agreement = total / (documents + _SHRINKAGE)
        return self.rate * agreement * (1 + agreement.square())

    def state(self) -> dict[str, Tensor]:
        tau = {f"tau.{name}": value.clone() for name, value in self.tau.items()}
        return tau | {f"sums.{key}": value.clone() for key, value in self._sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        stores = {"tau": self.tau, "sums": self._sums}
        for name, value in state.items():
            kind, _, key = name.partition(".")
            if kind in stores:
                stores[kind][key] = value.clone()

    def __repr__(self) -> str:
        robust = ", robust=True" * self._robust
        if not self.tau or all(bool((value == self.start).all()) for value in self.tau.values()):
            return f"LearnedPrecision(per={self.per!r}, start={self.start:g}{robust})"
        learned = ", ".join(f"{name}: {_geometric_mean(value):.3g}" for name, value in self.tau.items())
        return f"LearnedPrecision(per={self.per!r}, tau={{{learned}}}{robust})"


def _with_weights(
    slopes: dict[str, tuple[Tensor, Tensor]], squares: dict[str, tuple[Tensor, Tensor]], all_reduce: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The slopes by group, each times min(1, m²/|δ|²), where m is the mean of |δ| over the documents that count.

    Args:
        slopes: the slopes and counts by group, as ``_by_group`` returns them.
        squares: the same of the squared deviations, |δ|².
        all_reduce: sums a tensor over processes.
    """
    sums = {key: torch.stack([square.sqrt().sum(0), counted.sum(0)]) for key, (square, counted) in squares.items()}
    totals = all_reduce(torch.cat([value.flatten() for value in sums.values()])).split([value.numel() for value in sums.values()])
    weighted = {}
    for (key, (slope, counted)), total in zip(slopes.items(), totals, strict=True):
        norms, documents = total.view(2, -1)
        square = squares[key][0].clamp(min=torch.finfo(slope.dtype).tiny)
        weighted[key] = (slope * ((norms / documents.clamp(min=1)).square() / square).clamp(max=1), counted)
    return weighted


def _geometric_mean(tau: Tensor) -> float:
    return float(tau.log().mean().exp())
