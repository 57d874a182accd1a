"""A formula for the largest amount of memory that a fit will need, computed before it starts.

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
from torch.distributed.tensor import DTensor

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.backbone.head import chunk_tokens
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.inference.layer_memory import FLOAT, layers_of
from bora_pyro.inference.task_rows import MANY_TASKS
from bora_pyro.model import BoRA

UNUSED = 0.25  # memory that glibc's allocator holds between blocks on a CPU, as a fraction of the activations (measured)
EVALUATION_BUDGET = 8192  # tokens of a batch of `evaluate`


@dataclass(frozen=True)
class MemoryEstimate:
    """The largest amount of memory that a fit holds at one time, in bytes, by use.

    Attributes:
        process: Python, the libraries and the data, before the model is loaded.
        base: the frozen model.
        state: the memory that grows with the number of tasks: the guide, its optimiser and copies.
        activations: the tensors that the layers keep for the backward pass, the batch's adapters, and a layer's scratch space.
        logits: the logits held at one time, with their log-softmax and gradient.
    """

    process: int
    base: int
    state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
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
    average: bool = True,
    processes: int = 1,
    process: int = 0,
) -> MemoryEstimate:
    """Estimate the peak memory of a MAP fit.

    Symbols: P is the size of one task's adapter, and G = (D + 1) P the size of the guide (Θ and D deviations), in numbers. R is
    the number of documents and T the number of tokens of a batch, padding included. If a batch is processed in parts (see
    ``Backbone.pass_tokens``), R and T are those of a part. V is the size of the vocabulary, L the number of layers, h the hidden
    size; a, k and f are the widths of the queries, of the keys and of the feed-forward layer; b is the bytes per number of the
    base.

    - The base: its parameters and buffers as they are stored.
    - The state, during the whole fit: 4 (5 G + D P + P), for the guide, two moments of AdamW, the copy of the best state, the
      mean of the steps, θ that the guide keeps from its first run, and the common start. Without the mean it is 4 G less.
    - A step at its loss: T (L kept + 6 h b) for the layers, 4 R P for the documents' adapters (and 4 R times
      the numbers that an adapter forms of its latents), and 12 C V for the logits of the C
      tokens whose logits exist at one time (``head.chunk_tokens``; all T tokens if the model caps its logits). The 12 bytes are
      the logits in float32, their log-softmax, and the logits and their gradient in the base's precision. ``kept`` is the memory
      per token that autograd keeps in one layer: 2 h for the inputs of two norms (in float32 if the norm is not torch's);
      2 a + 2 k for attention; h if adapters read the normed input of attention, and h if they read that of the feed-forward
      layer; f for its activation (4 f for that of GPT-2, 2 f more with a gate, f more if an adapter reads a new copy of it); and
      r for each adapted layer. With gradient checkpointing a layer keeps only h.
    - A step in its backward pass: the memory that the layers keep, and the scratch space of one layer, (3 h + 2 f) b per token.
      With gradient checkpointing also the memory that this layer keeps while it runs again.
    - A step at the end of its backward pass: 4 (G + D P + R P), for the gradients of the guide, of θ and of the batch's adapters.
    - An evaluation of 8192 tokens: 4 D P for θ, the batch's adapters, 8 C V for logits and one layer's scratch space.

    If a step draws tasks, D in all these terms is the number n ≤ R of tasks of a batch. The rows of all tasks are added: 20 D P
    for values, moments, best values and means. Beyond ``task_memory`` they lie in files, and only ``task_memory`` is held.

    On an accelerator the estimate is the base and the state plus the largest of the last four items. On CPUs their terms add up,
    because glibc returns only blocks above its mmap threshold (at most 32 MiB: the logits of a usual batch) to the system. The
    process therefore keeps the blocks that one phase frees while another phase needs blocks of other sizes. A quarter of the
    activations is added for unused memory between the blocks, as measured by ``scripts/benchmarks/check_memory.py``; nothing is
    added with gradient checkpointing, because freed blocks are then returned. In the result, ``logits`` are the C V terms,
    ``state`` the terms of the guide, and ``activations`` the other terms of a batch.

    Args:
        model: the BoRA model, on its base.
        data: the tokenised tasks; the shapes of their batches are those of the fit.
        token_budget: tokens of a batch of the fit.
        task_subsampling: whether a step draws tasks, as for ``fit``.
        task_memory: GiB of memory for task rows, if a step draws tasks.
        accumulate: batches of a step.
        average: whether the fit keeps the mean of its steps.
        processes: number of processes that share the tasks; the estimate is for the first one, which gathers all rows.
        process: bytes held before the model is loaded; 0 for an accelerator.
    """
    size = sum(start.numel() for start in model.starts.values())
    all_tasks = model.num_tasks * size
    guide = _guide_numbers(model, model.num_tasks)
    backbone = model.backbone
    layers, checkpointing = layers_of(model), backbone.gradient_checkpointing
    vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
    # a model that caps its logits computes those of all tokens at once
    chunk = chunk_tokens(backbone.device, vocabulary) if backbone.ends_with_head else sys.maxsize
    others = (model.tensors.fixed, model.tensors.buffers, model.tensors.masks)
    fixed = sum(t.numel() * t.element_size() for store in others for t in store.values())
    copies = 5 if average else 4
    throughout = FLOAT * (copies * guide + all_tasks + size) + fixed
    drawn = (model.num_tasks > MANY_TASKS or processes > 1) if task_subsampling is None else task_subsampling
    # what the adapters form for a row; with gradient checkpointing only that of one decoder layer exists at a time
    formed = sum(model.adapter.kept_per_row(slot) * slot.layers for slot in backbone.slots)
    formed = -(-formed // layers.number) if checkpointing else formed
    of_one = _guide_numbers(model, 2) - _guide_numbers(model, 1)
    of_all = guide - model.num_tasks * of_one
    if drawn:
        held, budget = copies * FLOAT * model.num_tasks * of_one, round(task_memory * 2**30)
        if held > budget:  # files are mapped into the memory of the process, not of an accelerator
            held = budget if backbone.device.type == "cpu" else 0
        throughout = FLOAT * (copies * of_all + 2 * size) + held + fixed

    # (state, activations, logits) of each batch's phases
    phases = []
    drawn_rows = max((rows for rows, _ in _shapes(data.train, token_budget)), default=0) if drawn else 0
    # the guide's rows, their gradients and moments, θ and its gradient
    throughout += FLOAT * min(accumulate * drawn_rows, model.num_tasks) * (4 * of_one + 2 * size)
    for rows, tokens in (_part(*shape, backbone.pass_tokens) for shape in _shapes(data.train, token_budget)):
        kept = tokens * layers.kept(checkpointing=checkpointing) + FLOAT * rows * (size + formed)
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
    # if the base is sharded, count the part of this process
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    # besides the weights, 8-bit layers hold scales of rows and 4-bit layers scales of blocks
    for parameter in backbone.model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        tensors += [value for value in (getattr(state, "absmax", None), getattr(nested, "absmax", None)) if value is not None]
        if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):
            tensors.append(scales)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes(device: torch.device) -> int:
    """The peak memory of this process before a model is loaded; 0 for an accelerator, which then holds none of our tensors."""
    return 0 if device.type != "cpu" else peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory in bytes: of the accelerator if one is used, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _guide_numbers(model: BoRA, tasks: int) -> int:
    """The size of a MAP guide for ``tasks`` tasks: the number of entries of all sample sites."""
    theta = {name: start.expand(tasks, *start.shape) for name, start in model.starts.items()}
    return sum(value.numel() for value in model.prior.sites(theta, model.starts).values())


def _shapes(split: TokenSplit, token_budget: int) -> list[tuple[int, int]]:
    """Rows and tokens, padding included, of the batches of a split."""
    # sorted by length, not in the order of an epoch: this gives the fullest batches and the largest numbers of rows
    return [(rows, rows * longest) for rows, longest in split.batches(token_budget=token_budget).shapes]


def _part(rows: int, tokens: int, most: int) -> tuple[int, int]:
    """Rows and tokens of the largest part of a batch, as `Batch.parts` cuts it."""
    of_part = -(-rows // min(rows, -(-tokens // most)))
    return of_part, of_part * (tokens // rows)
