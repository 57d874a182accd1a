"""The two limits of the hierarchy as separate priors: independent adapters, and one adapter for all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
from torch import Tensor

from bora_pyro.priors.base import PerLatent, copies, flat


class Independent(PerLatent):
    """p(θ_d) ∝ 1 for every task, independently: the limit τ → 0. Θ is then the tasks' average.

    >>> import torch
    >>> theta = torch.tensor([[1.0], [3.0]])
    >>> Independent().mean_of("q_proj.lora_A", {"theta.q_proj.lora_A": theta}, theta)
    tensor([2.])
    """

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        with tasks:
            return pyro.sample(f"theta.{name}", flat(copies(start, start, tasks), start.dim(), mask, tasks))

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return theta.mean(0)

    def averages(self, name: str) -> bool:
        return True

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        return {f"theta.{name}": theta}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return start.new_tensor(0.0)

    def __repr__(self) -> str:
        return "Independent()"


class Pooled(PerLatent):
    """θ_d = Θ with p(Θ) ∝ 1, one adapter for all tasks: the limit τ → ∞.

    >>> import torch
    >>> Pooled().precision("q_proj.lora_A", torch.zeros(1))
    tensor(inf)
    """

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        prior_mean = pyro.sample(f"prior_mean.{name}", flat(start, start.dim(), mask))
        return prior_mean.expand(tasks.subsample_size, *start.shape)

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        return {f"prior_mean.{name}": mean}  # every θ_d is Θ, so ``theta`` is not needed

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        return start.new_tensor(math.inf)

    def __repr__(self) -> str:
        return "Pooled()"
