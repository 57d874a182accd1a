"""SMoRA (Zhao et al., 2025, arXiv 2501.15103): each rank of LoRA is an expert, and a gate chooses some of them for each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bora_pyro.adapters.base import Adapter, uniform_fan_in
from bora_pyro.adapters.load_balance import BIAS, LOAD, Counting, LoadBalance
from bora_pyro.adapters.lora import RowLinear
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least, check_one_of

#: How the chosen ranks are computed: all ranks, most of them times 0; or the chosen rows and columns, copied for each token.
DENSE, GATHERED = EXECUTION = ("dense", "gathered")
#: Which latents have one value for all tasks: none; A and B; or A, B and R.
NONE, EXPERTS, ALL = SHARE = ("none", "experts", "all")
#: The least value of p + b in a gate, so that gates are positive.
LEAST = 1e-6


@dataclass(frozen=True, repr=False)
class SMoRA(Adapter):
    """W x + (α/k) B diag(g(x)) A x, where g(x) is not zero for k of the r ranks, which a gate chooses for each token.

        >>> SMoRA(rank=64, active=8)
        SMoRA(rank=64, alpha=8.0, active=8)
        >>> adapter, slot = SMoRA(rank=8, active=2), Slot("q_proj", ("q_proj",), 16, 32)
        >>> start = adapter.start(slot, None, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'lora_A': (8, 16), 'lora_B': (32, 8), 'gate': (8, 16)}
        >>> x, tensors = torch.ones(1, 3, 16), {name: value[None] for name, value in start.latents.items()}
        >>> chosen, gates = adapter.route(x, tensors)
        >>> chosen.shape, gates.sum(-1).round(decimals=4).tolist()  # of one row of three tokens
        (torch.Size([1, 3, 2]), [[2.0, 2.0, 2.0]])

    With p = sigmoid(R x), the k ranks with the largest p + b are active. Their gates are g_j = k p_j / Σ p, with the sum over the
    active ranks, and sum to k. So the scale is α/k, and with k = r and R = 0 this is LoRA of the scale α/r. With k = r and any
    other R it is not LoRA. Gates are computed in float32, and as a softmax of log p, which no small p can divide by zero.

    R starts as a linear layer does, uniform on ±1/√in, and B at zero. R is a latent like A and B: it has a prior, a posterior and
    a τ.

    **Blocks** (``partition``). One gate serves a block of so many ranks. A block of r/N ranks is a mixture of N LoRAs of rank
    r/N, each of the scale α/partition, with weights p_e / Σ p. k is a multiple of the block, and at least two blocks: the gate of
    one active block would be 1 for any R, which would then never be learned.

    **Balance.** After each step b_j moves by u (``balance``) towards equal loads (:class:`LoadBalance`). b is a buffer and
    chooses alone. The released code lets it into p too; ``bias_in_value`` does so, where p + b counts as 1e-6 at least.

    **What tasks share.** The prior decides. Without task gates, every task has an A, B and R of its own around Θ. τ = ∞ is the
    paper's model: one adapter for all tasks, whose gates read the token alone, so that a text of unknown task can use it.
    ``share`` makes latents common to all tasks under any τ, with a flat prior (:func:`~bora_pyro.priors.with_shared`).

    **Task gates** (``task_gates``) are p = sigmoid(R x + r_d), with a vector r_d for each task that starts at 0 and has the prior
    of the fit, while A, B and R are common to all tasks. So tasks differ in which ranks they prefer, and in nothing else. τ → ∞
    is one routing for all, and Θ, the mean of the r_d, is the gate of an unknown task.

    The change depends on the token, so there is no ΔW. Exports, merging, folding and distances of ΔW refuse it; distances in the
    latents remain. To serve such a model, use the run itself.

    **Execution.** ``dense`` computes all ranks and multiplies most of them by 0. ``gathered`` copies the k rows of A and columns
    of B of every token and computes no others. Both give the same. On a CPU dense is the faster one, by a factor of 6 for a layer
    of 1024 x 1024 with r = 64, k = 8 and 512 tokens (forward and backward on one core, 0.03 s), of 10 for 256 x 256 with r = 16
    and k = 2, and of 3 for 2048 x 2048: to copy k rows for each token costs more than a matrix product with all of them.

    The paper tells no default of r and k that fits all; k is an eighth of the ranks, as in its Flan fits (r = 64, k = 8,
    α = 16), but two blocks at least. The default of α is ours.

    Args:
        rank: r, at least two blocks.
        alpha: α; the change is scaled by α/k. Default: k, so that the scale is 1.
        active: k, the active ranks of a token: a multiple of ``partition``, from two blocks up to r.
        partition: the ranks of a block, which have one gate.
        balance: u, in units of p; 0: no balancing, and no buffers.
        bias_in_value: whether b is in the value of a gate too.
        task_gates: whether each task has a vector r_d in its gates.
        share: the latents that all tasks share: ``none``, ``experts`` (A and B), or ``all`` (A, B and R, with task gates alone).
            Default: ``all`` with task gates, ``none`` without.
        execution: ``dense`` or ``gathered``.

    Raises:
        InputError: a value is not allowed.

    Source: Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning", 2025.
    """

    rank: int = 8
    alpha: float | None = None
    active: int | None = None
    partition: int = 1
    balance: float = 1e-5
    bias_in_value: bool = False
    task_gates: bool = False
    share: str | None = None
    execution: str = DENSE
    _counting: Counting = field(default_factory=Counting, init=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rank", "partition"):
            check_at_least(name, getattr(self, name), 1)
        block = self.partition
        if self.rank % block or self.rank < 2 * block:
            raise InputError(
                f"rank is {self.rank} and partition is {block}; give a rank that is a multiple of the partition and at least "
                f"two blocks, nearest: {max(2, round(self.rank / block)) * block}"
            )
        if self.active is None:
            object.__setattr__(self, "active", max(2, self.experts // 8) * block)
        if not 2 * block <= self.k <= self.rank or self.k % block:
            nearest = min(max(2, round(self.k / block)), self.experts) * block
            raise InputError(
                f"active is {self.k}; give a multiple of the partition ({block}) from {2 * block} to the rank ({self.rank}), "
                f"nearest: {nearest} (the gate of one block would be 1 for any input)"
            )
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.k))
        if not 0 < self.scaling < math.inf:
            raise InputError(
                f"alpha {self.alpha} is not allowed; it must be positive and finite; the usual value is active ({self.k})"
            )
        if not 0 <= self.balance < 1:
            raise InputError(f"balance is {self.balance}; give a number from 0 (none) to below 1, usually 0.00001")
        if self.bias_in_value and not self.balance:
            raise InputError("bias_in_value is true, but balance is 0, so that there is no bias; leave one of them out")
        if self.share is not None:
            check_one_of("share", self.share, SHARE)
            if self.share == ALL and not self.task_gates:
                raise InputError("share is all, which leaves tasks no latent of their own; give task_gates=true too, or tau inf")
        check_one_of("execution", self.execution, EXECUTION)
        share = self.share or (ALL if self.task_gates else NONE)
        shared = {NONE: (), EXPERTS: ("lora_A", "lora_B"), ALL: ("lora_A", "lora_B", "gate")}[share]
        object.__setattr__(self, "shared", shared)

    @property
    def k(self) -> int:
        """k, the active ranks of a token."""
        assert self.active is not None
        return self.active

    @property
    def experts(self) -> int:
        """r/partition, the number of gates."""
        return self.rank // self.partition

    @property
    def scaling(self) -> float:
        """α/k."""
        assert self.alpha is not None
        return self.alpha / self.k

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        latents = {
            "lora_A": uniform_fan_in((self.rank, slot.in_features), generator),
            "lora_B": torch.zeros(slot.out_features, self.rank),
            "gate": uniform_fan_in((self.experts, slot.in_features), generator),
        }
        if self.task_gates:
            latents["task_gate"] = torch.zeros(self.experts)
        if not self.balance:
            return Start(latents)
        return Start(latents, buffers={BIAS: torch.zeros(self.experts), LOAD: torch.zeros(self.experts, dtype=torch.int64)})

    def route(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The experts of each token and their gates.

        Args:
            x: the layer's input (rows, tokens, in_features).
            tensors: as for :meth:`output`.

        Returns:
            (rows, tokens, k/partition) int64, numbers of blocks of ranks; and their gates, which sum to k/partition: float32.
        """
        chosen, gates, _ = self._route(x, tensors)
        return chosen, gates

    def _route(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As ``route``, and R x + r_d, (rows, tokens, experts)."""
        scores = RowLinear.apply(x, tensors["gate"].to(x.dtype))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.task_gates:
            scores = scores + tensors["task_gate"].to(scores)[..., None, :]
        number, bias = self.k // self.partition, tensors.get(BIAS)
        p = scores if bias is None else scores.sigmoid() + bias.to(scores)  # scores are in the order of p, without its rounding
        chosen = p.detach().topk(number, sorted=False).indices
        log_p = p.clamp(min=LEAST).log() if self.bias_in_value and bias is not None else F.logsigmoid(scores)
        gates = number * log_p.gather(-1, chosen).softmax(-1)  # p_j / Σ p = softmax(log p)_j
        return chosen, gates, scores

    def _counted_route(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        chosen, gates, _ = self._route(x, tensors)
        if LOAD in tensors:
            self._counting.count(chosen, tensors[LOAD])
        return chosen, gates.to(x.dtype)

    def _by_rank(self, chosen: Tensor, gates: Tensor) -> Tensor:
        """The gates of all ranks, (rows, tokens, r)."""
        by_expert = gates.new_zeros((*gates.shape[:-1], self.experts)).scatter(-1, chosen, gates)
        return by_expert.repeat_interleave(self.partition, -1) if self.partition > 1 else by_expert

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        a, b = tensors["lora_A"].to(x.dtype), tensors["lora_B"].to(x.dtype)
        chosen, gates = self._counted_route(x, tensors)
        if self.execution == GATHERED:
            return self._gathered(x, a, b, chosen, gates)
        return (RowLinear.apply(x, a) * self._by_rank(chosen, gates)) @ (self.scaling * b).mT

    def _gathered(self, x: Tensor, a: Tensor, b: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """The change by the chosen rows of A and columns of B of each token alone."""
        within = torch.arange(self.partition, device=x.device)
        ranks = (chosen[..., None] * self.partition + within).flatten(-2)  # (rows, tokens, k)
        row = torch.arange(len(x), device=x.device)[:, None, None]
        hidden = torch.einsum("nti,ntki->ntk", x, a[row, ranks]) * gates.repeat_interleave(self.partition, -1)
        return torch.einsum("ntk,ntko->nto", self.scaling * hidden, b.mT[row, ranks])

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        if self.task_gates:  # r_d is no matrix
            return None
        a, b = tensors["lora_A"].to(x.dtype), tensors["lora_B"].to(x.dtype)
        chosen, gates, scores = self._route(x, tensors)
        by_rank, hidden = self._by_rank(chosen, gates).to(x.dtype), x @ a.mT
        of_inner = self.scaling * gradient @ b
        # g = (k/partition) softmax(log p): its derivative, and that of log p
        of_gates = (of_inner * hidden).unflatten(-1, (self.experts, self.partition)).sum(-1).gather(-1, chosen)
        weights = gates / gates.shape[-1]
        of_log = gates * (of_gates - (weights * of_gates).sum(-1, keepdim=True))
        of_log = torch.zeros_like(scores).scatter(-1, chosen, of_log.to(scores))
        of_scores = of_log * self._slope(scores, tensors)
        return {
            "lora_A": (x, of_inner * by_rank),
            "lora_B": (by_rank * hidden, self.scaling * gradient),
            "gate": (x, of_scores.to(x.dtype)),
        }

    def _slope(self, scores: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The derivative of log p, or of log(p + b), with respect to the scores."""
        if not self.bias_in_value:
            return (-scores).sigmoid()
        p = scores.sigmoid()
        value = p + tensors[BIAS].to(p)
        return torch.where(value > LEAST, p * (1 - p) / value.clamp(min=LEAST), 0.0)

    def kept_per_token(self, slot: Slot) -> int:
        copies = self.k * (slot.in_features + slot.out_features) if self.execution == GATHERED else 0
        return 3 * self.rank + 5 * self.experts + copies

    def callbacks(self) -> Sequence[Any]:
        return [LoadBalance(self._counting, self.balance)] if self.balance else []

    def __repr__(self) -> str:
        always = ("rank", "alpha", "active")
        own = [one for one in fields(self) if one.init and (one.name in always or getattr(self, one.name) != one.default)]
        return f"SMoRA({', '.join(f'{one.name}={getattr(self, one.name)!r}' for one in own)})"
