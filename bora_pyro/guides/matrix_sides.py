"""The latents of an adapter as linear maps: for each token the input u of a map, and the gradient g with respect to its output.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7, 8]], task=[1, 0], num_tasks=2)
>>> theta = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}
>>> first = next(matrix_sides(model, theta, split))
>>> first.name, first.layer, first.long.shape, first.short.shape, first.tokens.tolist()
('q_proj.lora_A', 0, torch.Size([2, 3, 256]), torch.Size([2, 3, 2]), [2, 2])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.backbone.slots import Slot
from bora_pyro.data.batch import Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.guides.curvature import own_rows
from bora_pyro.model import BoRA, Weights


@dataclass(frozen=True)
class Sides:
    """Vectors of the tokens of one pass on the two sides of a latent at one layer, 0 at tokens that do not count.

    Attributes:
        name: the latent.
        layer: the layer.
        task: (rows,) task of each row.
        tokens: (rows,) number of tokens that count.
        long: (rows, tokens, n).
        short: (rows, tokens, r).
    """

    name: str
    layer: int
    task: Tensor
    tokens: Tensor
    long: Tensor
    short: Tensor


@dataclass(frozen=True)
class _Seen:
    """The input and the changed output of a target layer, and for each row the position of its weights and its task."""

    slot: Slot
    layer: int
    row: Tensor
    task: Tensor
    x: Tensor
    output: Tensor


@dataclass
class _Pass:
    """A pass through the model: its batch, what the target layers have seen, and the last states or logits."""

    batch: Batch
    seen: list[_Seen] = field(default_factory=list)
    last: Tensor | None = None


class _Recording(BoRA):
    """A model that keeps what its target layers see."""

    def __init__(self, model: BoRA) -> None:
        vars(self).update(vars(model))
        self.passes: list[_Pass] = []
        self.on = True

    def logits(self, batch: Batch, weights: Weights | None) -> Tensor:
        self.passes.append(_Pass(batch))
        self.passes[-1].last = logits = super().logits(batch, weights)
        return logits

    def lazy_logits(self, batch: Batch, weights: Weights | None) -> Tensor | LazyLogits:
        self.passes.append(_Pass(batch))
        logits = super().lazy_logits(batch, weights)
        self.passes[-1].last = logits.states if isinstance(logits, LazyLogits) else logits
        return logits

    def change(self, weights: Weights, row: Tensor, task: Tensor | None = None) -> Change:
        change = super().change(weights, row, task)

        def recorded(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
            changed = change(slot, layer, x, output)
            if self.on:  # gradient checkpointing runs a layer again in the backward pass
                self.passes[-1].seen.append(_Seen(slot, layer, row, row if task is None else task, x.detach(), changed))
            return changed

        return recorded


def matrix_sides(model: BoRA, theta: Weights, split: TokenSplit, *, token_budget: int = 4096) -> Iterator[Sides]:
    """Yield the two sides of all latents and layers, for some documents after the other.

    Args:
        model: the BoRA model.
        theta: θ of all tasks, (D, layers, *shape) by name.
        split: the documents.
        token_budget: tokens of a batch, padding included.

    Raises:
        InputError: the latents are not the matrices of linear maps, or the adapter masks entries; or the router lets the adapters
            of all tasks read a document.
    """
    for batch in split.batches(token_budget=token_budget):
        recording = _Recording(model)
        rows, log_likelihood = own_rows(recording, theta, batch.to(model.backbone.device))
        recording.on = False
        passes = [each for each in recording.passes if each.last is not None]
        outputs = [(each.last, *(seen.output for seen in each.seen)) for each in passes]
        tensors = [tensor for of_pass in outputs for tensor in of_pass if tensor is not None]
        gradients = iter(torch.autograd.grad(log_likelihood, tensors, allow_unused=True, materialize_grads=True))
        for each in passes:
            counted = _counted(next(gradients), each.batch)
            for seen in each.seen:
                latents = {
                    name: rows[f"{seen.slot.name}.{name}"].detach()[:, seen.layer].index_select(0, seen.row)
                    for name in model.tensors.names(seen.slot)
                }
                yield from _sides_of(model, seen, next(gradients), latents, counted)


def _counted(gradient: Tensor, batch: Batch) -> Tensor:
    """The tokens from which something is predicted, directly or by later tokens that see them: (rows, tokens) bool.

    Args:
        gradient: the gradient with respect to the last states or logits, which is 0 at tokens that predict nothing.
        batch: the batch; its layout says what a token sees.
    """
    predicts = (gradient != 0).any(-1).to(batch.task.device)
    if batch.layout is None:
        return predicts.flip(1).cumsum(1).flip(1) > 0
    return (predicts[:, :, None] & batch.layout["attention_mask"][:, 0]).any(1)


def _sides_of(model: BoRA, seen: _Seen, gradient: Tensor, latents: Weights, counted: Tensor) -> Iterator[Sides]:
    """The two sides of the latents of one layer.

    Args:
        model: the BoRA model.
        seen: what the layer has seen.
        gradient: the gradient with respect to its output.
        latents: the latents of each row, (rows, *shape) by name within the layer.
        counted: the tokens that count.
    """
    like, weight = next(iter(latents.values())), model.likelihood.task_weight(seen.task)
    x, gradient = (value.to(like.device, like.dtype) for value in (seen.x, gradient * weight.sqrt()[:, None, None].to(gradient)))
    maps = model.adapter.linear_maps(x, gradient, model.tensors.at_layer(seen.slot, seen.layer, latents))
    if model.tensors.masks or maps is None or maps.keys() != latents.keys():
        raise InputError(
            f"{model.adapter} has latents that are not the matrices of linear maps; use the guide laplace, which is diagonal"
        )
    for name, vectors in maps.items():
        inputs, of_outputs = (value * counted[..., None] for value in vectors)
        sides = (inputs, of_outputs) if inputs.shape[-1] >= of_outputs.shape[-1] else (of_outputs, inputs)
        yield Sides(f"{seen.slot.name}.{name}", seen.layer, seen.task, counted.sum(1), *sides)
