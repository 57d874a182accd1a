"""TriAdaptLoRA (Liang et al., 2025, arXiv 2501.08008): a triangular core between B and A, with ranks that grow during a fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Adapter, Factors
from bora_pyro.adapters.lora import RowLinear
from bora_pyro.backbone.fit_hooks import FitHooks
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least, check_one_of

LINEAR, EXPONENTIAL = GROWTH = ("linear", "exponential")


@dataclass(frozen=True)
class TriAdaptLoRA(Adapter):
    """W = W_full + (α/r_max) B (L + U) A, with L lower and U upper triangular, of which more rows become active during a fit.

        >>> adapter, slot = TriAdaptLoRA(rank=2), Slot("q_proj", ("q_proj",), 16, 32)
        >>> start = adapter.start(slot, None, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'lora_A': (4, 16), 'lora_B': (32, 4), 'lower': (10,), 'upper': (10,)}
        >>> {name: value.flatten().int().tolist() for name, value in start.masks.items() if name.startswith("lora")}
        {'lora_A': [1, 0, 0, 0], 'lora_B': [1, 0, 0, 0]}

    Both triangles have a diagonal, so C = L + U is any r × r matrix, and its diagonal is the sum of two latents. A triangle is
    stored packed, row by row. A rank is a row of A, a column of B, and the entries of L and U in its row and column. The latents
    have the size of the largest rank r_max; masks say which ranks are active. They are the same for all tasks.

    A and B start at random, Normal(0, 0.02²), and C at zero. So the change is zero at the start, C has a gradient, and a rank
    that becomes active changes no output. The paper has no release. Of the starts in the first author's later code this is the
    only one with all three properties (B = 0 and C = 0 has no gradient at all). The scale there is α/r with the growing r, which
    would shrink the change at each growth; here the scale is fixed.

    The ranks grow by :class:`RankGrowth`. The total of the ranks never exceeds ``rank`` times the number of adapted layers, and
    is equal to it after the last growth. The state that a fit keeps may be of an earlier epoch, with the ranks of that epoch.

    The paper does not tell, and so we decided: the largest rank, the number of growths, the steps in which they happen, and that
    the last growth spends what is left. With :func:`~bora_pyro.priors.with_shared`, ``lora_A`` and ``lora_B`` can be common to
    all tasks, and the prior is then on C alone. The optional orthogonality penalty of that code is left out: the prior is the
    only penalty here.

    Args:
        rank: the average rank of the layers when all is spent (``reference_rank``), at least 1.
        alpha: α. Default: r_max, so that the scale is 1.
        max_rank: r_max, the largest rank of a layer. Default: twice the rank.
        start_rank: the rank of every layer at the start.
        block: how many ranks a layer gets at a time. Default: half the rank, at least 1.
        growth: how fast the number of layers that grow at a time rises: ``linear`` or ``exponential``.
        growths: how often layers grow.
        warmup: the fraction of the steps before the first growth can happen.
        until: the fraction of the steps after which the last growth happens.

    Raises:
        InputError: a value is not allowed.
    """

    rank: int = 8
    alpha: float | None = None
    max_rank: int | None = None
    start_rank: int = 1
    block: int | None = None
    growth: str = LINEAR
    growths: int = 8
    warmup: float = 0.1
    until: float = 0.7

    def __post_init__(self) -> None:
        for name, usual in (("max_rank", 2 * self.rank), ("block", max(1, self.rank // 2))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)
        for name in ("rank", "max_rank", "start_rank", "block", "growths"):
            check_at_least(name, getattr(self, name), 1)
        check_one_of("growth", self.growth, GROWTH)
        if self.r_max < self.rank:
            raise InputError(f"max_rank is {self.r_max}; give at least the rank, {self.rank}")
        if self.start_rank > self.rank:
            raise InputError(f"start_rank is {self.start_rank}; give at most the rank, {self.rank}")
        if not 0 <= self.warmup < self.until <= 1:
            raise InputError(
                f"warmup is {self.warmup} and until is {self.until}; give fractions of the steps with 0 <= warmup < until <= 1, "
                "for example 0.1 and 0.7"
            )
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.r_max))
        if not 0 < self.scaling < math.inf:
            raise InputError(
                f"alpha {self.alpha} is not allowed; it must be positive and finite; the usual value is max_rank ({self.r_max})"
            )

    @property
    def r_max(self) -> int:
        """The largest rank of a layer."""
        assert self.max_rank is not None
        return self.max_rank

    @property
    def scaling(self) -> float:
        """α/r_max."""
        assert self.alpha is not None
        return self.alpha / self.r_max

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        a, b = (
            0.02 * torch.randn(shape, generator=generator)
            for shape in ((self.r_max, slot.in_features), (slot.out_features, self.r_max))
        )
        packed = torch.zeros(self.r_max * (self.r_max + 1) // 2)
        latents = {"lora_A": a, "lora_B": b, "lower": packed, "upper": packed.clone()}
        return Start(latents, masks=self.masks(torch.tensor(self.start_rank)))

    def masks(self, rank: Tensor) -> dict[str, Tensor]:
        """The masks of the latents for ranks of any shape (...): (..., r_max, 1), (..., 1, r_max) and (..., packed)."""
        active = torch.arange(self.r_max, device=rank.device) < rank[..., None]
        # a packed entry of L, or of U, which is stored transposed, is in the row that is its larger coordinate
        row = torch.tril_indices(self.r_max, self.r_max, device=rank.device)[0]
        triangle = active[..., row]
        return {"lora_A": active[..., :, None], "lora_B": active[..., None, :], "lower": triangle, "upper": triangle.clone()}

    def core(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """C = L + U, (..., r_max, r_max)."""
        lower, upper = tensors["lower"], tensors["upper"]
        row, column = torch.tril_indices(self.r_max, self.r_max, device=lower.device)
        size = self.r_max**2
        flat = lower.new_zeros((*lower.shape[:-1], size)).index_add(-1, row * self.r_max + column, lower)
        return flat.index_add(-1, column * self.r_max + row, upper).unflatten(-1, (self.r_max, self.r_max))

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        assert self.alpha is not None
        return Factors(self.core(tensors) @ tensors["lora_A"], tensors["lora_B"], self.alpha)

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.factors(tensors).delta()

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        inner = RowLinear.apply(x, tensors["lora_A"].to(x.dtype)) @ self.core(tensors).to(x.dtype).mT
        return inner @ (self.scaling * tensors["lora_B"].to(x.dtype)).mT

    def kept_per_token(self, slot: Slot) -> int:
        return 2 * self.r_max

    def callbacks(self) -> Sequence[Any]:
        return [RankGrowth(self)]


class RankGrowth(FitHooks):
    """Lets the ranks of some layers grow, several times during a fit.

    The importance of a layer is F = ‖C‖_F / (number of its blocks), with C of Θ. Its score is the rise of F since the last
    growth. At the k-th of K growths, m = k/K, and ``left`` ranks are not spent yet. The n layers with the highest scores grow by
    a block, and so do all whose score equals the n-th (the threshold), as far as the ranks last: n = ⌊left · m⌋ if the growth is
    linear, n = ⌊exp(m log left)⌋ if it is exponential, and at least 1. The last growth goes on until nothing is left.

    The growths lie at equal distances between two steps. If a fit is so short that several fall on one step, the last of them is
    done. Inactive entries have no gradient, so they begin where they started.

    Raises:
        InputError: the steps draw tasks, and Θ is an average over all tasks.
    """

    name = "rank_growth"

    def __init__(self, adapter: TriAdaptLoRA) -> None:
        self.adapter = adapter
        self.done = 0
        #: F at the last growth, (layers of all slots,)
        self.importance = torch.zeros(0)

    def after_step(self, loop: Any) -> None:
        adapter, step = self.adapter, loop.step_number + 1
        span = (adapter.until - adapter.warmup) / adapter.growths
        due = [math.ceil(loop.total_steps * (adapter.warmup + span * k) - 1e-9) for k in range(1, adapter.growths + 1)]
        number = sum(max(1, step_of) <= step for step_of in due)
        if number > self.done:
            self.grow(loop, number)
            self.done = number

    @torch.no_grad()
    def grow(self, loop: Any, number: int) -> None:
        """The growth of this number, from 1."""
        adapter, tensors, slots = self.adapter, loop.model.tensors, loop.model.backbone.slots
        if loop.draws_tasks and any(loop.model.prior.averages(name) for name in loop.model.starts):
            raise InputError(
                f"ranks grow by the average over all tasks under {loop.model.prior}, and a step draws some tasks; give "
                "--task_subsampling false, or a prior with a mean"
            )
        mean = loop.state.global_mean()
        if callable(mean):
            mean = mean(torch.zeros(1, dtype=torch.int64, device=loop.model.backbone.device))
        norms, ranks = [], []
        for slot in slots:
            for layer in range(slot.layers):
                latents = {name: mean[f"{slot.name}.{name}"][:1, layer] for name in tensors.names(slot)}
                norms.append(adapter.core(tensors.at_layer(slot, layer, latents)).norm())
                ranks.append(tensors.mask(f"{slot.name}.lora_A")[layer].sum())
        rank = torch.stack(ranks).cpu()
        importance = torch.stack(norms).cpu() / _blocks(rank, adapter)
        score = importance - (self.importance if len(self.importance) else torch.zeros_like(importance))
        grown = grown_ranks(adapter, rank, score, number / adapter.growths)
        # what F would have been: the new blocks are empty
        self.importance = importance * _blocks(rank, adapter) / _blocks(grown, adapter)
        for slot, own in zip(slots, grown.split([slot.layers for slot in slots]), strict=True):
            for name, mask in adapter.masks(own.to(loop.model.backbone.device)).items():
                tensors.masks[f"{slot.name}.{name}"] = mask

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done), "importance": self.importance}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.done, self.importance = int(state["done"]), state["importance"].clone()


def _blocks(rank: Tensor, adapter: TriAdaptLoRA) -> Tensor:
    """The number of blocks of each layer: the first one, and one for each growth."""
    assert adapter.block is not None
    return 1 + ((rank - adapter.start_rank).clamp(min=0) / adapter.block).ceil()


def grown_ranks(adapter: TriAdaptLoRA, rank: Tensor, score: Tensor, m: float) -> Tensor:
    """The ranks of all layers after a growth.

        >>> adapter, score = TriAdaptLoRA(rank=4), torch.tensor([0.1, 0.4, 0.2])
        >>> grown_ranks(adapter, torch.tensor([1, 1, 1]), score, 0.25)  # 9 ranks are left, n = 2
        tensor([1, 3, 3])
        >>> grown_ranks(adapter, torch.tensor([1, 3, 3]), score, 1.0)  # 5 are left, and the largest rank is 8
        tensor([2, 5, 5])

    Args:
        adapter: the adapter, with its budget.
        rank: the ranks now, (layers,) int64.
        score: by how much each layer's importance has risen, (layers,).
        m: how far the growth is, above 0; at 1 all ranks are spent.
    """
    assert adapter.block is not None
    rank = rank.clone()
    left = adapter.rank * len(rank) - int(rank.sum())
    while left > 0:
        n = int(left * m) if adapter.growth == LINEAR else int(math.exp(m * math.log(left)))
        may_grow = rank < adapter.r_max
        n = min(max(n, 1), int(may_grow.sum()))
        threshold = score[may_grow].sort(descending=True).values[n - 1]
        for layer in score.argsort(descending=True, stable=True).tolist():
            if may_grow[layer] and score[layer] >= threshold:
                more = min(adapter.block, adapter.r_max - int(rank[layer]), left)
                rank[layer] += more
                left -= more
        if m < 1:
            break
    return rank
