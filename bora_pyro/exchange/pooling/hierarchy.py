"""What independently made estimates say of the hierarchy that they come from, and how far each is to be shrunk towards Θ.

    >>> import torch
    >>> estimates = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 4.0]], dtype=torch.float64)  # (D, n)
    >>> found = FixedShrinkage(0.5)(estimates @ estimates.T, 2)
    >>> found.variance, found.tau, found.shrinkage
    (2.0, 1.0, tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64))

The model, for n entries i of D tasks d, is the one-way hierarchy: an estimate y_d = θ_d + ε_d with sampling noise
ε_d ~ Normal(0, I/(h N_d)), h the information of one document on one entry, and θ_d ~ Normal(Θ, I/τ) with p(Θ) ∝ 1. Then

    θ̂_d = (1 − s_d) y_d + s_d Θ̂,  s_d = τ/(τ + h N_d),  Θ̂ = Σ_d w_d y_d,  w_d ∝ 1/(1/τ + 1/(h N_d)),

is the posterior mean at the precisions, and their likelihood sees the estimates only through the inner products ⟨y_d, y_e⟩: the
functions here take these, (D, D), and the number n. Estimates alone tell the sum 1/τ + 1/(h N_d) of a task and not its two parts:
something else must part them. An estimator is that something: numbers of documents (:class:`MarginalLikelihood`), a known noise
(:class:`JamesStein`), or a decision (:class:`FixedShrinkage`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from bora_pyro.errors import InputError


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """What an estimator finds of one group of entries.

    Attributes:
        entries: n.
        variance: 1/τ + 1/(h N_d) of an entry, where it differs between tasks that of a task with the harmonic mean of the N_d.
        tau: τ; infinite where all the tasks' differences are noise.
        information: h, of one document on one entry; None where no documents were counted.
        shrinkage: s_d, (D,) float64: 0 leaves a task as it is, 1 puts Θ in its place.
        weights: w_d of the tasks in Θ̂, (D,) float64, of sum 1.
    """

    entries: int
    variance: float
    tau: float
    information: float | None
    shrinkage: Tensor
    weights: Tensor


class Estimator(ABC):
    """How the spread of the estimates is parted into the tasks' own differences and noise."""

    @abstractmethod
    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        """Estimate from one group of entries.

        Args:
            gram: inner products ⟨y_d, y_e⟩ over the entries, (D, D) float64, D from 2 up.
            entries: n, how many there are.

        Raises:
            InputError: the tasks are fewer, or other than the estimator was made for.
        """


class MarginalLikelihood(Estimator):
    """Maximum marginal likelihood (empirical Bayes), Θ integrated out: τ and h by what sets tasks with few documents apart.

        >>> MarginalLikelihood([10, 200, 40])
        MarginalLikelihood(3 tasks, 10 to 200 documents)

    With σ_d² = 1/τ + 1/(h N_d) = φ u_d, u_d = ρ + (1 − ρ) H/N_d and H the harmonic mean of the N_d, the likelihood of a group is

        −n/2 [Σ_d log σ_d² + log Σ_d σ_d⁻²] − ½ Σ_d ‖y_d − Θ̂‖²/σ_d²,

    whose maximum over φ is Σ_d ‖y_d − Θ̂‖²/u_d / (n (D − 1)); what is left is one number, ρ from 0 (all noise) to 1 (none), found
    by a grid and Brent's method. It supposes that the estimates of tasks with few documents scatter more. Adapters that were
    stopped early do the opposite, the more documents the farther from the start; ρ is then 1 and nothing is shrunk.

    Args:
        documents: N_d of each task, above 0 and not all the same.

    Raises:
        InputError: numbers that are not positive, or all the same, which cannot part the two variances.
    """

    def __init__(self, documents: Sequence[float]) -> None:
        self.documents = torch.tensor([float(number) for number in documents], dtype=torch.float64)
        if len(self.documents) < 2 or not bool(((self.documents > 0) & self.documents.isfinite()).all()):
            raise InputError(f"documents {list(documents)}: give a positive number for each of two or more tasks")
        if bool((self.documents == self.documents[0]).all()):
            raise InputError(
                f"all {len(self.documents)} tasks have {documents[0]} documents, which cannot part noise from the tasks' "
                "differences; give the noise or the shrinkage instead"
            )

    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        _check(gram, len(self.documents))
        harmonic = 1 / (1 / self.documents).mean()
        around = centred(gram)

        def parts(rho: float) -> tuple[Tensor, float]:
            u = rho + (1 - rho) * harmonic / self.documents
            return u, max(float(_spread(around, 1 / u)), 1e-300) / (entries * (len(u) - 1))

        def cost(rho: float) -> float:
            u, phi = parts(rho)
            return (len(u) - 1) * math.log(phi) + float(u.log().sum() + (1 / u).sum().log())

        if float(around.diagonal().sum()) <= 0:  # copies of one estimate
            return _hierarchy(entries, 0.0, torch.ones_like(self.documents), torch.ones_like(self.documents), 0.0, math.inf)
        rho = _least(cost)
        u, phi = parts(rho)
        noise = (1 - rho) * harmonic / self.documents
        information = 1 / (phi * (1 - rho) * float(harmonic)) if rho < 1 else math.inf
        return _hierarchy(entries, phi, noise / u, 1 / u, phi * rho, information)

    def __repr__(self) -> str:
        low, high = self.documents.min().item(), self.documents.max().item()
        return f"MarginalLikelihood({len(self.documents)} tasks, {low:g} to {high:g} documents)"


class JamesStein(Estimator):
    """The positive-part estimate of James and Stein around the tasks' mean (Lindley's form), for a known noise σ.

        >>> JamesStein(noise=0.01)
        JamesStein(noise=0.01)

    s = min(1, σ² (n (D − 1) − 2) / Σ_d ‖y_d − ȳ‖²), the same for all tasks: for n (D − 1) above 2 its total squared error is
    below that of the y_d themselves, whatever the θ_d.

    Args:
        noise: σ, standard deviation of an entry of an estimate around the truth, as the difference of two
            adapters of one task from two seeds shows it (divided by √2).

    Raises:
        InputError: a noise that is not positive and finite.
    """

    def __init__(self, noise: float) -> None:
        if not 0 < noise < math.inf:
            raise InputError(f"noise {noise} is not allowed; it is a standard deviation, positive and finite")
        self.noise = noise

    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        _check(gram)
        variance, freedom = _variance(gram, entries), entries * (len(gram) - 1)
        noise = self.noise**2
        share = min(1.0, max(freedom - 2, 0) / freedom * noise / variance) if variance > 0 else 1.0
        ones = torch.ones(len(gram), dtype=torch.float64)
        return _hierarchy(entries, variance, share * ones, ones, max(variance - noise, 0.0), None)

    def __repr__(self) -> str:
        return f"JamesStein(noise={self.noise:g})"


class FixedShrinkage(Estimator):
    """The same share s of the way towards Θ for every task and group; it says that 1/τ is the share 1 − s of the spread.

    Args:
        s: from 0 (every task as it is) to 1 (Θ for all).

    Raises:
        InputError: a share that is not from 0 to 1.
    """

    def __init__(self, s: float) -> None:
        if not 0 <= s <= 1:
            raise InputError(f"shrinkage {s} is not allowed; it is a share from 0 to 1, nearest: {1 if s > 1 else 0}")
        self.s = float(s)

    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        _check(gram)
        variance, ones = _variance(gram, entries), torch.ones(len(gram), dtype=torch.float64)
        return _hierarchy(entries, variance, self.s * ones, ones, (1 - self.s) * variance, None)

    def __repr__(self) -> str:
        return f"FixedShrinkage({self.s:g})"


def _hierarchy(
    entries: int, variance: float, shrinkage: Tensor, weights: Tensor, between: float, information: float | None
) -> Hierarchy:
    tau = 1 / between if between > 0 else math.inf
    return Hierarchy(entries, variance, tau, information, shrinkage, weights / weights.sum())


def _check(gram: Tensor, tasks: int | None = None) -> None:
    if len(gram) < 2 or (tasks is not None and len(gram) != tasks):
        raise InputError(f"{len(gram)} tasks given; give {tasks or '2 or more'}")


def centred(gram: Tensor) -> Tensor:
    """Inner products of the deviations from the tasks' plain mean."""
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _spread(gram: Tensor, weights: Tensor) -> Tensor:
    """Σ_d w_d ‖y_d − ŷ‖² with ŷ = Σ w_d y_d / Σ w_d."""
    return weights @ gram.diagonal() - weights @ gram @ weights / weights.sum()


def _variance(gram: Tensor, entries: int) -> float:
    """The unbiased variance of an entry between the tasks."""
    return max(float(centred(gram).trace()), 0.0) / (entries * (len(gram) - 1))


def _least(cost: Callable[[float], float]) -> float:
    """Where a function of a number from 0 to 1 is least: the best of a grid, ends included, and Brent's method around it."""
    grid = np.linspace(0, 1, 101)
    values = [cost(float(rho)) for rho in grid]
    best = int(np.argmin(values))
    around = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 100)]))
    found = minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-10})
    return float(found.x) if found.fun < values[best] else float(grid[best])
