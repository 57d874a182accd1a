"""MeteoRA (Xu et al., 2025, arXiv 2405.13053): gates choose the adapters that read each token, among those of all tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bora_pyro.backbone.backbone import Change
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least, check_one_of
from bora_pyro.routers.base import AdaptedModel, Router

#: The name of a gate within its layer.
GATE = "gate"
#: How the products are computed: those of the chosen adapters alone, or those of all adapters.
GATHERED, DENSE = EXECUTIONS = ("gathered", "dense")
#: The largest number of numbers that the padded inputs or outputs of a chunk of tokens have.
_CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class MeteoRA(Router):
    """W x + Σ_{d in top-k} w_d ΔW_d x for each token, with gates G x and weights w = softmax over the k largest gates / T.

        >>> MeteoRA(k=1)
        MeteoRA(k=1, temperature=1.0, execution='gathered')
        >>> slot = Slot("q_proj", ("q_proj",), 16, 32)
        >>> {name: tuple(value.shape) for name, value in MeteoRA().start(slot, None, torch.Generator()).latents.items()}
        {'gate': (16,)}

    Each adapted layer has its own gates. The gate of a task is a latent of the task, a vector as long as the layer's input, so
    that G has a row for each task and no bias. It starts at 0, the mode of its prior, where all gates are equal; the released
    code starts it at random. The adapters are finished: :func:`~bora_pyro.inference.route_fit.route_fit` learns the gates alone.

    With k = 1 the weight is 1, so the text's own likelihood has no gradient in the gates: only the labels teach them. With k > 1
    it has a gradient in the k chosen gates of a token, and in no other.

    **Execution.** ``gathered`` collects the tokens of each adapter, pads them to one length and multiplies the adapters as a
    batch. There is no loop over adapters, no copy of an adapter for each token, and adapters that no token chose are left out.
    ``dense`` multiplies every token by every adapter, with weights that are 0 outside the top k. Both have the same result.

    A routed model has no ΔW of its own, because the change depends on the token. It cannot be merged or exported.

    Args:
        k: number of adapters that read a token.
        temperature: T; a higher one makes the weights of the k adapters more equal. It does not change which ones they are.
        execution: ``gathered`` or ``dense``.

    Raises:
        InputError: a value is out of range; or (when the model is read) k is larger than the number of tasks.

    Source: Xu, Lai and Huang, "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models", ICLR 2025.
    """

    reads_all_tasks: ClassVar[bool] = True

    k: int = 2
    temperature: float = 1.0
    execution: str = GATHERED

    def __post_init__(self) -> None:
        check_at_least("k", self.k, 1)
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give a finite number above 0")
        check_one_of("execution", self.execution, EXECUTIONS)

    def check_tasks(self, num_tasks: int) -> None:
        """Check that there are k adapters.

        Raises:
            InputError: there are fewer.
        """
        if self.k > num_tasks:
            raise InputError(f"k is {self.k}, and there are {num_tasks} adapters; give a whole number from 1 to {num_tasks}")

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        return Start({GATE: torch.zeros(slot.in_features)})

    def change(self, model: AdaptedModel, weights: Mapping[str, Tensor], row: Tensor, task: Tensor) -> Change:
        return self.recorded_change(model, weights, None)

    def recorded_change(self, model: AdaptedModel, weights: Mapping[str, Tensor], gates: dict[str, Tensor] | None) -> Change:
        """As :meth:`change`, and keep the gates of every layer.

        Args:
            model: applies the adapters.
            weights: latents of all tasks by ``<slot>.<name>``, (D, layers, *shape).
            gates: gets G x of each layer, (rows, tokens, D) float32, by ``<slot>.<layer>``. None: they are not kept.
        """
        self.check_tasks(model.num_tasks)

        def change(slot: Slot, layer: int, x: Tensor, output: Tensor) -> Tensor:
            latents = {name: weights[f"{slot.name}.{name}"][:, layer].to(output.device) for name in model.tensors.names(slot)}
            logits = x.float() @ latents.pop(GATE).float().mT
            if gates is not None:
                gates[f"{slot.name}.{layer}"] = logits
            weight, chosen = self.choose(logits)

            def adapters(x: Tensor, tasks: Tensor) -> Tensor:
                """What the adapters of some tasks add for their tokens: (tasks, tokens, out_features)."""
                of_tasks = {name: value[tasks] for name, value in latents.items()}
                tensors = model.tensors.at_layer(slot, layer, of_tasks, tasks)
                return model.output(x, {name: value.to(output.device) for name, value in tensors.items()})

            execute = gathered if self.execution == GATHERED else dense
            width = max(slot.in_features, slot.out_features)
            chunk = max(1, _CHUNK_ENTRIES // (width * model.num_tasks))
            parts = zip(*(part.flatten(0, 1).split(chunk) for part in (x, weight, chosen)), strict=True)
            added = [execute(adapters, *part, num_tasks=model.num_tasks) for part in parts]
            return output + torch.cat(added).view(output.shape).to(output.dtype)

        return change

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The k adapters of each token.

            >>> weight, chosen = MeteoRA(k=2).choose(torch.tensor([0.0, 3.0, -1.0, 3.0]))
            >>> weight.tolist(), sorted(chosen.tolist())
            ([0.5, 0.5], [1, 3])

        Args:
            logits: the gates, (..., D).

        Returns:
            Their weights, (..., k), which sum to 1, and their tasks, (..., k) int64.
        """
        value, chosen = logits.topk(self.k, -1)
        if self.k == 1:
            return torch.ones_like(value), chosen
        return (value / self.temperature).softmax(-1), chosen


#: ``adapters(x, tasks)``: what the adapters of ``tasks`` (n,) add for inputs (n, tokens, in), (n, tokens, out).
Adapters = Callable[[Tensor, Tensor], Tensor]


def gathered(adapters: Adapters, x: Tensor, weight: Tensor, chosen: Tensor, *, num_tasks: int) -> Tensor:
    """Σ_j w_j ΔW_{d(j)} x of each token, by one batched product of the adapters that any token chose.

    Args:
        adapters: applies the adapters.
        x: (tokens, in).
        weight: (tokens, k).
        chosen: (tokens, k) int64, the adapters of each token.
        num_tasks: D.

    Returns:
        (tokens, out).
    """
    k = chosen.shape[1]
    task, pair = chosen.flatten().sort(stable=True)  # the pairs of a token and an adapter, by adapter
    counts = torch.bincount(task, minlength=num_tasks)
    used = counts.nonzero()[:, 0]
    # the place of each pair among those of its adapter, and of the adapter among those that are used
    place = torch.arange(len(task), device=task.device) - (counts.cumsum(0) - counts)[task]
    group = torch.searchsorted(used, task)
    token = pair // k
    inputs = x.new_zeros(len(used), int(counts.max()), x.shape[1]).index_put((group, place), x[token])
    outputs = adapters(inputs, used)[group, place] * weight.flatten()[pair, None].to(x.dtype)
    return outputs.new_zeros(len(x), outputs.shape[1]).index_add(0, token, outputs)


def dense(adapters: Adapters, x: Tensor, weight: Tensor, chosen: Tensor, *, num_tasks: int) -> Tensor:
    """As :func:`gathered`, with the products of all tokens and all adapters."""
    outputs = adapters(x.expand(num_tasks, *x.shape), torch.arange(num_tasks, device=x.device))
    every = weight.new_zeros(len(x), num_tasks).scatter(1, chosen, weight)
    return torch.einsum("dto,td->to", outputs, every.to(outputs.dtype))
