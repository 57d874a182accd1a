"""Limits that the machine sets to a training step: free memory, peak memory, and the time of the matrix products.

>>> fraction_of_floor(1000.0, 10_000_000, 80e9)
0.5
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from bases import seconds
from torch import nn
from transformers.pytorch_utils import Conv1D

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.inference.memory import peak_memory_bytes


def matrix_parameters(base: Backbone) -> int:
    """Number of weights that multiply hidden states: all linear layers and the head, but not the embeddings."""
    linear = (module.weight for module in base.model.modules() if isinstance(module, nn.Linear | Conv1D))
    return sum(weight.numel() for weight in linear if isinstance(weight, torch.Tensor))


def needed_bytes(base: Backbone, *, rows: int, max_tokens: int, precision: str) -> int:
    """Estimate the memory of a step from above: the weights once, the activations of a full batch, its logits four times.

    Args:
        base: the base model; it needs no weights.
        rows: documents of a batch.
        max_tokens: tokens of the longest document.
        precision: name of the base's data type.
    """
    size = getattr(torch, precision).itemsize
    widths = sum(m.out_features for m in base.model.model.modules() if isinstance(m, nn.Linear))
    tokens, model = rows * max_tokens, base.model
    # each linear layer's output and about as much again in between (norms, activations); float32 logits
    activations = tokens * (2 * widths * size + 4 * 4 * model.config.vocab_size)
    return int(model.num_parameters() * size + activations)


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def own_peak_bytes(device: torch.device) -> int:
    """Peak memory of this process. On Linux ``ru_maxrss`` would include the peak of the parent process."""
    status = Path("/proc/self/status")
    if device.type != "cuda" and status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes(device)


def fraction_of_floor(tokens_per_second: float, parameters: int, operations_per_second: float) -> float:
    """Divide the least possible time, 4 operations a parameter and token, by the measured time.

    >>> fraction_of_floor(1000.0, 10_000_000, 80e9)
    0.5
    """
    return 4 * parameters * tokens_per_second / operations_per_second


def matrix_product(device: torch.device, precision: str) -> Callable[[], float]:
    """Make a function that measures the machine's speed on a large matrix product, in floating-point operations a second.

    A CPU that computes slowly in this precision gets a smaller product, of 0.1 seconds or more.
    """
    size, times = (8192, 5) if device.type == "cuda" else (_large_enough(precision), 1)
    dtype = getattr(torch, precision)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    @torch.no_grad()
    def speed() -> float:
        return 2 * size**3 * times / seconds(multiply, device)

    return speed


def _large_enough(precision: str) -> int:
    """The size of a square product that takes a CPU 0.1 seconds or more; at most 2048."""
    device, size, largest = torch.device("cpu"), 256, 2048
    while size < largest:
        a = torch.randn(size, size).to(getattr(torch, precision))
        torch.mm(a, a)  # the first product of a size also prepares it
        if seconds(partial(torch.mm, a, a), device) >= 0.1:
            break
        size *= 2
    return size
