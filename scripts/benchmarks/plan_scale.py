"""What a fit of very many tasks on a large base would need: memory, files, traffic and hours, by formula.

    python scripts/benchmarks/plan_scale.py --tasks 100000 --base random:llama-7b --processes 8
    python scripts/benchmarks/plan_scale.py --check true --output results/scale.json

The base exists only as shapes, so a plan needs no memory. Symbols: D tasks, P latents of a task, N documents and T tokens, W
processes, R documents of a process in a step, n the numbers of the base's linear layers and head.

- Memory of a process: ``estimate_memory``, with a base in bfloat16.
- Rows of all tasks: 20 D P bytes (value, two moments, best value, mean). The first process gathers them for every checkpoint.
- Sent in a step: 4 P bytes, the gradient of Θ, and 6 numbers of 8 bytes.
- Rows read and written in a step: each 16 R P bytes (value, two moments, mean), if each document is of another task.
- Arithmetic of a token: 4 n + 6 P operations in training. The base needs 2 n forward and 2 n backward, since it gets no gradient.
- Hours: the longest of arithmetic, network and disk, as if each hid the others. Validation and checkpoints are not included.

With ``--check`` three fits of two processes on the embedded base are measured, and each figure that the formulas give is set
beside its measured value.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bases import RANDOM_BASES, check_output, load_base, machine, outline
from machine_limits import matrix_parameters

from bora_pyro.adapters import ADAPTERS
from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.guides import GUIDES
from bora_pyro.inference.drawn_tasks import DrawnTasks
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.memory import estimate_memory, peak_memory_bytes, resident_bytes
from bora_pyro.inference.processes import processes
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.options.members import build_member
from bora_pyro.priors import HierarchicalNormal

FLOAT = 4
#: Numbers that a fit keeps for each latent of a task, and those of them that a step reads and writes.
KEPT, MOVED = 5, 4
#: Sums of a step beside the gradient of Θ, in float64.
SUMS = 6
#: Adapters of a plan, each with its options.
PLANNED = ("lora rank=8", "lora rank=1", "lora_frozen_a rank=8", "nola rank=8 bases=64")
#: The fits of ``--check``: numbers of tasks.
CHECKED = (100, 1000, 4000)


@dataclass(kw_only=True)
class ScaleConfig:
    """What a fit of very many tasks on a large base would need."""

    base: str = option("random:llama-7b", "the base's shapes: builtin:nano, or one of the benchmarks' random bases")
    adapters: list[str] = option([*PLANNED], "adapters with their options, each as one text")
    targets: list[str] | None = option(None, "the adapted layers (default: the usual ones of the base)")
    tasks: int = option(100_000, "number of tasks, D", least=2)
    documents: int = option(10, "training documents of a task", least=1)
    max_tokens: int = option(512, "tokens of a document", least=2)
    epochs: int = option(3, "epochs", least=1)
    processes: int = option(8, "processes, each with one GPU, W", least=1)
    rows: int = option(16, "documents of a process in a step, R", least=1)
    flops: float = option(989e12, "operations a second of a GPU (default: bfloat16 of an H100, by its data sheet)")
    utilisation: float = option(0.3, "the share of them that a fit reaches (assumed)")
    network: float = option(50e9, "bytes a second between processes (assumed)")
    disk: float = option(5e9, "bytes a second of the disk of a process (assumed)")
    check: bool = option(False, "measure three fits of two processes and compare them with the formulas")
    worker: int | None = option(None, "be one process of a checked fit with so many tasks, and print what is measured")
    output: str | None = option(None, "a JSON file for the check")

    def validate(self) -> None:
        """Check the numbers and the base."""
        check_fields(self)
        bases = ["builtin:nano", *RANDOM_BASES]
        if self.base not in bases:
            raise InputError(f"base is {self.base!r}; allowed: {', '.join(bases)}{nearest(self.base, bases)}")
        for name in ("flops", "network", "disk"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; give a number above 0")
        if not 0 < self.utilisation <= 1:
            raise InputError(f"utilisation is {self.utilisation}; give a share above 0 and at most 1")
        check_output(self.output)


def adapted(backbone: Backbone, words: str, tasks: int) -> BoRA:
    """A BoRA model with the adapter that a text names, as ``lora rank=8``.

    Raises:
        InputError: there is no such adapter or option.
    """
    kind, *options = words.split()
    adapter = build_member("adapter", ADAPTERS, kind, options, usual={"rank": 8, "alpha": None})
    return BoRA(backbone, tasks, adapter=adapter, prior=HierarchicalNormal(1000.0))


def documents(rows: int, tokens: int, tasks: int, vocabulary: int) -> TokenSplit:
    """Documents of equal length, each of the next task."""
    ids = torch.randint(3, vocabulary, (rows * tokens,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    lengths = torch.full((rows,), tokens)
    return TokenSplit(ids, lengths, task=torch.arange(rows) % tasks, characters=lengths - 1, num_tasks=tasks)


def as_data(train: TokenSplit) -> TaskData:
    """The documents as data without validation and test documents."""
    none = TokenSplit.from_documents([], task=[], num_tasks=train.num_tasks)
    return TaskData([f"task {d}" for d in range(train.num_tasks)], train, none, none)


def needs(model: BoRA, config: ScaleConfig) -> dict[str, float]:
    """What a fit needs, by the formulas above.

    Returns:
        ``latents``, ``process_bytes``, ``rows_bytes``, ``sent_bytes`` and ``moved_bytes`` of a step, ``steps``, and the hours of
        arithmetic, network and disk.
    """
    backbone, size = model.backbone, sum(start.numel() for start in model.starts.values())
    one_step = documents(config.rows, config.max_tokens, config.tasks, backbone.num_token_ids)
    memory = estimate_memory(
        model, as_data(one_step), token_budget=config.rows * config.max_tokens, task_subsampling=True, processes=config.processes
    )
    numbers = matrix_parameters(backbone)
    all_documents = config.tasks * config.documents
    steps = config.epochs * -(-all_documents // (config.rows * config.processes))
    sent, moved = FLOAT * size + SUMS * 8, 2 * MOVED * FLOAT * config.rows * size
    work = config.epochs * all_documents * config.max_tokens * (4 * numbers + 6 * size)
    return {
        "latents": size,
        "process_bytes": memory.total,
        "rows_bytes": KEPT * FLOAT * config.tasks * size,
        "sent_bytes": sent,
        "moved_bytes": moved,
        "steps": steps,
        "arithmetic_hours": work / (config.processes * config.flops * config.utilisation) / 3600,
        # a ring sends and receives each number twice
        "network_hours": steps * 2 * sent / config.network / 3600,
        "disk_hours": steps * moved / config.disk / 3600,
        "checkpoint_hours": KEPT * FLOAT * config.tasks * size / min(config.network, config.disk) / 3600,
    }


def print_plan(config: ScaleConfig) -> None:
    """Print a row for each adapter."""
    given = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        backbone = outline(config.base, targets=config.targets)
    finally:
        torch.set_default_dtype(given)
    print(
        f"{config.tasks:,} tasks x {config.documents} documents x {config.max_tokens} tokens, {config.epochs} epochs, "
        f"{config.base} ({backbone.model.num_parameters() / 1e9:.1f} B), "
        f"{config.processes} processes x {config.rows} documents a step"
    )
    print(
        f"assumed for a process: {config.flops:.3g} operations/s x {config.utilisation:g}, "
        f"{config.network:.3g} bytes/s of network, {config.disk:.3g} bytes/s of disk"
    )
    print(
        f"{'adapter':<22}{'P':>11}{'GiB/GPU':>9}{'rows, GiB':>11}{'sent/step':>11}{'rows moved/step':>17}"
        f"{'hours: arithmetic':>19}{'network':>9}{'disk':>8}{'checkpoint':>12}"
    )
    for words in config.adapters:
        row = needs(adapted(backbone, words, config.tasks), config)
        print(
            f"{words:<22}{row['latents']:>11,}{row['process_bytes'] / 2**30:>9.1f}{row['rows_bytes'] / 2**30:>11,.1f}"
            f"{row['sent_bytes'] / 2**20:>7.2f} MiB{row['moved_bytes'] / 2**20:>13,.1f} MiB"
            f"{row['arithmetic_hours']:>19.1f}{row['network_hours']:>9.2f}{row['disk_hours']:>8.2f}{row['checkpoint_hours']:>12.2f}"
        )


def measure(tasks: int) -> None:
    """Take some steps of a fit in this process and its partners. The first one prints predictions and measurements as JSON."""
    torch.set_num_threads(1)
    config = ScaleConfig(base="builtin:nano", tasks=tasks, documents=1, max_tokens=128, rows=16, processes=2)
    with processes(torch.device("cpu")) as team, tempfile.TemporaryDirectory() as folder:
        before = resident_bytes(torch.device("cpu"))
        backbone = load_base(config.base)
        model = adapted(backbone, PLANNED[0], tasks)
        data = as_data(documents(tasks, config.max_tokens, tasks, backbone.num_token_ids))
        budget = config.rows * config.max_tokens
        predicted = needs(model, config)
        memory = estimate_memory(
            model, data, token_budget=budget, task_subsampling=True, processes=2, process=before, task_memory=0.25
        )
        seen: list[int] = []
        loop = Loop(
            model,
            data,
            GUIDES["map"](model),
            learning_rate=1e-3,
            token_budget=budget,
            epochs=1,
            task_subsampling=True,
            task_memory=0.25,
            folder=Path(folder),
            processes=team,
        )
        loop.run_epoch(lambda report: seen.append(report["reduced_bytes"]))
        assert isinstance(loop.state, DrawnTasks)
        rows = loop.state.rows
        stored = sum(tasks * store.row_bytes for group in rows.tensors().values() for store in group.values())
        loop.state.keep()
        loop.finish()
        row = {
            "tasks": tasks,
            "steps": len(seen),
            "sent_bytes": predicted["sent_bytes"],
            "sent_bytes_measured": max(seen),
            "rows_bytes": predicted["rows_bytes"],
            "rows_bytes_measured": stored,
            "in_files": rows.mapped,
            "memory_bytes": memory.total,
            "memory_bytes_measured": peak_memory_bytes(torch.device("cpu")),
        }
        if not team.rank:
            print(json.dumps(row))


def main(argv: list[str]) -> int:
    """Print the plan, or the check."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(ScaleConfig, argv, prog="plan_scale.py")
        if config.worker is not None:
            measure(config.worker)
            return 0
        if not config.check:
            print_plan(config)
            return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for tasks in CHECKED:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--worker", str(tasks)]
        done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(row := json.loads(done.stdout.splitlines()[-1]))
        print(f"{tasks:>6} tasks, {row['steps']} steps, rows in {'files' if row['in_files'] else 'memory'}")
        for name in ("sent_bytes", "rows_bytes", "memory_bytes"):
            formula, measured = row[name], row[f"{name}_measured"]
            print(f"       {name:<13} formula {formula:>15,} measured {measured:>15,} ratio {formula / measured:.3f}")
    if config.output is not None:
        result = {"machine": machine(torch.device("cpu")), "checks": rows}
        Path(config.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
