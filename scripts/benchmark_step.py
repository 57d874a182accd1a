"""Time one training step of BoRA on a batch of many tasks against one step of PEFT's LoRA on the same batch.

    python scripts/benchmark_step.py --base_model random:40m --targets q_proj v_proj fc1 fc2 --output results/step.json

Ours is a step of ``bora_pyro.fit`` as it is: forward, -ELBO, backward, clipping, fused AdamW over all tasks' adapters and their
mean. PEFT's is the loop of its documentation: ``get_peft_model``, the Hugging Face model's own loss, backward, clipping,
fused AdamW over one adapter. Both run in this process on the same base weights, layers, rank, batch and precision, in turn
(ours, PEFT, ours, PEFT, ...), so that whatever else the machine does meets both. The figure that travels is the ratio.

``--guide normal --against map`` times the step of another guide against our own MAP step instead.

PEFT is spared what it need not pay for: no dropout, no key-value cache, and no float32 copies of the layers' inputs (its adapter
has the base's precision; ours stays float32). No document is padded.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyro
import torch
import transformers
from transformers import OPTConfig, OPTForCausalLM

from bora_pyro.adapters import LoRA
from bora_pyro.backbone import Backbone
from bora_pyro.command_line import check_choices, option, parse_config
from bora_pyro.data import TaskData
from bora_pyro.data.batches import Batch, TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.fit import Loop
from bora_pyro.guides import GUIDES
from bora_pyro.map_run import find_device
from bora_pyro.model import BoRA
from bora_pyro.priors import prior_from_tau

_OPT = {"dropout": 0.0, "max_position_embeddings": 1024}

#: Bases with random weights: the time of a step does not depend on what the weights are.
RANDOM_BASES: dict[str, dict[str, Any]] = {
    "random:tiny": {
        "vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, **_OPT,
    },
    "random:40m": {
        "vocab_size": 16_384, "hidden_size": 512, "word_embed_proj_dim": 512, "ffn_dim": 2048, "num_hidden_layers": 10,
        "num_attention_heads": 8, **_OPT,
    },
}  # fmt: skip

LEARNING_RATE, GRADIENT_CLIP = 1e-3, 1.0
PROFILED_STEPS = 3
Step = Callable[[], object]


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Time one training step of BoRA against one of PEFT's LoRA, in the same run."""

    base_model: str = option(
        "builtin:nano", f"the frozen language model: {', '.join(RANDOM_BASES)}, a path, a hub id, or builtin:nano"
    )
    num_tasks: int = option(25, "tasks of the BoRA model")
    rows: int = option(25, "documents of the batch; row i belongs to task i modulo num_tasks")
    tokens: int = option(128, "tokens of each document")
    rank: int = option(8, "rank r of the adapters; alpha is the rank")
    targets: list[str] | None = option(
        None, "layers that get an adapter, by the last part of their names (default: the architecture's usual ones)"
    )
    tau: float = option(100.0, "precision of the prior: a number, 0 or inf", expects="a number, 0 or inf")
    guide: str = option("map", f"the guide of our step: {', '.join(GUIDES)}", choices=tuple(GUIDES))
    against: str = option("peft", "the other step: PEFT's on one adapter, or our own MAP step", choices=("peft", "map"))
    precision: str = option("float32", "arithmetic of the frozen model", choices=("float32", "bfloat16"))
    repetitions: int = option(15, "measured steps of each")
    warmup: int = option(3, "steps of each before the first that is measured")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    seed: int = option(0, "of the tokens and of all starts")
    profile: bool = option(False, "print the operators that take most time in each step, too")
    output: str | None = option(None, "a JSON file for all numbers (default: none is written)")

    def validate(self) -> None:
        """Check every value that needs no model to be checked."""
        check_choices(self)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; give a whole number from {least} up")
        if self.base_model.startswith("random:") and self.base_model not in RANDOM_BASES:
            raise InputError(
                f"no random base {self.base_model!r}; there is {', '.join(RANDOM_BASES)}{nearest(self.base_model, RANDOM_BASES)}"
            )
        prior_from_tau(self.tau)
        if self.output is not None and Path(self.output).is_dir():
            raise InputError(f"output {self.output!r} is a folder; give the name of a JSON file")


# The optimisers' states come into being in the first step: at least one must go before the measured ones.
_LEAST = {"num_tasks": 2, "rows": 1, "tokens": 2, "rank": 1, "repetitions": 1, "warmup": 1, "threads": 1, "seed": 0}


def load_base(config: BenchmarkConfig) -> Backbone:
    """The frozen base that both steps use."""
    precision, device = getattr(torch, config.precision), find_device(config.device)
    if config.base_model not in RANDOM_BASES:
        backbone = Backbone.from_pretrained(config.base_model, targets=config.targets, precision=precision, device=device)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = OPTForCausalLM(OPTConfig(**RANDOM_BASES[config.base_model]))
        backbone = Backbone(model.to(device, precision), targets=config.targets)
    if backbone.context is not None and config.tokens > backbone.context:
        raise InputError(f"tokens is {config.tokens}; {config.base_model} reads at most {backbone.context}")
    return backbone


def random_documents(config: BenchmarkConfig, vocabulary: int) -> TokenSplit:
    """Documents of one length, as many as the batch has rows."""
    generator = torch.Generator().manual_seed(config.seed)
    documents = torch.randint(vocabulary, (config.rows, config.tokens), generator=generator).tolist()
    task = [row % config.num_tasks for row in range(config.rows)]
    return TokenSplit.from_documents(documents, task=task, num_tasks=config.num_tasks)


def bora_step(config: BenchmarkConfig, backbone: Backbone, split: TokenSplit, batch: Batch, guide: str) -> tuple[Step, int]:
    """The fit loop's step, and how many numbers it trains."""
    model = BoRA(backbone, config.num_tasks, adapter=LoRA(rank=config.rank), prior=prior_from_tau(config.tau), seed=config.seed)
    data = TaskData([f"task {d}" for d in range(config.num_tasks)], train=split, validation=split, test=split)
    loop = Loop(
        model,
        data,
        GUIDES[guide](model),
        learning_rate=LEARNING_RATE,
        warmup=0.0,
        token_budget=config.rows * config.tokens,
        accumulate=1,
        gradient_clip=GRADIENT_CLIP,
        seed=config.seed,
        epochs=1,
    )

    def step() -> float:
        # what the loop does with each batch, without what it does once an epoch; Pyro checks its first step only
        loss = loop.backward(batch, 1, validate=False)
        loop.step(LEARNING_RATE, loss, 0)
        return loss

    return step, sum(p.numel() for p in loop.parameters.values())


def peft_step(config: BenchmarkConfig, backbone: Backbone, batch: Batch) -> tuple[Step, int]:
    """PEFT's step with one adapter on the same layers, and how many numbers it trains."""
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.rank,
        lora_dropout=0.0,
        target_modules=[path for slot in backbone.slots for path in slot.paths],
        fan_in_fan_out=backbone.slots[0].fan_in_fan_out,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT reads an attribute that transformers has renamed: theirs to settle
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(config.seed)
        # the adapter in the base's precision: PEFT then multiplies in that precision, without casting each layer's input
        model = peft.get_peft_model(copy.deepcopy(backbone.model), lora, autocast_adapter_dtype=False).eval()
    assert model.config._attn_implementation == backbone.model.config._attn_implementation
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in parameters)


def seconds(step: Step, device: torch.device) -> float:
    """How long one call takes, until the device has done all of it."""
    _synchronise(device)
    start = time.perf_counter()
    step()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """Run both steps in turn; returns what the JSON file holds."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone = load_base(config)
    device = backbone.device
    split = random_documents(config, backbone.model.get_input_embeddings().num_embeddings)
    batch = split.batches(token_budget=config.rows * config.tokens)[0].to(device)
    ours, our_parameters = bora_step(config, backbone, split, batch, config.guide)
    other = config.against
    theirs, their_parameters = (
        peft_step(config, backbone, batch) if other == "peft" else bora_step(config, backbone, split, batch, "map")
    )
    base = torch.no_grad()(lambda: backbone.logits(batch.input_ids))

    times: dict[str, list[float]] = {"ours": [], other: [], "base_forward": []}
    for number in range(config.warmup + config.repetitions):
        pair = {"ours": seconds(ours, device), other: seconds(theirs, device)}
        if number >= config.warmup:
            for name, value in pair.items():
                times[name].append(value)
    for number in range(config.warmup + config.repetitions):
        value = seconds(base, device)
        if number >= config.warmup:
            times["base_forward"].append(value)
    if config.profile:
        for title, step in (("BoRA", ours), ("PEFT" if other == "peft" else "MAP", theirs)):
            print(f"{title}, {PROFILED_STEPS} steps", profiled(step, device), sep="\n")

    ratio = [our / their for our, their in zip(times["ours"], times[other], strict=True)]
    return {
        "machine": machine(device),
        # JSON has no infinity: the limit is written as the command line takes it
        "options": asdict(config) | {"tau": config.tau if config.tau < float("inf") else "inf"},
        "base": {
            "parameters": sum(p.numel() for p in backbone.model.parameters()),
            "attention": backbone.model.config._attn_implementation,
            "adapted_layers": {slot.name: slot.layers for slot in backbone.slots},
        },
        "batch": {"rows": config.rows, "tokens": config.tokens, "tasks": len(set(batch.task.tolist()))},
        "precision": {"base": config.precision, "ours_adapter": "float32"}
        | ({"peft_adapter": config.precision} if other == "peft" else {}),
        "trained_parameters": {"ours": our_parameters, other: their_parameters},
        "seconds": times,
        "ratio": ratio,
        "summary": {name: _spread(values) for name, values in times.items()} | {"ratio": _spread(ratio)},
    }


def profiled(step: Step, device: torch.device) -> str:
    """A table of the operators that take most time of their own: of the CPU's, or of the GPU's where there is one."""
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities, key = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        _synchronise(device)
    return str(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=40))


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
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


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _spread(values: Sequence[float]) -> dict[str, float]:
    points = {"min": 0, "lower_quartile": 25, "median": 50, "upper_quartile": 75, "max": 100}
    return {name: float(np.percentile(values, percent)) for name, percent in points.items()}


def table(report: dict[str, Any]) -> str:
    """The summary for a reader."""
    batch, where, summary = report["batch"], report["machine"], report["summary"]
    place = where["gpu"] if "gpu" in where else f"{where['cpu']}, {where['threads']} of {where['cores']} cores"
    lines = [
        f"one training step: {batch['rows']} rows of {batch['tasks']} tasks x {batch['tokens']} tokens, "
        f"{report['base']['parameters'] / 1e6:.1f} M parameters, {report['precision']['base']}, on {place}",
        f"{'':<28}{'median':>12}{'range':>28}",
    ]
    other = report["options"]["against"]
    names = {
        "ours": f"BoRA, {report['options']['num_tasks']} tasks, {report['options']['guide']}",
        other: "PEFT, 1 adapter" if other == "peft" else "BoRA, map",
        "base_forward": "base, forward only",
    }
    for key, name in names.items():
        row = summary[key]
        milliseconds = f"{1e3 * row['min']:.1f} – {1e3 * row['max']:.1f} ms"
        lines.append(f"{name:<28}{1e3 * row['median']:>9.1f} ms{milliseconds:>28}")
    row = summary["ratio"]
    quartiles = f"{row['lower_quartile']:.3f} – {row['upper_quartile']:.3f} (IQR)"
    lines.append(f"{'ratio, pair by pair':<28}{row['median']:>12.3f}{quartiles:>28}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print the table, write the file."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(BenchmarkConfig, argv, prog="benchmark_step.py")
        output = None if config.output is None else _writable(config.output)
        report = measure(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _writable(name: str) -> Path:
    """The file of that name; what cannot be written is known before the minutes of measuring."""
    file = Path(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.open("a", encoding="utf-8").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise InputError(f"output {name!r} cannot be written ({error.strerror}); give a JSON file that can") from None
    return file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
