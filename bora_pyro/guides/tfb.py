"""TFB, Training-Free Bayesianization (Shi et al., arXiv 2412.05723): the widest noise that held-out documents allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.adapters import LoRA
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, check_at_least
from bora_pyro.guides.around_map import AroundMap, start_sites
from bora_pyro.guides.base import check_no_masks
from bora_pyro.guides.held_out import HeldOut
from bora_pyro.guides.rotated_normal import RotatedNormal
from bora_pyro.model import BoRA

# A direction of B whose singular value is less than this part of the largest one of all tasks and layers gets no noise: the B of
# a task that is computed as Θ plus a deviation is not exactly 0 where it should be.
_LEAST = 1e-6
_A, _B = "lora_A", "lora_B"
NO_DOCUMENTS = "guide tfb finds its variances on validation documents, and there are none; give more documents, or another guide"


class TfbGuide(AroundMap):
    """ΔW_d ~ Normal(ΔŴ_d, σ_d² (U Uᵀ) ⊗ I), with one variance σ_d² for each task, and nothing to train.

    With s = α/r and the singular value decomposition B_d = U diag(b) Vᵀ, the change of a layer is ΔW = s U diag(b) Vᵀ A. The
    paper has noise of the standard deviation σ/b_i in row i of Vᵀ A. Here σ is in the unit of ΔW, so that

        A_d = Â_d + V diag(σ_d / (s b)) ε,    ΔW_d = ΔŴ_d + σ_d U ε,    ε (r, in) standard Normal:

    each column of ΔW_d has the same isotropic noise in the space of the columns of B_d. B_d, Θ and all other sites stay at the
    MAP. Directions in which B_d is 0 get no noise.

    σ_d is the largest value for which the held-out loss of task d, that of the mixture of draws, rises by at most the part
    ``tolerance`` (:meth:`settle`). Before that it is 0, and every draw is the MAP.

    Args:
        model: the BoRA model, with LoRA as adapter.
        sites: the MAP.
        tolerance: how much the loss may rise, as a part of the loss of the MAP.
        smallest: the smallest σ of the search.
        largest: the largest one. A task whose adapter does not help it has a loss that noise does not raise, and gets this one.
        steps: the number of halvings; σ is found up to a factor of (largest / smallest)^(1 / 2^steps).
        least_documents: a task with fewer held-out documents gets the σ that is found from the loss of all tasks together. So do
            all tasks if they have one adapter.

    Raises:
        InputError: the adapter has no A and B of its tasks, an option is out of range, or as for ``AroundMap``.
    """

    sigma: Tensor

    def __init__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor],
        *,
        tolerance: float = 0.01,
        smallest: float = 1e-4,
        largest: float = 1.0,
        steps: int = 8,
        least_documents: int = 4,
    ) -> None:
        check_at_least("steps", steps, 1)
        check_at_least("least_documents", least_documents, 1)
        if not 0 < tolerance < math.inf:
            raise InputError(f"tolerance is {tolerance}; give a finite number above 0, the part by which the loss may rise")
        if not 0 < smallest < largest < math.inf:
            raise InputError(f"smallest is {smallest} and largest {largest}; give finite numbers above 0, the smaller one first")
        check_no_masks(model, "tfb")
        if not isinstance(model.adapter, LoRA) or not any(name.endswith(f".{_A}") for name in model.starts):
            raise InputError(f"guide tfb needs LoRA, whose tasks have an A and a B, not {model.adapter}; use the guide normal")
        if model.adapter.own_scaling is None:
            raise InputError(f"guide tfb needs LoRA with a fixed scale, not {model.adapter}; use the guide normal")
        super().__init__(model, sites)
        self.tolerance, self.range, self.steps, self.least_documents = tolerance, (smallest, largest), steps, least_documents
        self.register_buffer("sigma", torch.zeros(model.num_tasks, device=model.backbone.device))
        self._noise: dict[str, tuple[Tensor, Tensor, bool]] = {}
        for name in model.starts:
            if name.endswith(f".{_A}"):
                self._noise[name] = self._noise_of(name)

    def _noise_of(self, name: str) -> tuple[Tensor, Tensor, bool]:
        """1/(s b), (D, layers, 1, r), and V, (D, layers, 1, r, r), of each task, or of all; and whether each task has its own."""
        theta, mean = self.kept("theta", name), self.kept("prior_mean", name)
        if theta.shape[-2] > theta.shape[-1]:
            raise InputError(
                f"guide tfb needs a rank of at most {theta.shape[-1]}, the inputs of {name}; here it is {theta.shape[-2]}"
            )
        own = any(value.shape == theta.shape for value in self.model.prior.sites({name: theta}, {name: mean}).values())
        b = self.kept("theta" if own else "prior_mean", name.removesuffix(_A) + _B).double()
        squares, v = torch.linalg.eigh(b.mT @ b)  # ascending
        values = squares.clamp(min=0).sqrt()
        assert isinstance(self.model.adapter, LoRA) and self.model.adapter.own_scaling is not None
        kept = values > _LEAST * values.max()
        inverse = torch.where(kept, 1 / (self.model.adapter.own_scaling * values), 0.0)
        return inverse[..., None, :].to(theta), v[..., None, :, :].to(theta), own

    def _around(self, name: str, loc: Tensor, slope: Tensor | float, sigma: Tensor, event_dim: int) -> dist.TorchDistribution:
        inverse, basis, _ = self._noise[name]
        scale = (sigma * inverse).expand(*inverse.shape[:-2], loc.shape[-1], inverse.shape[-1])
        return RotatedNormal(loc, scale, basis, stretch=slope, event_dim=event_dim)

    def of_mean(self, name: str, mean: Tensor, tau: Tensor) -> dist.TorchDistribution:
        if name not in self._noise or self._noise[name][2]:
            return dist.Delta(mean, event_dim=mean.dim())
        return self._around(name, mean, 1.0, self.sigma[0], mean.dim())

    def follow(self, name: str, shift: Tensor, tau: Tensor) -> Tensor:
        return torch.zeros_like(self.kept("theta", name))

    def of_tasks(self, name: str, loc: Tensor, tau: Tensor, slope: Tensor) -> dist.TorchDistribution:
        if name not in self._noise:
            return dist.Delta(loc, event_dim=loc.dim() - 1)
        return self._around(name, loc, slope, self.sigma.view(-1, *[1] * (loc.dim() - 1)), loc.dim() - 1)

    def settle(self, held_out: HeldOut) -> dict[str, Any]:
        """Find σ_d of each task. A task gets 0 if even the smallest σ that was tried raises its loss too much."""
        if not held_out.tokens.sum():
            raise InputError(NO_DOCUMENTS)

        def loss(sigma: Tensor) -> Tensor:
            self.sigma.copy_(sigma)
            return held_out.nll()

        tasks = len(self.sigma)
        limits = loss(torch.zeros(tasks)) * (1 + self.tolerance)
        few, pooled = held_out.documents < self.least_documents, None
        if not any(own for _, _, own in self._noise.values()):
            few = torch.ones(tasks, dtype=torch.bool)  # one adapter for all
        chosen = torch.zeros(tasks)
        if bool(few.any()):
            of_all = self._largest(lambda sigma: loss(sigma.expand(tasks)).sum()[None] <= limits.sum(), 1)
            chosen, pooled = of_all.expand(tasks), float(of_all)
        if not bool(few.all()):
            chosen = torch.where(few, chosen, self._largest(lambda sigma: loss(sigma) <= limits, tasks))
        self.sigma.copy_(chosen)
        found = {"sigma": chosen.tolist(), "sigma_of_all_tasks": pooled, "few_documents": int(few.sum())}
        return found | {"notes": self._notes(chosen)}

    def _notes(self, sigma: Tensor) -> list[str]:
        """What the ends of the search's range say."""
        (smallest, largest), tasks = self.range, len(sigma)
        # the value before the last one of a search whose every value is accepted
        without, limited = int((sigma == 0).sum()), int((sigma > largest * (smallest / largest) ** (1.5 / 2**self.steps)).sum())
        notes = [
            f"{without} of {tasks} tasks have no variance: a standard deviation of {smallest:g} raises their loss too much; try "
            "a smaller smallest"
        ] * bool(without)
        return notes + [
            f"{limited} of {tasks} tasks have the largest standard deviation, {largest:g}: noise does not raise their loss more "
            "than allowed"
        ] * bool(limited)

    def _largest(self, accepts: Callable[[Tensor], Tensor], number: int) -> Tensor:
        smallest, largest = self.range
        return largest_accepted(accepts, number, smallest=smallest, largest=largest, steps=self.steps)


def largest_accepted(accepts: Callable[[Tensor], Tensor], number: int, *, smallest: float, largest: float, steps: int) -> Tensor:
    """The largest accepted value of each of several numbers, by bisection of their logarithms.

        >>> largest_accepted(lambda x: x <= torch.tensor([0.2, 0.00001]), 2, smallest=1e-3, largest=1.0, steps=20)
        tensor([0.2000, 0.0000])

    Args:
        accepts: whether each of some values is accepted, (number,) -> (number,) bool; a value is if a larger one is.
        number: how many numbers are sought at once.
        smallest: the lower end of the search.
        largest: the upper end.
        steps: the number of halvings.

    Returns:
        (number,) the largest value that was tried and accepted; 0 if none was.
    """
    lower, upper = torch.full((number,), math.log(smallest)), torch.full((number,), math.log(largest))
    best = torch.zeros(number)
    for _ in range(steps):
        middle = (lower + upper) / 2
        good = accepts(middle.exp())
        best = torch.where(good, middle.exp(), best)
        lower, upper = torch.where(good, middle, lower), torch.where(good, upper, middle)
    return best


def tfb_guide(
    model: BoRA,
    sites: Mapping[str, Tensor] | None = None,
    *,
    data: TaskData | None = None,
    scale: float = 0.1,
    temperature: float = 1.0,
    tolerance: float = 0.01,
    smallest: float = 1e-4,
    largest: float = 1.0,
    steps: int = 8,
    least_documents: int = 4,
) -> TfbGuide:
    """:class:`TfbGuide` as a :class:`~bora_pyro.guides.GuideBuilder`; ``scale`` and ``temperature`` are not used.

        >>> import bora_pyro as bp
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> table = [{"task": name, "text": f"{name} prefers document {n}"} for name in ("ada", "bob") for n in range(9)]
        >>> data, model = bp.load_tasks(bp.table(table), backbone.tokenizer), bp.BoRA(backbone, 2, adapter=bp.LoRA(rank=1))
        >>> around = bp.Fitted(model, tfb_guide(model, bp.fit(model, data, epochs=1).sites(), steps=3), data.tasks)
        >>> len(bp.settle(around, data.validation, draws=2)["sigma"])
        2

    Args:
        model: the BoRA model.
        sites: the MAP; default: the start of the adapters.
        data: the documents of the fit; they are only checked.
        scale: not used.
        temperature: not used.
        tolerance: as for ``TfbGuide``, and all that follow.
        smallest: see there.
        largest: see there.
        steps: see there.
        least_documents: see there.

    Raises:
        InputError: the data have no validation documents, or as for ``TfbGuide``.
    """
    if data is not None and not data.validation.num_tokens:
        raise InputError(NO_DOCUMENTS)
    search: dict[str, Any] = {"tolerance": tolerance, "smallest": smallest, "largest": largest, "steps": steps}
    return TfbGuide(model, start_sites(model) if sites is None else sites, least_documents=least_documents, **search)
