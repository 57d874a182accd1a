"""Measure time and memory of a step for growing numbers of tasks, with a batch of the same size.

    python scripts/benchmarks/benchmark_tasks.py --output results/benchmark_tasks.json

Every number of tasks is measured in a separate process, so that its memory can be measured. Documents have random tokens. All
batches have the same size and the same number of tasks. Before the first step every row of every task is written, so that the
steps find rows as they are in the middle of a fit.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from bases import at_least, check_base, check_output, json_options, load_base, machine

from bora_pyro.adapters import LoRA
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.guides import GUIDES
from bora_pyro.inference.drawn_tasks import DrawnTasks
from bora_pyro.inference.loop import Loop
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.priors import prior_from_tau


@dataclass(kw_only=True)
class TasksConfig:
    """Measure time and memory of a step for growing numbers of tasks."""

    tasks: list[str] = option(["25", "1000", "10000"], "numbers of tasks")
    base: str = option("builtin:nano", "the base: a path, a hub id, builtin:nano, builtin:smollm2, or a random one as random:40m")
    guide: str = option("map", "the guide")
    tau: float = option(1000.0, "the precision of the prior")
    rank: int = option(8, "rank of the adapters")
    documents: int = option(4, "training documents a task")
    rows: int = option(25, "documents of a batch")
    max_tokens: int = option(128, "tokens of a document")
    steps: int = option(60, "timed steps in a run")
    warmup: int = option(10, "steps before the timed ones")
    repetitions: int = option(3, "runs of each number of tasks, in turn")
    task_memory: float = option(1.0, "GiB of memory for the tasks' rows; if they need more, they are kept in files")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    seed: int = option(0, "seed of documents and order")
    output: str | None = option(None, "a JSON file for the results")

    def validate(self) -> None:
        """Check the numbers."""
        for number in self.tasks:
            if not number.isdigit() or int(number) < 2:
                raise InputError(f"tasks has {number!r}; give whole numbers from 2 up, as in --tasks 25 1000")
        at_least(self, dict.fromkeys(("rank", "documents", "rows", "max_tokens", "steps", "repetitions", "threads"), 1))
        check_output(self.output)
        check_base(self.base)
        if self.guide not in GUIDES:
            raise InputError(f"guide is {self.guide!r}; allowed: {', '.join(GUIDES)}")


def measure(config: TasksConfig, tasks: int) -> dict[str, Any]:
    """Measure the seconds of a step and the largest resident memory after a step, in this process.

    Args:
        config: the options.
        tasks: number of tasks.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    backbone = load_base(config.base)
    generator = torch.Generator().manual_seed(config.seed)
    total = max(tasks * config.documents, config.rows * (config.warmup + config.steps))
    vocabulary = backbone.model.config.vocab_size
    tokens = torch.randint(3, vocabulary, (total * config.max_tokens,), generator=generator, dtype=torch.int32)
    lengths, task = torch.full((total,), config.max_tokens), torch.arange(total) % tasks
    train = TokenSplit(tokens, lengths, task=task, characters=lengths - 1, num_tasks=tasks)
    none = TokenSplit.from_documents([], task=[], num_tasks=tasks)
    model = BoRA(backbone, tasks, adapter=LoRA(rank=config.rank), prior=prior_from_tau(config.tau), seed=config.seed)
    process = psutil.Process()
    before = process.memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            model,
            TaskData([f"task {d}" for d in range(tasks)], train, none, none),
            GUIDES[config.guide](model),
            learning_rate=1e-2,
            warmup=0.1,
            token_budget=config.rows * config.max_tokens,
            accumulate=1,
            gradient_clip=1.0,
            seed=config.seed,
            epochs=1,
            task_subsampling=True,
            task_memory=config.task_memory,
            folder=Path(folder),
        )
        assert isinstance(loop.state, DrawnTasks)
        loop.state.rows.complete()
        for group in loop.state.rows.tensors().values():
            for store in group.values():
                store.all()
                store.release_memory()
        # in the order of the documents, so that a batch has the same number of tasks whatever their total number
        steps = EpochSteps(train, token_budget=config.rows * config.max_tokens, partition=[torch.arange(tasks)])
        seconds, drawn, resident = [], [], []
        for number in range(config.warmup + config.steps):
            start = time.perf_counter()
            batches = steps[number]
            loop.step(batches, 1e-2, number)
            if number >= config.warmup:
                seconds.append(time.perf_counter() - start)
                drawn.append(sum(len(batch.tasks.index) for batch in batches if batch.tasks))
                resident.append(process.memory_info().rss)
    row = sum(start.numel() * start.element_size() for start in model.starts.values())
    return {
        "tasks": tasks,
        "seconds_per_step": statistics.median(seconds),
        "resident_bytes_before": before,
        "resident_bytes": max(resident),
        "mapped": loop.state.rows.mapped,
        "state_bytes": 4 * row * tasks,
        "tasks_per_step": statistics.mean(drawn),
    }


def main(argv: list[str]) -> int:
    """Measure every number of tasks in turn, and print the table."""
    try:
        config = parse_config(TasksConfig, argv, prog="benchmark_tasks.py")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(config.tasks) == 1 and config.repetitions == 1 and config.output is None:
        print(json.dumps(measure(config, int(config.tasks[0]))))
        return 0
    runs: list[dict[str, Any]] = []
    for _ in range(config.repetitions):
        for tasks in config.tasks:
            alone = asdict(replace(config, tasks=[tasks], repetitions=1, output=None))
            words = [word for key, value in alone.items() for word in _words(key, value)]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    rows = [_summary([run for run in runs if run["tasks"] == int(tasks)], runs, int(config.tasks[0])) for tasks in config.tasks]
    print(
        f"{'tasks':>7} {'s/step':>8} {'(range)':>17} {'ratio':>6} {'tasks/step':>11} {'resident':>10} {'total state':>13}  where"
    )
    for row in rows:
        low, high = row["seconds_range"]
        print(
            f"{row['tasks']:>7} {row['seconds_per_step']:>8.3f} {f'({low:.3f}-{high:.3f})':>17} {row['ratio']:>6.2f} "
            f"{row['tasks_per_step']:>11.1f} {row['resident_bytes'] / 2**30:>6.2f} GiB {row['state_bytes'] / 2**30:>9.2f} GiB  "
            f"{'files' if row['mapped'] else 'memory'}"
        )
    if config.output is not None:
        result = {"machine": machine(torch.device("cpu")), "config": json_options(asdict(config)), "tasks": rows}
        Path(config.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _words(key: str, value: Any) -> list[str]:
    return [] if value is None else [f"--{key}", *(value if isinstance(value, list) else [str(value)])]


def _summary(runs: list[dict[str, Any]], all_runs: list[dict[str, Any]], first: int) -> dict[str, Any]:
    """Summarise the runs of one number of tasks. The ratio is to the runs of the first number of tasks, run by run."""
    reference = [run["seconds_per_step"] for run in all_runs if run["tasks"] == first]
    seconds = [run["seconds_per_step"] for run in runs]
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    return runs[0] | {
        "seconds_per_step": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "resident_bytes": max(run["resident_bytes"] for run in runs),
    }


if __name__ == "__main__":
    run_script(main)
