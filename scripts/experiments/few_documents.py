"""How many documents does a new task need? Test perplexity against their number, tasks left out of the fit.

    python scripts/experiments/few_documents.py --output results/few_documents.csv

In each seed some tasks are left out, BoRA (learned τ) and one pooled adapter are fitted to the others, and the left-out tasks
come with 0, 5, 10, ... training documents each:

- ``bora``: Θ and τ of the fit stay, only the new deviations are inferred, as ``bora_pyro.inference.adapt`` does.
- ``scratch``: LoRA from its start, without a prior.
- ``pooled``: the pooled adapter as it is; documents do not change it.
- ``pooled_tuned``: the pooled adapter, trained further on the new documents without a prior.

The two fits choose their learning rates by the validation documents of their own tasks (rows ``others``), each arm its rate and
steps at each number of documents by the validation documents of the left-out tasks; both with the first seed, held for the other
seeds. The test documents are only reported. What the output has is not run again.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers

from bora_pyro.data.subset import subset, tasks_to_leave_out
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError, nearest
from bora_pyro.files.text import name_line
from bora_pyro.inference.adapt import fit_deviations, given_model
from bora_pyro.inference.evaluate import Scores, evaluate
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.priors import Given, LearnedPrecision, Pooled, with_shared
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.results_table import read_results, write_results

ARMS = ("bora", "scratch", "pooled", "pooled_tuned")
#: The arms whose fits to the other tasks are shared by all.
FITS: dict[str, type[LearnedPrecision | Pooled]] = {"bora": LearnedPrecision, "pooled": Pooled}
#: What the column ``documents`` has in the rows of those fits; their ``steps`` are epochs.
OTHERS = "others"
KEYS = ["seed", "arm", "documents", "split", "learning_rate", "steps", "task"]
#: Tokens of a batch of the new tasks' documents.
TOKEN_BUDGET = 2048
#: More than any task has.
ALL = 10**9


@dataclass(kw_only=True)
class FewDocumentsConfig:
    """Test perplexity of new tasks against their number of documents."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options of the fit to the other tasks")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    documents: list[str] = option(["0", "5", "10", "20", "50", "all"], "numbers of documents (default: 0 5 10 20 50 all)")
    arms: list[str] = option([*ARMS], f"which arms (default: {' '.join(ARMS)})")
    left_out: int = option(5, "how many tasks are left out")
    least_documents: int = option(50, "training documents that a task must have to be left out")
    others_documents: int = option(64, "training documents of each of the other tasks, at most")
    seeds: int = option(3, "how many seeds, from 0")
    fit_learning_rates: list[str] = option(
        ["0.01", "0.03"], "learning rates of the fits to the other tasks to choose from (default: 0.01 0.03)"
    )
    learning_rates: list[str] = option(
        ["0.001", "0.003", "0.01", "0.03", "0.1"], "learning rates to choose from (default: 0.001 0.003 0.01 0.03 0.1)"
    )
    steps: list[str] = option(["15", "60", "240"], "numbers of steps of each task to choose from (default: 15 60 240)")
    threads: int = option(2, "CPU threads")
    output: str = option("results/few_documents.csv", "the table, a row a task and run")

    def validate(self) -> None:
        """Check the values."""
        for name in ("left_out", "least_documents", "others_documents", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from 1 up")
        for name in self.arms:
            if name not in ARMS:
                raise InputError(f"arm {name!r} is not known; known: {', '.join(ARMS)}{nearest(name, ARMS)}")
        for name in self.documents:
            if name != "all" and not name.isdigit():
                raise InputError(f"documents {name!r} is no number; give whole numbers from 0 up, or all")
        for option_, kind in (("fit_learning_rates", float), ("learning_rates", float), ("steps", int)):
            for text in getattr(self, option_):
                try:
                    usable = 0 < kind(text) < math.inf
                except ValueError:
                    usable = False
                if not usable:
                    raise InputError(f"{option_} has {text!r}; give numbers above 0")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")


@dataclass
class Setting:
    """What one seed gives: the fits to the other tasks, and the data of those left out."""

    bora: Fitted
    pooled: Fitted
    new: TaskData


class Curve:
    """The rows of the table, and the runs that fill it."""

    table: Any

    def __init__(self, config: FewDocumentsConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.table = read_results(self.output, KEYS)

    def run_all(self) -> None:
        """Every seed, the first with the choices."""
        for seed in range(self.config.seeds):
            wanted = [(arm, number) for arm in self.config.arms for number in self.config.documents]
            if all(len(self.rows(seed, arm, number, "test")) for arm, number in wanted):
                continue
            setting = self.setting(seed)
            for arm, number in wanted:
                if len(self.rows(seed, arm, number, "test")):
                    continue
                if seed == 0 and self.tuned(arm, number):
                    self.search(setting, arm, number)
                rate, steps = self.choice(arm, number) if self.tuned(arm, number) else (0.0, 0)
                self.run(setting, seed, arm, number, rate, steps, "test")

    def tuned(self, arm: str, number: str) -> bool:
        """Whether an arm does anything with the documents."""
        return arm != "pooled" and number != "0"

    def rows(self, seed: int, arm: str, number: str, split: str) -> Any:
        """What the table has of them."""
        table = self.table
        found = (table["seed"] == seed) & (table["arm"] == arm) & (table["documents"].astype(str) == number)
        return table[found & (table["split"] == split)]

    def search(self, setting: Setting, arm: str, number: str) -> None:
        """Every learning rate and number of steps, on the validation documents of the first seed, whose setting it is."""
        for rate in map(float, self.config.learning_rates):
            for steps in map(int, self.config.steps):
                if not self.tried(0, arm, number, rate, steps):
                    self.run(setting, 0, arm, number, rate, steps, "validation")

    def tried(self, seed: int, arm: str, number: str, rate: float, steps: int) -> bool:
        """Whether the table has the validation rows of a run."""
        have = self.rows(seed, arm, number, "validation")
        return bool(((have["learning_rate"] == rate) & (have["steps"] == steps)).any())

    def choice(self, arm: str, number: str) -> tuple[float, int]:
        """Learning rate and steps, by the validation documents of the first seed."""
        have = self.rows(0, arm, number, "validation").groupby(["learning_rate", "steps"])[["log_likelihood", "tokens"]].sum()
        if have.empty:
            raise InputError(
                f"output {self.output} has no validation rows of {arm} with {number} documents and seed 0; give another file"
            )
        rate, steps = (have["log_likelihood"] / have["tokens"]).idxmax()
        return float(rate), int(steps)

    def setting(self, seed: int) -> Setting:
        """Fit to the tasks that are not left out."""
        config = self.config
        words = ["--config", config.fit_config, "--seed", str(seed), *(["--data", config.data] if config.data else [])]
        chosen = parse_config(MapFitConfig, words)
        whole = dataclasses.replace(chosen, max_train_documents=None, max_eval_documents=None, threads=config.threads)
        model, data = build_run(whole, quiet=True)
        left_out = tasks_to_leave_out(data, config.left_out, least_documents=config.least_documents, seed=seed)
        others = [task for task in data.tasks if task not in left_out]
        print(f"seed {seed}: left out {', '.join(map(name_line, left_out))}", file=sys.stderr)
        old = subset(data, others, max_train_documents=config.others_documents, seed=seed)
        new = subset(data, left_out, seed=seed)
        fits = {}
        for arm, prior in FITS.items():

            def fit_others(rate: float, prior: type[LearnedPrecision | Pooled] = prior) -> Fitted:
                shared = with_shared(prior(), model.adapter.shared)
                of_old = BoRA(model.backbone, len(others), adapter=model.adapter, prior=shared, seed=seed)
                return fit(
                    of_old, old, epochs=chosen.epochs, learning_rate=rate, token_budget=chosen.token_budget,
                    patience=chosen.patience, seed=seed,
                )  # fmt: skip

            fits[arm] = self.fit_to_others(seed, arm, old, chosen.epochs, fit_others)
        return Setting(fits["bora"], fits["pooled"], new)

    def fit_to_others(self, seed: int, arm: str, old: TaskData, epochs: int, fit_others: Callable[[float], Fitted]) -> Fitted:
        """The fit at its best learning rate by the validation documents of its own tasks; the first seed tries them all."""
        found: dict[float, Fitted] = {}

        def fit_at(rate: float) -> Fitted:
            start = time.perf_counter()
            fitted = found[rate] = fit_others(rate)
            seconds = time.perf_counter() - start
            if not self.tried(seed, arm, OTHERS, rate, epochs):
                (scores,) = evaluate(fitted.model, old.validation, fitted.weights()[0])
                self.record(scores, old, "validation", (seed, arm, OTHERS, rate, epochs), seconds)
            return fitted

        if seed == 0:
            for rate in map(float, self.config.fit_learning_rates):
                if not self.tried(seed, arm, OTHERS, rate, epochs):
                    fit_at(rate)
        best, _ = self.choice(arm, OTHERS)
        return found[best] if best in found else fit_at(best)

    def run(self, setting: Setting, seed: int, arm: str, number: str, rate: float, steps: int, split: str) -> None:
        """One run, and its rows."""
        documents = ALL if number == "all" else int(number)
        some = subset(setting.new, setting.new.tasks, max_train_documents=documents, seed=seed)
        # validation documents choose rate and steps, not an epoch: a new task would have none to spare
        data = dataclasses.replace(some, validation=subset(some, some.tasks, max_train_documents=0).train)
        start = time.perf_counter()
        fitted = self.fitted(setting, arm, data, rate, steps, seed)
        seconds = time.perf_counter() - start
        part = some.test if split == "test" else some.validation
        (scores,) = evaluate(fitted.model, part, fitted.weights()[0])
        self.record(scores, some, split, (seed, arm, number, rate, steps), seconds)

    def record(self, scores: Scores, data: TaskData, split: str, run: tuple[int, str, str, float, int], seconds: float) -> None:
        """A row a task, in the file before anything else is run. ``run`` is (seed, arm, documents, learning rate, steps)."""
        seed, arm, number, rate, steps = run
        rows = []
        for d, task in enumerate(data.tasks):
            of_task = scores.task == d
            values = [seed, arm, number, split, rate, steps, task]
            of_run = {"train_documents": data.train.documents_per_task[d], "seconds": round(seconds, 2)}
            score = {"tokens": int(scores.tokens[of_task].sum()), "perplexity": scores.perplexity(d)}
            score["log_likelihood"] = float(scores.log_likelihood[of_task].sum())
            rows.append(dict(zip(KEYS, values, strict=True)) | of_run | score)
        self.table = pd.concat([self.table, pd.DataFrame(rows)], ignore_index=True) if len(self.table) else pd.DataFrame(rows)
        write_results(self.table, self.output)
        how = f"{number} documents, rate {rate:g}, {steps} steps"
        print(f"seed {seed}: {arm}, {how}: {split} {scores.perplexity():.2f} in {seconds:.1f} s", file=sys.stderr)

    def fitted(self, setting: Setting, arm: str, data: TaskData, rate: float, steps: int, seed: int) -> Fitted:
        """The new tasks as an arm has them: all of them in the same steps."""
        model = setting.pooled.model
        if arm == "bora":
            new = given_model(setting.bora, len(data.tasks))
        else:
            mean = model.starts if arm == "scratch" else setting.pooled.weights()[1]
            flat = Given(mean, {name: torch.tensor(0.0) for name in mean})
            new = BoRA(model.backbone, len(data.tasks), adapter=model.adapter, prior=flat)
        batches = 0 if arm == "pooled" else len(data.train.batches(token_budget=TOKEN_BUDGET, seed=seed))
        if not batches:
            return fit_deviations(new, dataclasses.replace(data, train=data.validation))  # none: the prior's centre
        return fit(
            new, data, epochs=-(-steps // batches), learning_rate=rate, token_budget=TOKEN_BUDGET, patience=0,
            task_subsampling=False, seed=seed,
        )  # fmt: skip


def summary(table: Any) -> Any:
    """Test perplexity by arm and number of documents: mean and standard deviation over seeds, and the time of an adaptation."""
    test = table[table["split"] == "test"].assign(documents=table["documents"].astype(str))
    sums = test.groupby(["arm", "documents", "seed"])[["log_likelihood", "tokens"]].sum()
    perplexity = np.exp(-sums["log_likelihood"] / sums["tokens"]).rename("perplexity")
    seconds = test.groupby(["arm", "documents", "seed"])["seconds"].first()
    found = pd.concat([perplexity, seconds], axis=1).groupby(["arm", "documents"])
    return found.agg(
        mean=("perplexity", "mean"), sd=("perplexity", "std"), seeds=("perplexity", "size"), seconds=("seconds", "median")
    )


def main(argv: list[str]) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(FewDocumentsConfig, argv, prog="few_documents.py")
        torch.set_num_threads(config.threads)
        curve = Curve(config)
        curve.run_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(curve.table).round(2).to_string())
    print(f"table: {config.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
