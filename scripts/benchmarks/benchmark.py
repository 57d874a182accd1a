"""Compare BoRA's training step with three others, in predicted tokens a second, and with the least time that the machine allows.

    python scripts/benchmarks/benchmark.py --cases nano 40m --output results/benchmark.json

These arms take steps in turn, in one process, on the same base weights, layers, rank, precision and threads:

- ``ours``: the step of ``bora_pyro.inference.fit`` under ``HierarchicalNormal(tau)``, on batches of documents of similar length.
- ``peft_one_adapter``: the loop of PEFT's documentation, one adapter, random batches padded to the longest row.
- ``peft_trainer``: the same under Hugging Face's ``Trainer``, without logging, saving and evaluation.
- ``released``: the step of the BoRA paper's released code, reimplemented (see ``scripts/benchmarks/arms.py``).

Only tokens of the documents are counted, not padding. ``ratio`` is our tokens a second divided by the other arm's, pair by pair:
above 1 ours is faster. The floor is the time of the base's own matrix products: 4 operations a parameter and predicted token (two
forward, two backward to the inputs; the frozen weights need no gradient), at the speed of a large matrix product measured between
the steps. ``fraction_of_floor`` is the floor divided by our time; it is always below 1. Peak memory is measured in a separate
process for each arm and includes the libraries (on a GPU it is torch's allocations).

The bases have the sizes of published models and, except nano, random weights. A case that needs more than the free memory is left
out with a note. ``--arms ours --memory process`` measures the memory of one arm alone.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from arms import ARMS, Arm, Work, alternate, nano_tokenizer
from bases import (
    at_least,
    check_output,
    json_options,
    load_base,
    machine,
    outline,
    place,
    spread,
    writable,
)
from machine_limits import fraction_of_floor, free_bytes, matrix_parameters, matrix_product, needed_bytes, own_peak_bytes

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import TaskData, load_tasks, read_table
from bora_pyro.errors import InputError, nearest
from bora_pyro.options.command_line import parse_config, run_script, to_yaml
from bora_pyro.options.field import check_choices, option
from bora_pyro.priors.base import check_tau
from bora_pyro.runs.build import find_device


@dataclass(frozen=True)
class Case:
    """A base, and its default of ``--repetitions``."""

    base: str
    repetitions: int


CASES = {
    "nano": Case("builtin:nano", 30),
    "40m": Case("random:40m", 12),
    "opt-125m": Case("random:opt-125m", 8),
    "opt-350m": Case("random:opt-350m", 4),
    "llama-1b": Case("random:llama-1b", 4),
    "tiny": Case("random:tiny", 30),
}
DEFAULT_CASES = [name for name in CASES if name != "tiny"]


@dataclass(kw_only=True)
class ReportConfig:
    """Time BoRA's training step against PEFT's loop, the Trainer and the released code's step."""

    cases: list[str] = option(DEFAULT_CASES, f"which bases (default: {' '.join(DEFAULT_CASES)}; also tiny, for a trial)")
    arms: list[str] = option([*ARMS], f"which arms (default: {' '.join(ARMS)})")
    data: str = option("builtin:documentation", "the documents, as map_fit.py takes them")
    task_column: str = option("task", "column that names a document's task")
    text_column: str = option("text", "column that holds a document's text")
    num_tasks: int = option(25, "largest number of tasks")
    max_tokens: int = option(256, "tokens of a document that are read")
    rows: int = option(25, "documents of a batch; a batch of ours has up to rows x max_tokens tokens, padding included")
    rank: int = option(8, "rank r of the adapters; alpha is the rank")
    targets: list[str] | None = option(
        None, "layers that get an adapter, by the last part of their names (default: the architecture's usual ones)"
    )
    tau: float = option(100.0, "precision of the prior")
    precision: str = option("float32", "arithmetic of the frozen model", choices=("float32", "bfloat16"))
    repetitions: int | None = option(
        None, f"measured steps of each (default: {', '.join(f'{case.repetitions} for {name}' for name, case in CASES.items())})"
    )
    warmup: int = option(2, "steps of each before the first that is measured")
    memory: str = option(
        "arms",
        "peak memory: measured for each arm in a separate process (arms), for this process (process; one case and arm), or not",
        choices=("arms", "process", "off"),
    )
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    device: str = option("auto", "auto, cpu or cuda")
    seed: int = option(0, "seed of the split, the order of the documents and all starts")
    output: str | None = option(None, "a JSON file for all numbers (default: none is written)")

    def validate(self) -> None:
        """Check the values that can be checked without a model."""
        check_choices(self)
        at_least(self, _LEAST)
        for what, names, valid in (("case", self.cases, CASES), ("arm", self.arms, ARMS)):
            for name in names:
                if name not in valid:
                    raise InputError(f"no {what} {name!r}; it is one of {', '.join(valid)}{nearest(name, valid)}")
            if len(set(names)) < len(names):
                raise InputError(f"{what}s are {', '.join(names)}; give each once")
        check_tau(self.tau)
        if not 0 < self.tau < float("inf"):
            raise InputError(f"tau is {self.tau}; give a finite number above 0, because the limits have no penalty to time")
        if self.memory == "process" and len(self.arms) * len(self.cases) > 1:
            raise InputError("memory is 'process', which measures a single arm; give one of the cases and one of the arms")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device is {self.device!r}; allowed: auto, cpu, cuda (the Trainer takes the first GPU)")
        check_output(self.output)


# The first step allocates AdamW's state and starts the Trainer's loader, so at least one step must be a warm-up step.
_LEAST = {
    "num_tasks": 2, "max_tokens": 2, "rows": 1, "rank": 1, "repetitions": 1, "warmup": 1, "threads": 1, "seed": 0,
}  # fmt: skip


def report(config: ReportConfig) -> dict[str, Any]:
    """Measure all cases and return the content of the JSON file."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    # check targets and context lengths of all bases before minutes of measuring
    outlines = {name: outline(CASES[name].base, targets=config.targets) for name in config.cases}
    for name, base in outlines.items():
        if base.context is not None and config.max_tokens > base.context:
            raise InputError(f"max_tokens is {config.max_tokens}; {name} reads at most {base.context}")
    data = load_data(config)
    result: dict[str, Any] = {"machine": machine(device), "options": json_options(asdict(config)), "cases": [], "skipped": []}
    for name, base in outlines.items():
        need, free = (
            needed_bytes(base, rows=config.rows, max_tokens=config.max_tokens, precision=config.precision),
            free_bytes(device),
        )
        if need > free:
            reason = f"needs about {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            print(f"note: {name} is left out: {reason}", file=sys.stderr, flush=True)
            result["skipped"].append({"name": name, "reason": reason})
            continue
        result["cases"].append(measure(config, name, base, data, device))
        print(table(result["cases"][-1], place(result["machine"])), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def load_data(config: ReportConfig) -> TaskData:
    """Load the documents of at most ``num_tasks`` tasks with nano's tokenizer."""
    rows, _ = read_table(config.data, task_column=config.task_column, text_column=config.text_column)
    fewer = len(set(rows["task"][:])) <= config.num_tasks
    num_tasks = None if fewer else config.num_tasks
    data = load_tasks(
        rows, nano_tokenizer(), group_column="group", num_tasks=num_tasks, max_tokens=config.max_tokens, seed=config.seed,
        small_tasks="drop",
    )  # fmt: skip
    if not len(data.train):
        raise InputError(f"{config.data} has no training documents; give more documents")
    return data


def measure(config: ReportConfig, name: str, base: Backbone, data: TaskData, device: torch.device) -> dict[str, Any]:
    """Run the arms in turn on one base and return its entry in the report."""
    memory: dict[str, int | None] = {}
    if config.memory == "arms":  # first, while this process still uses little memory
        memory = {arm: memory_of(config, name, arm) for arm in config.arms}
    backbone = load_base(CASES[name].base, targets=config.targets, precision=config.precision, device=device, seed=config.seed)
    work = Work(
        backbone, data.train, nano_tokenizer(), rows=config.rows, max_tokens=config.max_tokens, rank=config.rank, tau=config.tau,
        seed=config.seed,
    )  # fmt: skip
    arms: dict[str, Arm] = {arm: ARMS[arm](work) for arm in config.arms}
    products: list[float] = []
    # the matrices of the speed measurement would count in the peak memory
    measures_speed = config.memory != "process"
    multiply = matrix_product(device, config.precision) if measures_speed else None
    rounds = config.warmup + (config.repetitions or CASES[name].repetitions)
    extra = None if multiply is None else lambda: products.append(multiply())
    records = {arm: record[config.warmup :] for arm, record in alternate(arms, rounds, device, extra=extra).items()}
    if config.memory == "process":
        memory = {config.arms[0]: own_peak_bytes(device)}

    rates = {arm: [tokens / time for time, tokens in record] for arm, record in records.items()}
    peers = [arm for arm in config.arms if arm != "ours"] if "ours" in rates else []
    ratios = {peer: [our / their for our, their in zip(rates["ours"], rates[peer], strict=True)] for peer in peers}
    entry: dict[str, Any] = {
        "name": name,
        "base": CASES[name].base,
        "parameters": backbone.model.num_parameters(),
        "matrix_parameters": matrix_parameters(base),
        "adapted_layers": {slot.name: slot.layers for slot in backbone.slots},
        "attention": backbone.model.config._attn_implementation,
        "data": {
            "source": config.data,
            "tasks": data.num_tasks,
            "train_documents": len(data.train),
            "predicted_tokens": data.train.num_tokens,
        },
        "precision": config.precision,
        "trained_parameters": {arm: sum(p.numel() for p in arms[arm].parameters) for arm in arms},
        "tokens_per_second": {arm: spread(values)["median"] for arm, values in rates.items()},
        "ratio": {peer: _middle(values) for peer, values in ratios.items()},
        "fraction_of_floor": None,
        "multiplications_per_second": None,
        "peak_memory_bytes": memory,
        "spread": {arm: spread(values) for arm, values in rates.items()},
        "seconds": {arm: [time for time, _ in record] for arm, record in records.items()},
        "tokens": {arm: [tokens for _, tokens in record] for arm, record in records.items()},
    }
    if measures_speed:
        speed = spread(products[config.warmup :])["median"]
        entry["multiplications_per_second"] = {"median": speed, "spread": spread(products[config.warmup :])}
        if "ours" in rates:
            entry["fraction_of_floor"] = fraction_of_floor(entry["tokens_per_second"]["ours"], entry["matrix_parameters"], speed)
    return entry


def memory_of(config: ReportConfig, name: str, arm: str) -> int | None:
    """Measure the peak memory of one arm in a separate process, in bytes; None if the process failed."""
    with tempfile.TemporaryDirectory() as folder:
        output, options = Path(folder) / "memory.json", Path(folder) / "options.yaml"
        alone = replace(config, cases=[name], arms=[arm], memory="process", repetitions=2, warmup=1, output=str(output))
        options.write_text(to_yaml(alone), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), "--config", str(options)]
        library = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, (library, os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths})
        found = json.loads(output.read_text(encoding="utf-8")) if done.returncode == 0 else {"cases": []}
    for entry in found["cases"]:
        return int(entry["peak_memory_bytes"][arm])
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"ended with code {done.returncode}"
    print(f"note: no peak memory of {arm} on {name}: {reason}", file=sys.stderr, flush=True)
    return None


def _middle(values: list[float]) -> dict[str, float]:
    whole = spread(values)
    return {name: whole[name] for name in ("median", "lower_quartile", "upper_quartile")}


def table(entry: dict[str, Any], where: str) -> str:
    """A printed table of one case."""
    data = entry["data"]
    lines = [
        f"{entry['name']}: {entry['parameters'] / 1e6:.1f} M parameters, {entry['precision']}, {data['source']} "
        f"({data['tasks']} tasks, {data['train_documents']} documents), on {where}",
        f"{'':<18}{'tokens/s':>12}{'middle half':>24}{'ours / arm':>12}{'middle half':>18}{'peak memory':>14}",
    ]
    for arm, rate in entry["tokens_per_second"].items():
        row, ratio, memory = entry["spread"][arm], entry["ratio"].get(arm), entry["peak_memory_bytes"].get(arm)
        middle = f"{row['lower_quartile']:,.0f} – {row['upper_quartile']:,.0f}"
        pair = "" if ratio is None else f"{ratio['median']:.2f}"
        quartiles = "" if ratio is None else f"{ratio['lower_quartile']:.2f} – {ratio['upper_quartile']:.2f}"
        peak = "" if memory is None else f"{memory / 1e9:.2f} GB"
        lines.append(f"{arm:<18}{rate:>12,.0f}{middle:>24}{pair:>12}{quartiles:>18}{peak:>14}".rstrip())
    if entry["fraction_of_floor"] is not None:
        speed = entry["multiplications_per_second"]["median"]
        lines.append(f"floor of the time / ours: {entry['fraction_of_floor']:.2f} (a large product: {speed / 1e9:,.0f} GFLOP/s)")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print a table for each case, and write the JSON file."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(ReportConfig, argv, prog="benchmark.py")
        output = None if config.output is None else writable(config.output)
        result = report(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_script(main)
