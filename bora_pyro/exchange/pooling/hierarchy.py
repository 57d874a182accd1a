"""Estimators of the hierarchy behind independent estimates, and of the shrinkage of each estimate towards Θ.

    >>> import torch
    >>> estimates = torch.tensor([[1.0, 1.0], [3.0, 1.0], [2.0, 4.0]], dtype=torch.float64)  # (D, n)
    >>> found = FixedShrinkage(0.5)(estimates @ estimates.T, 2)
    >>> found.variance, found.tau, found.shrinkage
    (2.0, 1.0, tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64))

The model is a one-way hierarchy of D tasks with n entries each. The estimate of task d is y_d = θ_d + ε_d with the sampling noise
ε_d ~ Normal(0, I/(h N_d)), where h is the information of one document about one entry. The prior is θ_d ~ Normal(Θ, I/τ) with
p(Θ) ∝ 1. For given precisions the posterior mean is

    θ̂_d = (1 − s_d) y_d + s_d Θ̂,  s_d = τ/(τ + h N_d),  Θ̂ = Σ_d w_d y_d,  w_d ∝ 1/(1/τ + 1/(h N_d)).

The likelihood of the precisions depends on the estimates only through their inner products ⟨y_d, y_e⟩. The functions here
therefore take the Gram matrix (D, D) and the number n. The estimates alone determine only the sum 1/τ + 1/(h N_d) of each task.
An estimator uses additional information to separate its two terms: numbers of documents (:class:`MarginalLikelihood`), a known
noise (:class:`JamesStein`), or a chosen shrinkage (:class:`FixedShrinkage`).
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
    """The estimated hierarchy of one group of entries.

    Attributes:
        entries: n, the number of entries of a task.
        variance: 1/τ + 1/(h N_d), the variance of an entry. If the N_d differ, N_d is replaced by their harmonic mean.
        tau: τ; infinite if all differences between tasks are noise.
        information: h, the information of one document about one entry; None if the estimator does not use numbers of documents.
        shrinkage: s_d, (D,) float64. 0 leaves a task unchanged, 1 replaces it by Θ.
        weights: w_d, the weights of the tasks in Θ̂, (D,) float64, with sum 1.
    """

    entries: int
    variance: float
    tau: float
    information: float | None
    shrinkage: Tensor
    weights: Tensor


class Estimator(ABC):
    """Base class of estimators, which separate the variance of the estimates into differences between tasks and noise."""

    @abstractmethod
    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        """Estimate the hierarchy of one group of entries.

        Args:
            gram: inner products ⟨y_d, y_e⟩ over the entries, (D, D) float64, with D at least 2.
            entries: n, the number of entries.

        Raises:
            InputError: if D is below 2, or differs from the number of tasks of the estimator.
        """


class MarginalLikelihood(Estimator):
    """Maximum marginal likelihood (empirical Bayes) estimates of τ and h, with Θ integrated out, from numbers of documents.

        >>> MarginalLikelihood([10, 200, 40])
        MarginalLikelihood(3 tasks, 10 to 200 documents)

    Let H be the harmonic mean of the N_d, and σ_d² = 1/τ + 1/(h N_d) = φ u_d with u_d = ρ + (1 − ρ) H/N_d. The log-likelihood of
    a group is, up to a constant,

        −n/2 [Σ_d log σ_d² + log Σ_d σ_d⁻²] − ½ Σ_d ‖y_d − Θ̂‖²/σ_d².

    It is largest at φ = Σ_d ‖y_d − Θ̂‖²/u_d / (n (D − 1)). The remaining number ρ, from 0 (all variance is noise) to 1 (no noise),
    is found with a grid and Brent's method. The method assumes that the estimates of tasks with few documents vary more. Adapters
    whose training was stopped early do the opposite: with more documents they move farther from their start. Then ρ = 1, and
    nothing is shrunk.

    Args:
        documents: N_d of each task, above 0 and not all equal.

    Raises:
        InputError: if a number is not positive, or if all are equal, which does not separate the two variances.
    """

    def __init__(self, documents: Sequence[float]) -> None:
        self.documents = torch.tensor([float(number) for number in documents], dtype=torch.float64)
        if len(self.documents) < 2 or not bool(((self.documents > 0) & self.documents.isfinite()).all()):
            raise InputError(f"documents {list(documents)}: give a positive number for each of two or more tasks")
        if bool((self.documents == self.documents[0]).all()):
            raise InputError(
                f"all {len(self.documents)} tasks have {documents[0]} documents, which cannot separate noise from the "
                "differences of the tasks; give the noise or the shrinkage instead"
            )

    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        _check(gram, len(self.documents))
        harmonic = 1 / (1 / self.documents).mean()
        around = centred(gram)

        def u_and_phi(rho: float) -> tuple[Tensor, float]:
            u = rho + (1 - rho) * harmonic / self.documents
            return u, max(float(_spread(around, 1 / u)), 1e-300) / (entries * (len(u) - 1))

        def cost(rho: float) -> float:
            u, phi = u_and_phi(rho)
            return (len(u) - 1) * math.log(phi) + float(u.log().sum() + (1 / u).sum().log())

        if float(around.diagonal().sum()) <= 0:  # all estimates are equal
            return _hierarchy(entries, 0.0, torch.ones_like(self.documents), torch.ones_like(self.documents), 0.0, math.inf)
        rho = _minimise(cost)
        u, phi = u_and_phi(rho)
        noise = (1 - rho) * harmonic / self.documents
        information = 1 / (phi * (1 - rho) * float(harmonic)) if rho < 1 else math.inf
        return _hierarchy(entries, phi, noise / u, 1 / u, phi * rho, information)

    def __repr__(self) -> str:
        low, high = self.documents.min().item(), self.documents.max().item()
        return f"MarginalLikelihood({len(self.documents)} tasks, {low:g} to {high:g} documents)"


class JamesStein(Estimator):
    """The positive-part James-Stein estimate around the tasks' mean (Lindley's form), for a known noise σ.

        >>> JamesStein(noise=0.01)
        JamesStein(noise=0.01)

    The shrinkage is s = min(1, σ² (n (D − 1) − 2) / Σ_d ‖y_d − ȳ‖²) for all tasks. If n (D − 1) is above 2, its expected total
    squared error is below that of the y_d for all θ_d.

    Args:
        noise: σ, the standard deviation of an entry of an estimate around its true value. It can be estimated from two adapters
            of one task with different seeds: the standard deviation of their difference, divided by √2.

    Raises:
        InputError: if the noise is not positive and finite.
    """

    def __init__(self, noise: float) -> None:
        if not 0 < noise < math.inf:
            raise InputError(f"noise {noise} is not allowed; it is a standard deviation, positive and finite")
        self.noise = noise

    def __call__(self, gram: Tensor, entries: int) -> Hierarchy:
        _check(gram)
        variance, degrees_of_freedom = _variance(gram, entries), entries * (len(gram) - 1)
        noise = self.noise**2
        correction = max(degrees_of_freedom - 2, 0) / degrees_of_freedom
        share = min(1.0, correction * noise / variance) if variance > 0 else 1.0
        ones = torch.ones(len(gram), dtype=torch.float64)
        return _hierarchy(entries, variance, share * ones, ones, max(variance - noise, 0.0), None)

    def __repr__(self) -> str:
        return f"JamesStein(noise={self.noise:g})"


class FixedShrinkage(Estimator):
    """A chosen shrinkage s for every task and group. It implies that 1/τ is the share 1 − s of the variance.

    Args:
        s: the shrinkage, from 0 (tasks stay unchanged) to 1 (all tasks become Θ).

    Raises:
        InputError: if the shrinkage is not from 0 to 1.
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
    """Inner products of the deviations from the unweighted mean of the tasks."""
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _spread(gram: Tensor, weights: Tensor) -> Tensor:
    """Σ_d w_d ‖y_d − ŷ‖² with ŷ = Σ w_d y_d / Σ w_d."""
    return weights @ gram.diagonal() - weights @ gram @ weights / weights.sum()


def _variance(gram: Tensor, entries: int) -> float:
    """The unbiased variance of an entry over the tasks."""
    return max(float(centred(gram).trace()), 0.0) / (entries * (len(gram) - 1))


def _minimise(cost: Callable[[float], float]) -> float:
    """Find the number in [0, 1] that minimises a function: the best point of a grid, improved with Brent's method."""
    grid = np.linspace(0, 1, 101)
    values = [cost(float(rho)) for rho in grid]
    best = int(np.argmin(values))
    around = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 100)]))
    found = minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-10})
    return float(found.x) if found.fun < values[best] else float(grid[best])
