"""How much memory a fit will need at most, by a formula, before it starts.

>>> import bora_pyro as bp
>>> backbone = bp.Backbone.from_pretrained("builtin:nano")
>>> data = bp.load_tasks("builtin:documentation", backbone.tokenizer, max_train_documents=2, max_eval_documents=1)
>>> print(estimate_memory(bp.BoRA(backbone, len(data.tasks)), data))
about ... GiB = base 0.0 + adapters and optimiser 0.0 + activations ... + logits ...
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.head import chunk_tokens
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.inference.task_rows import MANY_TASKS
from bora_pyro.model import BoRA

FLOAT = 4  # bytes: adapters, gradients, optimiser and the likelihood are float32 whatever the base is
UNUSED = 0.25  # of the activations on a CPU: what glibc's allocator holds between blocks, as measured
EVALUATION_BUDGET = 8192  # tokens of a batch of `evaluate`


@dataclass(frozen=True)
class MemoryEstimate:
    """The largest amount of memory that a fit holds at one time, in bytes, by what holds it.

    Attributes:
        process: Python, the libraries and the data, before the model.
        base: the frozen model.
        state: what grows with the number of tasks: the guide, its optimiser and copies.
        activations: what the layers keep for the backward pass, the batch's adapters, and a layer's scratch space.
        logits: the logits held at one time, with their log-softmax and gradient.
    """

    process: int
    base: int
    state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.process + self.base + self.state + self.activations + self.logits

    def __str__(self) -> str:
        parts = {
            "process": self.process,
            "base": self.base,
            "adapters and optimiser": self.state,
            "activations": self.activations,
            "logits": self.logits,
        }
        shown = " + ".join(f"{name} {value / 2**30:.1f}" for name, value in parts.items() if value or name != "process")
        return f"about {self.total / 2**30:.1f} GiB = {shown}"


def estimate_memory(
    model: BoRA,
    data: TaskData,
    *,
    token_budget: int = 4096,
    task_subsampling: bool | None = None,
    task_memory: float = 4.0,
    accumulate: int = 1,
    processes: int = 1,
    process: int = 0,
) -> MemoryEstimate:
    """Predict the peak of a MAP fit.

    With P the numbers of one task's adapter, G = (D + 1) P those of the guide (Θ and D deviations), R the documents and T the
    tokens of a batch, padding included, V the vocabulary, h the hidden size, a and k the widths of the queries and of the keys,
    f that of the feed-forward layer, and b the bytes of a number of the base (R and T of a part, where a batch is taken in parts,
    as ``Backbone.pass_tokens`` says):

    - base: its parameters and buffers as they are stored;
    - state, throughout: 4 (4 G + D P + P): the guide, two moments of AdamW, the copy of the best state, θ as the guide keeps it
      from its first run, and the common start;
    - a step at its loss: T (L kept + 6 h b) for L layers, 4 R P for the documents' own adapters, and the logits 12 C V of the C
      tokens whose logits exist at one time (``token_loss.chunk_tokens``; all T where the model caps its logits): in float32,
      their log-softmax, and in the base's precision the logits themselves and their gradient. ``kept`` is what autograd keeps
      of a token in one layer: two inputs of norms, 2 h (in float32 where the norm is not torch's); 2 a + 2 k of attention; h
      where adapters read the normed input of attention, and h where they read that of the feed-forward layer; its activation,
      f (4 f for GPT-2's, 2 f more where it is gated, f more where an adapter reads it anew); and r for each adapted layer.
      With gradient checkpointing a layer keeps h alone;
    - a step in its backward pass: what the layers keep and the scratch space of one, (3 h + 2 f) b a token, with gradient
      checkpointing also what that one keeps while it runs again;
    - a step at the end of its backward pass: 4 (G + D P + R P), the gradients of the guide, of θ and of the batch's adapters;
    - an evaluation of 8192 tokens: θ, 4 D P, its batch's adapters, 8 C V of logits and one layer's scratch space.

    Where tasks are drawn, D is the number n ≤ R of tasks of a batch in all of these, and there are beside it the rows of all
    tasks, 16 D P for values, moments and best values; beyond ``task_memory`` they lie in files, of which no more is held.

    On an accelerator the largest of the four counts, beside what is held throughout. On CPUs their terms add up: glibc returns
    only blocks above its mmap threshold (at most 32 MiB: the logits of a usual batch) to the system, so that the process keeps
    what one phase has freed while another takes blocks of other sizes. What stays unused between the blocks is in no formula: a
    quarter of the activations is added for it, as ``scripts/benchmarks/check_memory.py`` measures (with gradient checkpointing
    nothing, for freed blocks then go back). ``logits`` is what the C V terms give, ``activations`` the other terms of a batch,
    and ``state`` those of the guide.

    Args:
        model: the BoRA model, on its base.
        data: the tokenised tasks; the shapes of their batches are those of the fit.
        token_budget: tokens of a batch of the fit.
        task_subsampling: whether tasks are drawn, as for ``fit``.
        task_memory: GiB for what belongs to tasks then.
        accumulate: batches of a step.
        processes: that share the tasks; the estimate is of the first, which gathers their rows.
        process: bytes that are held before the model is loaded; 0 for an accelerator.
    """
    size = sum(start.numel() for start in model.starts.values())
    all_tasks = model.num_tasks * size
    guide = _guide_numbers(model, model.num_tasks)
    layers, checkpointing = _Layers.of(model), model.backbone.gradient_checkpointing
    vocabulary = model.backbone.model.get_output_embeddings().weight.shape[0]
    backbone = model.backbone
    # a model that caps its logits gives those of all tokens
    chunk = chunk_tokens(backbone.device, vocabulary) if backbone.ends_with_head else sys.maxsize
    others = (model.tensors.fixed, model.tensors.buffers, model.tensors.masks)
    fixed = sum(t.numel() * t.element_size() for store in others for t in store.values())
    throughout = FLOAT * (4 * guide + all_tasks + size) + fixed
    drawn = (model.num_tasks > MANY_TASKS or processes > 1) if task_subsampling is None else task_subsampling
    of_one = _guide_numbers(model, 2) - _guide_numbers(model, 1)
    of_all = guide - model.num_tasks * of_one
    if drawn:
        held, budget = 4 * FLOAT * model.num_tasks * of_one, round(task_memory * 2**30)
        if held > budget:  # files: mapped into the process, not into an accelerator
            held = budget if backbone.device.type == "cpu" else 0
        throughout = FLOAT * (4 * of_all + 2 * size) + held + fixed

    # (state, activations, logits) of each batch's phases
    phases = []
    drawn_rows = max((rows for rows, _ in _shapes(data.train, token_budget)), default=0) if drawn else 0
    # the guide's rows, their gradients and moments, θ and its gradient
    throughout += FLOAT * min(accumulate * drawn_rows, model.num_tasks) * (4 * of_one + 2 * size)
    for rows, tokens in (_part(*shape, backbone.pass_tokens) for shape in _shapes(data.train, token_budget)):
        kept = tokens * layers.kept(checkpointing=checkpointing) + FLOAT * rows * size
        logits = 3 * FLOAT * min(tokens, chunk) * vocabulary
        again = tokens * (layers.scratch() + (layers.layer() if checkpointing else 0))
        own, gradients = FLOAT * rows * size, FLOAT * (of_all if drawn else guide + all_tasks)
        if model.backbone.device.type == "cpu":
            phases.append((gradients, kept + again + own, logits))
        else:
            phases += [(0, kept, logits), (0, kept + again, 0), (gradients, own, 0)]
    for split in (data.validation, data.test):
        for rows, tokens in _shapes(split, EVALUATION_BUDGET):
            logits = 2 * FLOAT * min(tokens, chunk) * vocabulary
            theta = FLOAT * (min(rows, model.num_tasks) * size if drawn else all_tasks)
            phases.append((theta, tokens * layers.scratch() + FLOAT * rows * size, logits))
    if model.backbone.device.type == "cpu":
        state, activations, logits = (max(part) for part in zip((0, 0, 0), *phases, strict=True))
        activations += 0 if checkpointing else round(UNUSED * activations)
    else:
        state, activations, logits = max(phases, key=sum, default=(0, 0, 0))
    return MemoryEstimate(process, base_bytes(model.backbone), throughout + state, activations, logits)


def base_bytes(backbone: Backbone) -> int:
    """Bytes of the base's parameters and buffers as they are stored, each counted once."""
    tensors = [*backbone.model.parameters(), *backbone.model.buffers()]
    # of a base in parts what this process holds
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    # 8-bit layers keep the scales of their rows, 4-bit ones those of their blocks, beside the weights
    for parameter in backbone.model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        tensors += [value for value in (getattr(state, "absmax", None), getattr(nested, "absmax", None)) if value is not None]
        if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
            tensors.append(scales)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes(device: torch.device) -> int:
    """The most this process has held, to be asked before a model is loaded; 0 for an accelerator, whose tensors are ours."""
    return 0 if device.type != "cpu" else peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was held: of the accelerator where one is used, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _guide_numbers(model: BoRA, tasks: int) -> int:
    """How many numbers a MAP guide for so many tasks has: those of the sample sites."""
    theta = {name: start.expand(tasks, *start.shape) for name, start in model.starts.items()}
    return sum(value.numel() for value in model.prior.sites(theta, model.starts).values())


def _shapes(split: TokenSplit, token_budget: int) -> list[tuple[int, int]]:
    """Rows and tokens, padding included, of the batches of a split."""
    # by length, not in the order of an epoch: that has the fullest batches, and those of the most rows
    return [(rows, rows * longest) for rows, longest in split.batches(token_budget=token_budget).shapes]


def _part(rows: int, tokens: int, most: int) -> tuple[int, int]:
    """Rows and tokens of the largest part of a batch, as `Batch.parts` cuts it."""
    of_part = -(-rows // min(rows, -(-tokens // most)))
    return of_part, of_part * (tokens // rows)


@dataclass(frozen=True)
class _Layers:
    """The widths of a decoder layer, and what it keeps of a token: the letters of `estimate_memory`."""

    number: int
    hidden: int
    queries: int
    keys: int
    inner: int
    inner_kept: int  # of the activation and the gate, in units of f
    adapted_inputs: int  # numbers of normed or gated inputs that the adapters alone keep
    ranks: int  # of all adapted layers of a block
    bytes: int
    norm_bytes: int

    @classmethod
    def of(cls, model: BoRA) -> _Layers:
        base = model.backbone.model
        config = base.config.get_text_config()
        blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
        number, hidden = max(len(blocks), 1), config.hidden_size
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or hidden // heads
        inner = next((w for n in ("intermediate_size", "ffn_dim", "n_inner") if (w := getattr(config, n, None))), 4 * hidden)
        activation = str(next((w for n in ("activation_function", "hidden_act") if (w := getattr(config, n, None))), "gelu"))
        linear = [m for m in (blocks[0].modules() if blocks else ()) if isinstance(m, nn.Linear)]
        gated = sum((m.in_features, m.out_features) == (hidden, inner) for m in linear) > 1
        kept = (4 if activation == "gelu_new" else 1) + (2 if gated else 0)
        adapted = {"attention": 0, "up": 0, "down": 0}
        rank = sum(model.adapter.kept_per_token(slot) * slot.layers for slot in model.backbone.slots) / number
        for slot in model.backbone.slots:
            if slot.in_features == inner != hidden:
                # ReLU keeps its output, which is the next layer's input
                adapted["down"] = 0 if activation == "relu" and not gated else inner
            elif slot.out_features == inner != hidden:
                adapted["up"] = hidden
            elif not any(end in slot.name for end in ("o_proj", "out_proj", "c_proj", "dense")):
                adapted["attention"] = hidden
        itemsize = base.get_input_embeddings().weight.element_size()
        plain = any(isinstance(m, nn.LayerNorm) for m in base.modules())
        return cls(
            number=number,
            hidden=hidden,
            queries=heads * head,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
            inner=inner,
            inner_kept=kept,
            adapted_inputs=sum(adapted.values()),
            ranks=round(rank),
            bytes=itemsize,
            norm_bytes=itemsize if plain else FLOAT,
        )

    def layer(self) -> int:
        """Bytes of a token that one layer keeps for its backward pass."""
        numbers = 2 * self.queries + 2 * self.keys + self.inner_kept * self.inner + self.adapted_inputs + self.ranks
        return 2 * self.hidden * self.norm_bytes + numbers * self.bytes

    def kept(self, *, checkpointing: bool) -> int:
        """Bytes of a token that all layers keep."""
        # the embedding and the last norm; the observed states, their gradient, and that gradient scaled and put back
        ends = 6 * self.hidden * self.bytes
        if not checkpointing:
            return ends + self.number * self.layer()
        return ends + self.number * self.hidden * self.bytes

    def scratch(self) -> int:
        """Bytes of a token that a layer needs while it runs and keeps nothing."""
        return (3 * self.hidden + 2 * self.inner) * self.bytes
