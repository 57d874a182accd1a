"""SaRA (Hu et al., 2024, arXiv 2409.06633): only the smallest weights of a layer are learned, as one sparse vector."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Adapter
from bora_pyro.backbone.fit_hooks import FitHooks
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_one_of, shown

SMALLEST, LARGEST, RANDOM = SELECT = ("smallest", "largest", "random")
#: Numbers of a dense block of ΔW that are always allowed: 4 MiB in float32.
BLOCK = 2**20


class SparseLinear(torch.autograd.Function):
    """x ΔWᵀ for each row, where ΔW (out, in) has the values p at some places and is zero elsewhere.

    ΔW is never built as a whole. Some of its output rows at a time become a dense block, as many as have about as many numbers as
    p. The gradient of p is the entries of gᵀ x at its places, computed in the same blocks. The matrix products are dense,
    so a pass costs as much as that of the frozen layer itself. The memory grows with the number of entries, not with the size of
    the layer. x, p and the places are all that is kept for the backward pass.

        >>> x, p, index = torch.tensor([[[1.0, 10.0]]]), torch.tensor([[3.0, 2.0]]), torch.tensor([3, 0])
        >>> SparseLinear.apply(x, p, index, 2)  # ΔW = [[2, 0], [0, 3]]
        tensor([[[ 2., 30.]]])

    Arguments of ``apply``: x (rows, tokens, in); p (rows, entries); the places (entries,) as o · in + i, in descending order,
    which zeros at the end may fill up if their p is 0; and the number of outputs.
    """

    @staticmethod
    def forward(x: Tensor, p: Tensor, index: Tensor, out_features: int) -> Tensor:
        parts = [x @ block.mT for block, _ in _blocks(p, index, out_features, x.shape[-1])]
        return torch.cat(parts, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        x, p, index, ctx.out_features = inputs
        ctx.save_for_backward(x, p, index)
        ctx.save_for_forward(x, p, index)

    @staticmethod
    def jvp(ctx: Any, tangent_of_x: Tensor, tangent_of_p: Tensor, *unused: None) -> Tensor:
        x, p, index = ctx.saved_tensors
        of_x = SparseLinear.apply(tangent_of_x, p, index, ctx.out_features)
        return of_x + SparseLinear.apply(x, tangent_of_p, index, ctx.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, p, index = ctx.saved_tensors
        needs_x, needs_p = ctx.needs_input_grad[:2]
        of_x, of_p, first = None, [], 0
        for block, places in _blocks(p, index, ctx.out_features, x.shape[-1], dense=needs_x):
            last = first + block.shape[-2]
            own = gradient[..., first:last]
            if needs_x:
                of_x = own @ block if of_x is None else of_x + own @ block
            if needs_p:
                of_p.append((own.mT @ x).flatten(1).index_select(1, places))
            first = last
        # the blocks go upwards through the outputs, and the places downwards
        return of_x, torch.cat(of_p[::-1], 1) if needs_p else None, None, None


def _blocks(
    p: Tensor, index: Tensor, out_features: int, in_features: int, *, dense: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """ΔW in dense blocks of outputs, (rows, outputs, in), with the places of their entries within the block.

    Without ``dense`` the blocks are empty tensors of the same shape, without memory.
    """
    rows, entries = p.shape
    outputs = max(1, min(out_features, -(-max(entries, BLOCK // max(rows, 1)) // in_features)))
    edges = [*range(0, out_features, outputs), out_features]
    if len(edges) == 2:
        ends = [entries, 0]  # one block needs no search, which would synchronise with an accelerator
    else:
        starts = torch.tensor(edges, device=index.device) * in_features
        ends = (entries - torch.searchsorted(index.flip(0), starts)).tolist()
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        own = slice(ends[number + 1], ends[number])
        places = index[own] - first * in_features
        shape = (rows, last - first, in_features)
        if dense:
            yield p.new_zeros((rows, (last - first) * in_features)).index_add(1, places, p[:, own]).view(shape), places
        else:
            yield p.new_empty(1).expand(shape), places


@dataclass(frozen=True)
class SaRA(Adapter):
    """W = W_full + ΔW, where ΔW is zero except at the entries of W_full with the smallest absolute values.

        >>> weight = torch.tensor([[0.5, -0.1], [0.01, 2.0]])
        >>> adapter, slot = SaRA(fraction=0.5), Slot("q_proj", ("q_proj",), 2, 2)
        >>> start = adapter.start(slot, lambda: weight, torch.Generator())
        >>> start.latents, start.fixed["index"]
        ({'sparse': tensor([0., 0.])}, tensor([2, 1]))
        >>> adapter.delta({"sparse": torch.tensor([7.0, 8.0])} | start.fixed)
        tensor([[0., 8.],
                [7., 0.]])

    The latent is the vector p of the changes of the chosen weights; p = 0 is the pretrained model. The entries are the same for
    all tasks, so the change of two tasks together is the sum of their vectors. ΔW is linear in p: a Normal prior on p is a Normal
    prior on ΔW. The released code writes the absolute values of the small weights back, which changes the model before the first
    step, and decays these weights; here neither is so.

    ``nuclear`` makes ΔW of each task nearly low-rank. It multiplies the density of every task by
    exp(−λ Σ_i (√(σ_i² + ε²) − ε)), with the singular values σ_i of ΔW of all layers. The paper's penalty is the nuclear norm of
    the learned weights themselves, W_full + ΔW at the chosen entries; the released code adds it for one random layer a step. Here
    it is zero at the pretrained model. It costs a singular value decomposition of every layer and task in each step, and
    guides that are made of a curvature (``laplace`` and its relatives) do not see it.

    ``progressive`` re-selects the entries once during a fit (:class:`Reselection`).

    The paper chooses τ so that the number of entries meets a budget. It does not tell a budget for language models; the default
    of ``fraction`` is ours, and so are ``smoothing`` and the re-selection by a fraction of the steps.

    Args:
        fraction: the fraction of the entries of each layer that is learned, above 0 and at most 1. It is not used with a
            threshold.
        threshold: τ: the entries with |W| < τ are learned, whatever their number (the paper's M = 1[|W| < τ]). None: as many
            as ``fraction`` says.
        select: ``smallest``; or ``largest`` or ``random`` entries, to compare with.
        nuclear: λ, the strength of the nuclear norm in nats per unit of a singular value; 0: none.
        smoothing: ε > 0, in units of a singular value.
        progressive: the fraction of the steps of a fit after which the entries are re-selected; 0: never.

    Raises:
        InputError: a value is not allowed, or (from ``start``) the choice leaves a layer without entries.
    """

    fraction: float = 0.05
    threshold: float | None = None
    select: str = SMALLEST
    nuclear: float = 0.0
    smoothing: float = 1e-3
    progressive: float = 0.0

    def __post_init__(self) -> None:
        check_one_of("select", self.select, SELECT)
        if not 0 < self.fraction <= 1:
            raise InputError(
                f"fraction is {self.fraction}; give a number above 0 and at most 1, nearest: {1 if self.fraction > 1 else 0.01}"
            )
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise InputError(f"threshold is {self.threshold}; give a number above 0, or none to choose by fraction")
        if not 0 <= self.nuclear < math.inf:
            raise InputError(f"nuclear is {self.nuclear}; give a number from 0 up, nearest: 0")
        if not 0 < self.smoothing < math.inf:
            raise InputError(f"smoothing is {self.smoothing}; give a number above 0, nearest: 0.001")
        if not 0 <= self.progressive < 1:
            raise InputError(f"progressive is {self.progressive}; give a number from 0 up and below 1, nearest: 0")
        for name in ("threshold", "progressive"):
            if getattr(self, name) and self.select != SMALLEST:
                raise InputError(f"{name} chooses the smallest entries, and select is {shown(self.select)}; give one of the two")

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        size = slot.out_features * slot.in_features
        layer = f"layer {slot.name} ({slot.out_features} x {slot.in_features})"
        if self.select == RANDOM:
            score = torch.rand(size, generator=generator)
        else:
            score = weight().abs().flatten() * (-1 if self.select == LARGEST else 1)
        if self.threshold is None:
            chosen = _smallest(score, self._number(layer, size))
        else:
            chosen = (score < self.threshold).nonzero()[:, 0]
            if not len(chosen):
                # doubled, because the smallest value itself is not below itself
                raise InputError(
                    f"threshold {self.threshold:g} is below every weight of {layer}; the smallest is {float(score.min()):.2g}, "
                    f"give for example {2 * float(score.min()):.2g}"
                )
        # in descending order, so that the zeros that fill up the shorter layers of a slot keep the order
        index = chosen.flip(0)
        # a tensor without entries, which tells (out, in)
        fixed = {"index": index, "shape": torch.empty((0, slot.out_features, slot.in_features))}
        buffers = {"trained": torch.ones(len(index), dtype=torch.bool)} if self.progressive else {}
        return Start({"sparse": torch.zeros(len(index))}, fixed=fixed, buffers=buffers)

    def _number(self, layer: str, size: int) -> int:
        number = round(self.fraction * size)
        if not number:
            raise InputError(f"fraction {self.fraction:g} chooses no entry of {layer}; give at least {1 / size:.2g}")
        return number

    def delta(self, tensors: Mapping[str, Tensor]) -> Tensor:
        p, (out_features, in_features) = tensors["sparse"], tensors["shape"].shape[-2:]
        flat = p.new_zeros((*p.shape[:-1], out_features * in_features)).index_add(-1, tensors["index"], p)
        return flat.unflatten(-1, (out_features, in_features))

    def output(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        change: Tensor = SparseLinear.apply(x, tensors["sparse"].to(x.dtype), tensors["index"], tensors["shape"].shape[-2])
        return change

    def log_factor(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if not self.nuclear:
            return None
        values = torch.linalg.svdvals(self.delta(tensors))
        return -self.nuclear * ((values.square() + self.smoothing**2).sqrt() - self.smoothing).sum(-1)

    def callbacks(self) -> Sequence[Any]:
        return [Reselection(self)] if self.progressive else []


def _smallest(score: Tensor, number: int) -> Tensor:
    """The places of the ``number`` smallest values, in ascending order; of equal values, the first ones."""
    largest = score.kthvalue(number).values
    chosen = score < largest
    ties = (score == largest).nonzero()[:, 0]
    chosen[ties[: number - int(chosen.sum())]] = True
    return chosen.nonzero()[:, 0]


class Reselection(FitHooks):
    """Re-selects the entries of SaRA once during a fit: only those that are still small are trained on.

    After a fraction of the steps, an entry whose weight W_full + Θ is not below the layer's threshold any more keeps its value
    in Θ and in every task until the end of the fit. The threshold is τ, or the largest absolute value among the chosen entries.
    The other entries are trained on. The released code resets the optimiser then; here the entries that are trained on keep their
    moments. Which entries are trained is the buffer ``trained``, a part of checkpoints.

    Raises:
        InputError: at the re-selection, the steps draw tasks, or the optimiser is not AdamW.
    """

    name = "sara"

    def __init__(self, adapter: SaRA) -> None:
        self.adapter = adapter

    def before_step(self, loop: Any) -> None:
        for parameter, frozen in self._frozen(loop):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0.0)

    def after_step(self, loop: Any) -> None:
        due = max(1, round(self.adapter.progressive * loop.total_steps))
        if loop.step_number + 1 == due:
            self.reselect(loop)

    @torch.no_grad()
    def reselect(self, loop: Any) -> None:
        """Choose the entries that are trained on."""
        if loop.draws_tasks or not isinstance(loop.state.optimizer, torch.optim.AdamW):
            raise InputError(
                f"progressive {self.adapter.progressive:g} needs steps of AdamW that move all tasks; give "
                "--task_subsampling false and a guide that AdamW fits, or progressive=0"
            )
        model, mean = loop.model, loop.state.global_mean()
        for slot in model.backbone.slots:
            trained = model.tensors.buffers[f"{slot.name}.trained"]
            for layer in range(slot.layers):
                index = model.tensors.fixed[f"{slot.name}.index"][layer]
                weight = model.backbone.weight(slot, layer).to(index.device).flatten()[index]
                now = (weight + mean[f"{slot.name}.sparse"][0, layer]).abs()
                trained[layer] = now <= (weight.abs().max() if self.adapter.threshold is None else self.adapter.threshold)
        # with zero moments and a zero gradient, AdamW leaves an entry where it is
        for parameter, frozen in self._frozen(loop):
            for value in loop.state.optimizer.state[parameter].values():
                if value.shape == parameter.shape:
                    value.masked_fill_(frozen, 0.0)

    @staticmethod
    def _frozen(loop: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The guide's parameters of sparse vectors, with the mask of the entries that are not trained, (layers, entries)."""
        for slot in loop.model.backbone.slots:
            frozen = ~loop.model.tensors.buffers[f"{slot.name}.trained"]
            if frozen.any():
                for name, parameter in loop.state.guide.named_parameters():
                    if f".{slot.name}.sparse" in f".{name.replace('/', '.')}" and parameter.shape[-2:] == frozen.shape:
                        yield parameter, frozen
