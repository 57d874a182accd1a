"""Compare one fit of D tasks with D adapters that PEFT trains one after another, for several D and numbers of documents.

    python scripts/benchmarks/benchmark_sequential.py --base builtin:smollm2 --output results/sequential_smollm2.json

Ours is the epoch of ``bora_pyro.inference.fit``: a batch has documents of several tasks, and each row is read by the adapter of
its task. The other is what a user does otherwise: the loop of PEFT's documentation for each task in turn, whose batch is all
documents of the task, padded to the longest. Both see every document once in an epoch. They take turns in one process, on the
same base, layers, rank, precision and documents.

PEFT's time grows with D by equal parts. It is measured on ``--sample`` tasks in each turn and multiplied by D / sample. Above 1
ours is faster:

- ``ratio``: PEFT's seconds for all D tasks over ours, for an epoch alone.
- ``fit_ratio``: with ``--epochs`` epochs and the set-up: that of ours once, and that of PEFT's adapter and optimiser for each
  task, on a base that is loaded once.
- ``process_ratio``: the base is loaded for each task too, as by a script that is started for every task. The time of the load is
  measured once.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arm_work import Work, nano_tokenizer
from arms import Collator
from bases import (
    LEARNING_RATE,
    adamw,
    at_least,
    bora_loop,
    check_base,
    check_output,
    json_options,
    load_base,
    machine,
    now,
    optimise,
    place,
    seconds,
    spread,
)

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import load_tasks
from bora_pyro.data.tables import check_source
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_choices, option


@dataclass(kw_only=True)
class SequentialConfig:
    """Compare one fit of D tasks with D adapters that are trained one after another."""

    tasks: list[str] = option(["1", "5", "25", "100"], "numbers of tasks D; with 1 ours has a second task without documents")
    documents: list[str] = option(["1", "4", "16"], "documents of a task, which are one batch of PEFT's")
    base: str = option("builtin:nano", "the base: a path, a hub id, builtin:nano, builtin:smollm2, or a random one as random:40m")
    data: str = option(
        "builtin:documentation", "the texts; documents are dealt to the tasks by the seed, whatever their own task"
    )
    max_tokens: int = option(128, "tokens of a document")
    rank: int = option(8, "rank of the adapters")
    tau: float = option(1000.0, "the precision of the prior")
    rows: int = option(25, "a batch of ours has up to rows x max_tokens tokens, padding included")
    precision: str = option("float32", "arithmetic of the base", choices=("float32", "bfloat16"))
    sample: int = option(3, "tasks that PEFT trains in each turn")
    epochs: int = option(3, "epochs of the fit of fit_ratio and process_ratio")
    repetitions: int = option(5, "turns of each")
    threads: int | None = option(None, "CPU threads (default: torch's own choice)")
    seed: int = option(0, "seed of the documents and of the start")
    device: str = option("cpu", "cpu or cuda")
    output: str | None = option(None, "a JSON file for the results")

    def validate(self) -> None:
        """Check the values."""
        check_choices(self)
        for name in ("tasks", "documents"):
            for number in getattr(self, name):
                if not number.isdigit() or int(number) < 1:
                    raise InputError(f"{name} has {number!r}; give whole numbers from 1 up, as in --{name} 1 25")
        names = ("max_tokens", "rank", "rows", "sample", "epochs", "repetitions", "threads")
        at_least(self, dict.fromkeys(names, 1))
        check_base(self.base)
        check_output(self.output)


class Documents:
    """Texts of a corpus as documents that can be dealt to any number of tasks."""

    def __init__(self, config: SequentialConfig, backbone: Backbone) -> None:
        tokenizer = backbone.tokenizer or nano_tokenizer()
        train = load_tasks(config.data, tokenizer, max_tokens=config.max_tokens).train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
        self.texts = [train.document(n).tolist() for n in order]

    def deal(self, tasks: int, each: int) -> TokenSplit:
        """``each`` documents for each of the tasks; they repeat if there are not enough."""
        rows = [self.texts[n % len(self.texts)] for n in range(tasks * each)]
        return TokenSplit.from_documents(rows, task=[n // each for n in range(len(rows))], num_tasks=max(tasks, 2))


class Ours:
    """One fit of all tasks."""

    def __init__(self, config: SequentialConfig, backbone: Backbone, split: TokenSplit) -> None:
        budget = config.rows * config.max_tokens
        self.loop = bora_loop(backbone, split, rank=config.rank, tau=config.tau, token_budget=budget, seed=config.seed)
        self.device = backbone.device
        self.order = partial(EpochSteps, split, token_budget=budget)
        self.epochs = 0

    def epoch(self) -> None:
        """Read every document once."""
        steps = self.order(seed=self.epochs)
        for number in range(len(steps)):
            self.loop.step([batch.to(self.device) for batch in steps[number]], LEARNING_RATE, self.epochs)
        self.epochs += 1


class OneAfterAnother:
    """PEFT's loop for one task."""

    def __init__(self, config: SequentialConfig, backbone: Backbone, split: TokenSplit, task: int) -> None:
        own = split.subset((split.task == task).nonzero()[:, 0])
        tokenizer = backbone.tokenizer or nano_tokenizer()
        work = Work(backbone, own, tokenizer, len(own), config.max_tokens, config.rank, config.tau, config.seed)
        self.model, self.device = work.peft_model(), backbone.device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.collate, self.rows = adamw(self.parameters), Collator(work), work.features()

    def epoch(self) -> None:
        """Read every document of the task once, in one batch."""
        batch = self.collate(self.rows).to(self.device)
        self.model(**batch).loss.backward()
        optimise(self.optimizer, self.parameters)


def compare(config: SequentialConfig, backbone: Backbone, documents: Documents, tasks: int, each: int) -> dict[str, Any]:
    """Time both for one number of tasks and of documents, in turn.

    Returns:
        ``ours`` and ``peft``: seconds of an epoch of all tasks, by turn; ``ours_setup`` and ``peft_setup``: seconds of the
        set-up, that of PEFT for one task; and ``predicted``: predicted tokens of an epoch.
    """
    split, device = documents.deal(tasks, each), backbone.device
    start = now(device)
    ours = Ours(config, backbone, split)
    row: dict[str, Any] = {"tasks": tasks, "documents": each, "predicted": split.num_tokens, "ours_setup": now(device) - start}
    row |= {"ours": [], "peft": [], "peft_setup": []}
    sample, first = min(config.sample, tasks), 0
    ours.epoch()  # the first one allocates
    for _ in range(config.repetitions):
        row["ours"].append(seconds(ours.epoch, device))
        epochs: list[float] = []
        for task in (number % tasks for number in range(first, first + sample)):
            begun = now(device)
            other = OneAfterAnother(config, backbone, split, task)
            row["peft_setup"].append(now(device) - begun)
            other.epoch()
            epochs.append(seconds(other.epoch, device))
        first += sample
        row["peft"].append(sum(epochs) * tasks / sample)
    return row


def summary(row: dict[str, Any], *, epochs: int, load: float) -> dict[str, Any]:
    """Add the ratios to what `compare` measured.

    >>> row = {"tasks": 4, "documents": 1, "predicted": 80, "ours": [1.0, 2.0], "peft": [4.0, 4.0], "ours_setup": 1.0,
    ...        "peft_setup": [0.5]}
    >>> found = summary(row, epochs=2, load=3.0)
    >>> found["ratio"]["median"], found["fit_ratio"]["median"], found["process_ratio"]["median"]
    (3.0, 2.6666666666666665, 3.7333333333333334)

    Args:
        row: what was measured.
        epochs: epochs of a fit.
        load: seconds of loading the base.
    """
    tasks, each_setup = row["tasks"], statistics.median(row["peft_setup"])
    pairs = [*zip(row["peft"], row["ours"], strict=True)]
    fits = [(tasks * each_setup + epochs * peft, row["ours_setup"] + epochs * ours) for peft, ours in pairs]
    return row | {
        "ratio": spread([peft / ours for peft, ours in pairs]),
        "fit_ratio": spread([peft / ours for peft, ours in fits]),
        "process_ratio": spread([(peft + tasks * load) / (ours + load) for peft, ours in fits]),
        "ours_tokens_per_second": row["predicted"] / statistics.median(row["ours"]),
        "peft_tokens_per_second": row["predicted"] / statistics.median(row["peft"]),
    }


def line_of(row: dict[str, Any]) -> str:
    """One row as a line of the table."""
    ratios = [row[name] for name in ("ratio", "fit_ratio", "process_ratio")]
    cells = [f"{found['median']:6.2f} ({found['min']:.2f}-{found['max']:.2f})" for found in ratios]
    speeds = f"{row['ours_tokens_per_second']:>9,.0f} {row['peft_tokens_per_second']:>9,.0f}"
    return f"{row['tasks']:>6} {row['documents']:>10} {speeds}  " + "".join(f"{cell:<21}" for cell in cells)


def main(argv: list[str]) -> int:
    """Measure every setting, and print a line as each is done."""
    try:
        config = parse_config(SequentialConfig, argv, prog="benchmark_sequential.py")
        check_source(config.data)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        device = torch.device(config.device)
        start = now(device)
        backbone = load_base(config.base, precision=config.precision, device=device)
        of_load = now(device) - start
        documents = Documents(config, backbone)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where = machine(device)
    print(f"{config.base}, {config.precision}, r = {config.rank}; {place(where)}; loading the base takes {of_load:.1f} s")
    header = (
        f"{'tasks':>6} {'documents':>10} {'ours t/s':>9} {'peft t/s':>9}  {'an epoch':<21}{'a fit':<21}a fit, a process a task"
    )
    print(header)
    rows = []
    for each in map(int, config.documents):
        for tasks in map(int, config.tasks):
            rows.append(summary(compare(config, backbone, documents, tasks, each), epochs=config.epochs, load=of_load))
            print(line_of(rows[-1]), flush=True)
            if config.output is not None:
                result = {"machine": where, "config": json_options(asdict(config)), "load_seconds": of_load, "rows": rows}
                Path(config.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_script(main)
