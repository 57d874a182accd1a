"""Shared by the benchmarks: bases of every size, the step of our fit, and the timing of steps.

>>> backbone = load_base("random:tiny")
>>> [(slot.name, slot.layers) for slot in backbone.slots]
[('v_proj', 2), ('q_proj', 2)]

This module needs the extra ``peft``.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyro
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from bora_pyro.adapters import LoRA
from bora_pyro.backbone.backbone import BUILTIN_BASES, Backbone
from bora_pyro.data.batch import Batch
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.guides import GUIDES
from bora_pyro.inference.loop import Loop
from bora_pyro.model import BoRA
from bora_pyro.priors import prior_from_tau

_OPT = {"model_type": "opt", "dropout": 0.0, "max_position_embeddings": 1024}


def _opt(vocabulary: int, width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return {**_OPT, **sizes, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


#: Bases with random weights; the time of a step does not depend on their values. All but the first two have the sizes of
#: published models. Every vocabulary is at least as large as that of builtin:nano.
RANDOM_BASES: dict[str, dict[str, Any]] = {
    "random:tiny": _opt(4096, 32, 2, 2, ffn_dim=64),
    "random:40m": _opt(16_384, 512, 10, 8),
    "random:opt-125m": _opt(50_272, 768, 12, 12, max_position_embeddings=2048),
    "random:opt-350m": _opt(
        50_272, 1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False, max_position_embeddings=2048
    ),
    "random:llama-1b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
    "random:llama-7b": {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 4096,
    },
}  # fmt: skip

LEARNING_RATE, GRADIENT_CLIP = 1e-3, 1.0
Step = Callable[[], object]


def check_base(name: str) -> None:
    """Raise ``InputError`` if a name begins with ``random:`` but is not in ``RANDOM_BASES``."""
    if name.startswith("random:") and name not in RANDOM_BASES:
        raise InputError(f"no random base {name!r}; it is one of {', '.join(RANDOM_BASES)}{nearest(name, RANDOM_BASES)}")


def load_base(
    name: str,
    *,
    targets: Sequence[str] | str | None = None,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Backbone:
    """Load a frozen base: one of ``RANDOM_BASES`` with weights drawn from the seed, a path, a hub id, or an embedded base.

    Raises:
        InputError: the base does not exist, or has no such targets.
    """
    check_base(name)
    dtype = getattr(torch, precision)
    if name not in RANDOM_BASES:
        return Backbone.from_pretrained(name, targets=targets, precision=dtype, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**RANDOM_BASES[name]), dtype=dtype)
    return Backbone(model.to(device), targets=targets)


def outline(name: str, *, targets: Sequence[str] | str | None = None) -> Backbone:
    """Make a base of ``RANDOM_BASES`` or an embedded base without weights, on the meta device.

        >>> outline("random:llama-1b").model.num_parameters()
        1235814400

    Raises:
        InputError: the base has no such targets.
    """
    config = (
        AutoConfig.for_model(**RANDOM_BASES[name]) if name in RANDOM_BASES else AutoConfig.from_pretrained(BUILTIN_BASES[name])
    )
    with torch.device("meta"):
        return Backbone(AutoModelForCausalLM.from_config(config), targets=targets)


def bora_loop(
    backbone: Backbone,
    split: TokenSplit,
    *,
    rank: int,
    tau: float,
    token_budget: int,
    guide: str = "map",
    seed: int = 0,
) -> Loop:
    """The loop of ``bora_pyro.inference.fit`` on one split, ready for its first step."""
    model = BoRA(backbone, split.num_tasks, adapter=LoRA(rank=rank), prior=prior_from_tau(tau), seed=seed)
    # only steps are timed, so there are no validation documents
    none = TokenSplit.from_documents([], task=[], num_tasks=split.num_tasks)
    data = TaskData([f"task {d}" for d in range(split.num_tasks)], train=split, validation=none, test=none)
    return Loop(
        model,
        data,
        GUIDES[guide](model),
        learning_rate=LEARNING_RATE,
        warmup=0.0,
        token_budget=token_budget,
        accumulate=1,
        gradient_clip=GRADIENT_CLIP,
        seed=seed,
        epochs=1000,  # in a long fit the deviations have the rate of all other parameters
    )


def loop_step(loop: Loop, batch: Batch) -> float:
    """Do the loop's work for one batch, without its work at the end of an epoch, and return the loss."""
    return float(loop.step([batch], LEARNING_RATE, 0)[0])


def adamw(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.AdamW:
    """The optimiser of all steps: fused AdamW without weight decay."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def optimise(optimizer: torch.optim.AdamW, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Clip the gradients, do an optimiser step, and clear the gradients."""
    torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def seconds(step: Step, device: torch.device) -> float:
    """Seconds of one call, until the device has finished its work."""
    start = now(device)
    step()
    return now(device) - start


def now(device: torch.device) -> float:
    """Wait for the device and read the clock, in seconds."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions of the libraries."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    modules = (torch, peft, transformers, pyro)
    return gpu | {
        "device": str(device),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {module.__name__: str(module.__version__) for module in modules},
    }


def place(where: dict[str, Any]) -> str:
    """Describe the machine in a few words."""
    return str(where["gpu"]) if "gpu" in where else f"{where['cpu']}, {where['threads']} of {where['cores']} cores"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range.

    >>> spread([3.0, 1.0, 2.0])
    {'min': 1.0, 'lower_quartile': 1.5, 'median': 2.0, 'upper_quartile': 2.5, 'max': 3.0}
    """
    points = {"min": 0, "lower_quartile": 25, "median": 50, "upper_quartile": 75, "max": 100}
    return {name: float(np.percentile(values, percent)) for name, percent in points.items()}


def at_least(config: Any, limits: dict[str, int]) -> None:
    """Raise ``InputError`` if an option that is a whole number is below its least value. None is allowed.

    Args:
        config: the configuration.
        limits: the least value of each option.
    """
    for name, least in limits.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; give a whole number from {least} up")


def json_options(options: dict[str, Any]) -> dict[str, Any]:
    """Prepare options for JSON, which has no infinity: it is written as ``inf``, as on the command line.

    >>> json_options({"tau": float("inf"), "rank": 8})
    {'tau': 'inf', 'rank': 8}
    """
    return {name: "inf" if value == float("inf") else value for name, value in options.items()}


def check_output(output: str | None) -> None:
    """Raise ``InputError`` if the path of the JSON file is a folder."""
    if output is not None and Path(output).is_dir():
        raise InputError(f"output {output!r} is a folder; give the name of a JSON file")


def writable(name: str) -> Path:
    """Check that a file can be written, before minutes of measuring, and return its path.

    Raises:
        InputError: the file cannot be written.
    """
    file = Path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("a", encoding="utf-8").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise InputError(f"output {name!r} cannot be written ({error.strerror}); give another path") from None
    return file
