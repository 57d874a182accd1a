"""Compare SMoRA with LoRA on tasks that contradict each other: the same input, and an output that depends on the task.

    python scripts/experiments/conflicting_tasks.py --output results/conflicting_tasks.csv

A document is a start, the token of its task, a symbol x, and the symbol π_t(x). Every task has a permutation π_t of its own.
What is right for one task is wrong for the others, and the task is visible in the prefix alone. Only the last token is predicted.
The base is a Llama with random weights, which knows nothing: whatever is learned is in the adapters.

The arms have one adapter for all tasks (τ = ∞), and none is told the task, except ``smora_task_gates``:

- ``lora_active``: LoRA of rank k, which has as many ranks as SMoRA uses for a token;
- ``lora_total``: LoRA of rank r, which has as many as SMoRA has;
- ``mixture``: a mixture of ``--experts`` LoRAs, SMoRA with blocks of ranks, of which two blocks or more are active;
- ``smora``: k of r ranks for each token;
- ``smora_task_gates``: the same with a vector r_d of each task in its gates, under Normal(Θ, I/τ); A, B and R are common.

Each arm has its own best learning rate (``arm_table.py``). ``loss`` is the mean over the tasks of the nats of a test document.
``worst_loss`` is that of the worst task. ``active_parameters`` counts the numbers of A, B and the gates by which one token is
multiplied, in all layers. ``information`` is the mutual information of rank and task, in nats, at the symbol that predicts, on
average over the layers: at most the entropy of the tasks. There the input token is the same for all tasks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from arm_table import KEYS, BestRates, RateOptions, Run, run_table
from paired_ratios import mean_sd
from transformers import LlamaConfig, LlamaForCausalLM

from bora_pyro import Backbone, BoRA, HierarchicalNormal, InputError, LoRA, Pooled, fit
from bora_pyro.adapters import Adapter, SMoRA
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.diagnostics.rank_usage import rank_usage, usage_information
from bora_pyro.diagnostics.sweep_table import number_text
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option
from bora_pyro.priors import Prior, with_shared

ARMS = ("lora_active", "lora_total", "mixture", "smora", "smora_task_gates")
COLUMNS = [
    *KEYS, "validation_perplexity", "test_perplexity", "loss", "worst_loss", "information", "active_parameters", "parameters",
    "best_epoch", "seconds", "documents_digest", "options",
]  # fmt: skip
START = 0


@dataclass(kw_only=True)
class ConflictingConfig(RateOptions):
    """Compare SMoRA with LoRA on tasks that contradict each other."""

    tasks: int = option(8, "number of tasks", least=2)
    symbols: int = option(16, "symbols that a task permutes", least=2)
    documents: int = option(1024, "training documents; validation and test have a quarter each", least=8)
    width: int = option(32, "width of the base", least=8)
    layers: int = option(1, "blocks of the base", least=1)
    rank: int = option(16, "r, all ranks", least=4)
    active: int = option(4, "k, the active ranks of a token", least=2)
    experts: int = option(8, "N, the LoRAs of the mixture", least=2)
    balance: float = option(0.001, "by how much the bias of an expert moves in a step")
    tau: float = option(1.0, "precision of the prior of the task gates", positive=True)
    epochs: int = option(20, "epochs of a fit", least=1)
    token_budget: int = option(1024, "tokens of a step", least=8)
    rates: list[str] = option(["0.01", "0.03", "0.1", "0.3"], "the grid of learning rates (default: 0.01 0.03 0.1 0.3)")
    threads: int = option(1, "CPU threads", least=1)
    output: str = option("results/conflicting_tasks.csv", "the table, one row a fit; fits that it has are not repeated")

    def validate(self) -> None:
        """Check the values."""
        check_fields(self)
        self.check_rates()
        if self.width % 4:
            raise InputError(
                f"width is {self.width}; give a multiple of 4, the heads of the base, nearest: {self.width // 4 * 4}"
            )
        for arm in ARMS:
            self.adapter(arm)

    def adapter(self, arm: str) -> Adapter:
        """The adapter of an arm. All have the scale 1."""
        if arm.startswith("lora"):
            return LoRA(rank=self.active if arm == "lora_active" else self.rank)
        partition = 1
        if arm == "mixture":
            if self.rank % self.experts:
                raise InputError(f"experts is {self.experts}; give a divisor of the rank, {self.rank}")
            partition = self.rank // self.experts
        given: dict[str, Any] = {"active": self.active, "balance": self.balance, "task_gates": arm == "smora_task_gates"}
        return SMoRA(rank=self.rank, partition=partition, **given)

    def prior(self, arm: str) -> Prior:
        """One adapter for all tasks; the task gates differ between them."""
        adapter = self.adapter(arm)
        return with_shared(HierarchicalNormal(tau=self.tau), adapter.shared) if adapter.shared else Pooled()

    def base(self) -> Backbone:
        """A Llama with random weights, the same for all fits."""
        config = LlamaConfig(
            vocab_size=1 + self.tasks + self.symbols, hidden_size=self.width, intermediate_size=2 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8,
            initializer_range=0.2, bos_token_id=START, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Backbone(LlamaForCausalLM(config), targets="all-linear")


def make_tasks(config: ConflictingConfig, seed: int) -> TaskData:
    """The tasks of a seed: a permutation of the symbols for each, and documents."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.stack([torch.randperm(config.symbols, generator=generator) for _ in range(config.tasks)])
    splits = []
    for number in (config.documents, config.documents // 4, config.documents // 4):
        task = torch.arange(number) % config.tasks
        x = torch.randint(config.symbols, (number,), generator=generator)
        first = 1 + config.tasks
        rows = torch.stack([torch.full_like(task, START), 1 + task, first + x, first + maps[task, x]], 1)
        shared: dict[str, Any] = {"num_tasks": config.tasks, "read": [3] * number}
        splits.append(TokenSplit.from_documents(rows.tolist(), task=task.tolist(), **shared))
    train, validation, test = splits
    return TaskData([f"permutation {d}" for d in range(config.tasks)], train, validation, test)


def active_parameters(adapter: Adapter, backbone: Backbone) -> int:
    """The numbers of A, B and the gates that one token is multiplied by, in all layers."""
    total = 0
    for slot in backbone.slots:
        both = slot.in_features + slot.out_features
        if isinstance(adapter, SMoRA):
            own = adapter.k * both + adapter.experts * (slot.in_features + adapter.task_gates)
        else:
            assert isinstance(adapter, LoRA)
            own = adapter.rank * both
        total += own * slot.layers
    return total


def fit_arm(config: ConflictingConfig, data: TaskData, run: Run) -> dict[str, Any]:
    """Fit an arm; its row."""
    adapter = config.adapter(run.arm)
    model = BoRA(config.base(), config.tasks, adapter=adapter, prior=config.prior(run.arm), seed=run.seed)
    options: dict[str, Any] = {"epochs": config.epochs, "token_budget": config.token_budget, "patience": 0}
    fitted = fit(model, data, learning_rate=float(run.rate), seed=run.seed, gradient_norm=False, **options)
    (scores,) = evaluate(model, data.test, fitted.weights()[0])
    by_task = [math.log(scores.perplexity(d) or math.nan) for d in range(config.tasks)]
    row = {"arm": run.arm, "validation_perplexity": fitted.validation_perplexity, "test_perplexity": scores.perplexity()}
    row |= {"loss": sum(by_task) / len(by_task), "worst_loss": max(by_task)}
    if isinstance(adapter, SMoRA):
        information = usage_information(rank_usage(fitted, data.test, predicting=True))
        row["information"] = float(torch.cat([*information.values()]).mean())
    row["active_parameters"] = active_parameters(adapter, model.backbone)
    row["parameters"] = sum(
        start.numel() * (config.tasks if name.endswith("task_gate") else 1) for name, start in model.starts.items()
    )
    return row | {"best_epoch": fitted.best_epoch, "seconds": fitted.seconds, "documents_digest": data.digest}


class Comparison(BestRates):
    """The table of the arms. Fits take seconds, and so they are done in this process."""

    def __init__(self, config: ConflictingConfig) -> None:
        self.config, self.made = config, dict[int, TaskData]()
        own = {field.name for field in dataclasses.fields(RateOptions)} | {"threads", "output"}
        options = {name: value for name, value in dataclasses.asdict(config).items() if name not in own}
        super().__init__(config, ARMS, config.output, columns=COLUMNS, options=options)

    def run_all(self) -> None:
        while runs := [run for run in self.next_runs() if run not in self.failed]:
            for run in runs:
                if run.seed not in self.made:
                    self.made[run.seed] = make_tasks(self.config, run.seed)
                try:
                    row = fit_arm(self.config, self.made[run.seed], run)
                except InputError as error:
                    self.fail(run, str(error))
                else:
                    self.add(run, [row])

    def summary(self) -> str:
        """The arms at their best rates, in Markdown."""
        names = ["arm", "rate", "active parameters a token", "parameters", "loss", "worst task", "information", "fits"]
        lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for arm in self.arms:
            rows = self.chosen(arm)
            if not len(rows):
                continue
            first = rows.iloc[0]
            cells = [arm, number_text(float(first.learning_rate)), f"{first.active_parameters:,}", f"{first.parameters:,}"]
            cells += [mean_sd(rows.loss, 3), mean_sd(rows.worst_loss, 3)]
            cells += ["–" if rows.information.isna().all() else mean_sd(rows.information), str(len(rows))]
            lines.append(f"| {' | '.join(cells)} |")
        guess, entropy = math.log(self.config.symbols), math.log(self.config.tasks)
        note = f"a guess has the loss {guess:.3f}, and the information is at most {entropy:.2f}"
        return "\n".join([*lines, note, *self.at_ends(self.arms)])


def main(argv: list[str]) -> int:
    """Run the comparison, and print its table."""

    def make() -> Comparison:
        config = parse_config(ConflictingConfig, argv, prog="conflicting_tasks.py")
        torch.set_num_threads(config.threads)
        return Comparison(config)

    return run_table(make)


if __name__ == "__main__":
    run_script(main)
