"""Compare the time of one training step of BoRA on a batch of many tasks with one step of PEFT's LoRA on the same batch.

    python scripts/benchmarks/benchmark_step.py --base_model random:40m --targets q_proj v_proj fc1 fc2 --output results/step.json

Ours is the unchanged step of ``bora_pyro.inference.fit``: forward, -ELBO, backward, clipping, fused AdamW over all adapters and
their mean. PEFT's is the loop of its documentation: ``get_peft_model``, the Hugging Face model's own loss, backward, clipping,
fused AdamW over one adapter. Both run in this process in turn (ours, PEFT, ours, PEFT, ...), on the same base weights, layers,
rank, batch and precision, so that other load on the machine affects both. Compare the ratio between machines, not the times.

``--guide normal --against map`` compares the step of another guide with our own MAP step instead.

PEFT has no avoidable cost: no dropout, no key-value cache, and no float32 copies of the layers' inputs (its adapter has the
base's precision; ours stays float32). No document is padded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from bases import (
    RANDOM_BASES,
    Step,
    adamw,
    at_least,
    bora_loop,
    check_base,
    check_output,
    json_options,
    load_base,
    loop_step,
    machine,
    now,
    optimise,
    place,
    seconds,
    spread,
    writable,
)

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data.batch import Batch
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.exchange.peft_model import peft_model
from bora_pyro.guides import GUIDES
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_choices, option
from bora_pyro.priors import prior_from_tau
from bora_pyro.runs.build import find_device

PROFILED_STEPS = 3


@dataclass(kw_only=True)
class BenchmarkConfig:
    """Time one training step of BoRA against one of PEFT's LoRA, in the same run."""

    base_model: str = option(
        "builtin:nano", f"the frozen language model: {', '.join(RANDOM_BASES)}, a path, a hub id, builtin:nano or builtin:smollm2"
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
    seed: int = option(0, "seed of the tokens and of all starts")
    profile: bool = option(False, "also print the operators that take most time in each step")
    output: str | None = option(None, "a JSON file for all numbers (default: none is written)")

    def validate(self) -> None:
        """Check the values that can be checked without a model."""
        check_choices(self)
        at_least(self, _LEAST)
        check_base(self.base_model)
        prior_from_tau(self.tau)
        check_output(self.output)


# The first step allocates the optimisers' states, so at least one step must be a warm-up step.
_LEAST = {"num_tasks": 2, "rows": 1, "tokens": 2, "rank": 1, "repetitions": 1, "warmup": 1, "threads": 1, "seed": 0}


def base_of(config: BenchmarkConfig) -> Backbone:
    """Load the frozen base that both steps use."""
    device = find_device(config.device)
    backbone = load_base(config.base_model, targets=config.targets, precision=config.precision, device=device, seed=config.seed)
    if backbone.context is not None and config.tokens > backbone.context:
        raise InputError(f"tokens is {config.tokens}; {config.base_model} reads at most {backbone.context}")
    return backbone


def random_documents(config: BenchmarkConfig, vocabulary: int) -> TokenSplit:
    """Random documents of equal length, one for each row of the batch."""
    generator = torch.Generator().manual_seed(config.seed)
    documents = torch.randint(vocabulary, (config.rows, config.tokens), generator=generator).tolist()
    task = [row % config.num_tasks for row in range(config.rows)]
    return TokenSplit.from_documents(documents, task=task, num_tasks=config.num_tasks)


def bora_step(config: BenchmarkConfig, backbone: Backbone, split: TokenSplit, batch: Batch, guide: str) -> tuple[Step, int]:
    """Make the step of the fit loop. Returns the step and its number of trained parameters."""
    budget = config.rows * config.tokens
    loop = bora_loop(backbone, split, rank=config.rank, tau=config.tau, guide=guide, token_budget=budget, seed=config.seed)
    return lambda: loop_step(loop, batch), sum(p.numel() for p in loop.state.shared)


def peft_step(config: BenchmarkConfig, backbone: Backbone, batch: Batch) -> tuple[Step, int]:
    """Make PEFT's step with one adapter on the same layers. Returns the step and its number of trained parameters."""
    model = peft_model(backbone, rank=config.rank, seed=config.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters)

    def step() -> None:
        model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
        optimise(optimizer, parameters)

    return step, sum(p.numel() for p in parameters)


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """Run both steps in turn and return the content of the JSON file."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone = base_of(config)
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
        "options": json_options(asdict(config)),
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
        "summary": {name: spread(values) for name, values in times.items()} | {"ratio": spread(ratio)},
    }


def profiled(step: Step, device: torch.device) -> str:
    """A table of the operators with the most own time, on the GPU if the device is one, otherwise on the CPU."""
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        activities, key = [*activities, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        now(device)
    return str(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=40))


def table(report: dict[str, Any]) -> str:
    """A printed table of the summary."""
    batch, where, summary = report["batch"], report["machine"], report["summary"]
    lines = [
        f"one training step: {batch['rows']} rows of {batch['tasks']} tasks x {batch['tokens']} tokens, "
        f"{report['base']['parameters'] / 1e6:.1f} M parameters, {report['precision']['base']}, on {place(where)}",
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
    """Measure, print the table, and write the JSON file."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(BenchmarkConfig, argv, prog="benchmark_step.py")
        output = None if config.output is None else writable(config.output)
        report = measure(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_script(main)
