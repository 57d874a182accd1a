"""NOLA (Koohpayegani et al., 2024): A and B are sums of random matrices, and only the coefficients of the sums are learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Factors, uniform_fan_in
from bora_pyro.adapters.lora import LoRA
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least, check_one_of

#: Where the bases are: kept in memory, or drawn again from their seed in every pass.
SOURCES = ("memory", "seed")
#: How many numbers of the bases are drawn at a time: 16 MiB.
CHUNK = 2**22
#: Seeds are drawn from 0 to one less than this.
_SEEDS = 2**63 - 1


def draw_bases(seed: int, number: int, shape: tuple[int, int]) -> Iterator[Tensor]:
    """The random matrices of a seed, entries uniform on ±1/√number, in parts (n, *shape) of at most ``CHUNK`` numbers.

    >>> torch.cat(list(draw_bases(0, 4, (2, 3)))).shape
    torch.Size([4, 2, 3])

    They are drawn on the CPU, because the generator of another device gives other numbers for the same seed. The global generator
    is not touched.
    """
    generator, bound = torch.Generator().manual_seed(seed), number**-0.5
    at_once = max(1, CHUNK // math.prod(shape))
    for first in range(0, number, at_once):
        yield torch.empty(min(at_once, number - first), *shape).uniform_(-bound, bound, generator=generator)


def _all_bases(seed: int, number: int, shape: tuple[int, int]) -> Tensor:
    """All matrices of ``draw_bases``, (number, *shape). They are written into their place, so that no part exists twice."""
    bases, first = torch.empty(number, *shape), 0
    for part in draw_bases(seed, number, shape):
        bases[first : first + len(part)] = part
        first += len(part)
    return bases


class SeededSum(torch.autograd.Function):
    """Σ_i c_i M_i, (..., *shape), for coefficients c (..., k) and the matrices M_i of a seed, which each pass draws again."""

    @staticmethod
    def forward(coefficients: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
        total, first = coefficients.new_zeros(*coefficients.shape[:-1], *shape), 0
        for bases in draw_bases(seed, coefficients.shape[-1], shape):
            part = coefficients[..., first : first + len(bases)]
            total += torch.tensordot(part, bases.to(part), dims=1)
            first += len(bases)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, tuple[int, int]], output: Tensor) -> None:
        coefficients, ctx.seed, ctx.shape = inputs
        ctx.number = coefficients.shape[-1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return SeededSum.forward(tangent, ctx.seed, ctx.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        flat = gradient.flatten(-2)
        parts = [flat @ bases.flatten(-2).to(flat).mT for bases in draw_bases(ctx.seed, ctx.number, ctx.shape)]
        return torch.cat(parts, -1), None, None


@dataclass(frozen=True)
class NOLA(LoRA):
    """LoRA whose matrices are A = A₀ + Σ_i a_i A_i and B = Σ_j b_j B_j: only the k + l coefficients a and b are learned.

        >>> adapter = NOLA(rank=4, bases=100)
        >>> start = adapter.start(Slot("q_proj", ("q_proj",), 16, 32), None, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'coefficients_A': (100,), 'coefficients_B': (100,)}
        >>> {name: tuple(value.shape) for name, value in start.fixed.items()}
        {'start_A': (4, 16), 'bases_A': (100, 4, 16), 'bases_B': (100, 32, 4)}

    Each layer has random matrices A_i (r, in) and B_j (out, r) of its own, with entries uniform on ±1/√k and ±1/√l. All tasks
    share them. A₀ is drawn as LoRA's A and stays fixed: with A = B = 0 no coefficient would have a gradient. Both a and b start
    at 0. The number of latents depends neither on the rank nor on the size of the layer, so that a covariance of all the
    coefficients of a layer is affordable (guide ``multivariate_normal``).

    **The prior is on coefficients.** τ is the precision of a coefficient, not of an entry of A or B. θ_d ~ Normal(Θ, I/τ) gives
    an entry of A the variance Σ_i (A_i)²/τ around that of Θ, which is about 1/(3τ) for any k, since an entry of A_i has the
    variance 1/(3k). Under LoRA that variance is 1/τ. Entries are independent there; here they are correlated.

    **What is stored.** A run folder has the coefficients and, in its configuration, the seed. The bases are drawn again when the
    run is loaded, bit for bit with the same version of torch. Some numbers of them are stored, by which a run recognises them.

    **What the bases cost.** With ``bases_from="memory"`` a layer keeps 4 (k r in + l r out) bytes, whatever the number of tasks:
    8 MB for k = l = 256, r = 8 and a layer of 512 x 512, or 0.27 GB for k = l = 512, r = 16 and a layer of 4096 x 4096, which is
    four times the layer itself in float32. With ``bases_from="seed"`` a layer keeps only its seed, and at most ``CHUNK`` numbers
    of the bases exist at a time. The CPU then draws k r in + l r out numbers in each forward and each backward pass of a layer,
    some 0.1 billion a second, and a model on another device waits for them. Both give the same bases. In either case each row of
    a batch takes k r in + l r out multiplications, which form its A and B, and these are kept for the backward pass.

    **What the paper does not tell.** The scale 1/√k is that of the released experiments; the paper's formula has none. Here the
    sum for B has 1/√l. The released code stores A₀ or draws it without a seed of its own; here the seed gives it too. The paper
    has k = l, and for GPT-2 k = 256, r = 8, α = 2 and the learning rate 0.01.

    Args:
        rank: r of A and B. It costs time, but no latents.
        alpha: α; the change is scaled by α/r. Default: the rank, so that the scale is 1.
        bases: k, the number of random matrices of A.
        bases_b: l, the number of those of B; default: k.
        bases_from: ``memory`` keeps the random matrices; ``seed`` draws them again in every pass.

    Raises:
        InputError: the rank or a number of bases is below 1, alpha is not positive and finite, or ``bases_from`` is unknown.

    Source: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", ICLR 2024, arXiv 2310.02556.
    """

    bases: int = 256
    bases_b: int | None = None
    bases_from: str = "memory"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases_b is None:
            object.__setattr__(self, "bases_b", self.bases)
        check_at_least("bases", self.bases, 1)
        check_at_least("bases_b", self.bases_b, 1)
        check_one_of("bases_from", self.bases_from, SOURCES)

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        number_a, number_b = self._numbers
        fixed = {"start_A": uniform_fan_in((self.rank, slot.in_features), generator)}
        seeds = torch.randint(_SEEDS, (2,), generator=generator)
        if self.bases_from == "memory":
            of_a, of_b = seeds.tolist()
            fixed["bases_A"] = _all_bases(of_a, number_a, (self.rank, slot.in_features))
            fixed["bases_B"] = _all_bases(of_b, number_b, (slot.out_features, self.rank))
        else:
            fixed |= {"seeds": seeds, "out_features": torch.tensor(slot.out_features)}
        return Start({"coefficients_A": torch.zeros(number_a), "coefficients_B": torch.zeros(number_b)}, fixed=fixed)

    @property
    def _numbers(self) -> tuple[int, int]:
        """k and l."""
        assert self.bases_b is not None
        return self.bases, self.bases_b

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        assert self.alpha is not None
        a0, a, b = tensors["start_A"], tensors["coefficients_A"], tensors["coefficients_B"]
        if self.bases_from == "memory":
            sums = [torch.tensordot(c, tensors[name].to(c), dims=1) for c, name in ((a, "bases_A"), (b, "bases_B"))]
        else:
            of_a, of_b = tensors["seeds"].tolist()
            sums = [
                SeededSum.apply(a, of_a, (self.rank, a0.shape[-1])),
                SeededSum.apply(b, of_b, (int(tensors["out_features"]), self.rank)),
            ]
        return Factors(a0.to(a) + sums[0], sums[1], self.alpha)

    def _factors(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        both = self.factors(tensors)  # in the precision of the coefficients: the sums have hundreds of terms
        return both.lora_A.to(x.dtype), both.lora_B.to(x.dtype)

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise InputError(
            f"LoRA matrices cannot be read as {self}, as they need not be sums of its bases; read them as plain LoRA"
        )

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        return None

    def kept_per_row(self, slot: Slot) -> int:
        return self.rank * (slot.in_features + slot.out_features)
