"""Measure how many documents a new task needs: test perplexity of tasks outside the fit against their number of documents.

    python scripts/experiments/few_documents.py --output results/few_documents.csv

For each seed some tasks are left out, and BoRA (learned τ) and one pooled adapter are fitted to the others. Each task that was
left out then gets 0, 5, 10, ... training documents, in these arms:

- ``bora``: Θ and τ of the fit are fixed, and only the new deviations are inferred, as in ``bora_pyro.inference.adapt``.
- ``scratch``: LoRA from its usual start, without a prior.
- ``pooled``: the pooled adapter, which is not changed by the documents.
- ``pooled_tuned``: the pooled adapter, trained further on the new documents without a prior.

Other ways to share have arms too (``--arms``):

- ``posterior``: as ``bora``, with a Normal around each deviation; the mixture of 8 draws predicts.
- ``mtlora``: MTLoRA with learned τ. The shared pair is that of the fit, and a new task has a pair of the same rank.
- ``abmll_0.001``: ABMLL with this β (any number). A new task takes the K inner steps from the global point.
- ``reptile``: Reptile on the latents, also with K inner steps.
- ``icm_cvae``, ``icm_ridge``, ``icm_nearest``, ``icm_mean``: a generator learns from 8 draws of the other tasks' posterior (a
  ``normal`` guide around the fit of ``bora``) and makes the adapters from the vectors of the new documents, without training.

All arms but MTLoRA have an adapter of the same size for each task. MTLoRA has the shared pair beside it. ``ece`` is the expected
calibration error of all new tasks together.

The validation documents of the fitted tasks choose the learning rates of the two fits (rows ``others``). The validation documents
of the left-out tasks choose the rate and the steps of each arm at each number of documents. Both choices are made with the first
seed and used for the other seeds. The test documents are only reported. Rows that the output already has are not computed again.

All fits have the options of ``--fit_config``. The two fits override ``tau``, ``seed``, ``learning_rate``, ``threads`` and the
numbers of documents (``max_train_documents``, ``max_eval_documents``). The fits to new tasks also override ``epochs`` (as many as
the steps need), ``token_budget`` (2048), ``patience`` (0), ``task_subsampling`` (false) and ``task_dropout`` (0). The meta-fits
have ``epochs``, ``token_budget`` and ``gradient_clip`` of it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from few_documents_arms import ARMS, ICM, USUAL, Adapted, Others, check_arm, fit_of, other_way, trains
from fit_options import OF_PRIOR, check_usual

from bora_pyro.data.subset import subset, tasks_to_leave_out
from bora_pyro.data.tasks import TaskData
from bora_pyro.diagnostics.calibration import calibration
from bora_pyro.errors import InputError
from bora_pyro.files.text import name_line
from bora_pyro.inference.adapt import OPTIONS, fit_deviations, given_model
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.task_groups import of_group
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import check_fields, option, part_of
from bora_pyro.predict.answers import ChoicePredictions, predictions
from bora_pyro.predict.mixture import TokenPredictions
from bora_pyro.priors import Given
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import check_options, fit_options, with_options

#: Options of a fit that the arms do not have.
NOT_HERE = (*OF_PRIOR, "router", "start_from", "tau_documents")
#: Value of the column ``documents`` in the rows of those fits. Their ``steps`` are epochs.
OTHERS = "others"
KEYS = ["seed", "arm", "documents", "split", "learning_rate", "steps", "task"]
#: Tokens of a batch of the new tasks' documents.
TOKEN_BUDGET = 2048
#: Options of a fit that the script sets itself.
OF_ARM = {"learning_rate", "max_train_documents", "max_eval_documents"}
#: A number of documents that is larger than that of any task.
ALL = 10**9


@dataclass(kw_only=True)
class FewDocumentsConfig:
    """Measure the test perplexity of new tasks against their number of documents."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options of the fit to the other tasks")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    documents: list[str] = option(["0", "5", "10", "20", "50", "all"], "numbers of documents (default: 0 5 10 20 50 all)")
    arms: list[str] = option([*USUAL], f"which of {' '.join(ARMS)} (default: {' '.join(USUAL)})")
    left_out: int = option(5, "number of tasks that are left out")
    least_documents: int = option(50, "least number of training documents of a task that is left out")
    others_documents: int = option(64, "largest number of training documents of each of the other tasks")
    seeds: int = option(3, "number of seeds, from 0")
    fit_learning_rates: list[str] = option(
        ["0.01", "0.03"], "grid of learning rates of the fits to the other tasks (default: 0.01 0.03)", positive=True
    )
    learning_rates: list[str] = option(
        ["0.001", "0.003", "0.01", "0.03", "0.1"], "grid of learning rates (default: 0.001 0.003 0.01 0.03 0.1)", positive=True
    )
    steps: list[str] = option(["15", "60", "240"], "grid of numbers of steps of each task (default: 15 60 240)", least=1)
    inner_rate: float = option(0.3, "learning rate of the inner steps of ABMLL and Reptile", positive=True)
    threads: int = option(2, "CPU threads")
    output: str = option("results/few_documents.csv", "the table, one row for each task and run")

    def validate(self) -> None:
        """Check the values."""
        for name in ("left_out", "least_documents", "others_documents", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from 1 up")
        check_fields(self)
        for name in self.arms:
            check_arm(name)
        for name in self.documents:
            if name != "all" and not name.isdigit():
                raise InputError(f"documents {name!r} is not a number; give whole numbers from 0 up, or all")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")


@dataclass
class Setting:
    """The fits of one seed to the other tasks, the data of the tasks that were left out, and the options of all fits."""

    others: Others
    new: TaskData
    options: FitOptions


class Curve:
    """The table, and the runs that fill it."""

    table: Any

    def __init__(self, config: FewDocumentsConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.table = read_results(self.output, KEYS)
        names = ("left_out", "least_documents", "others_documents", "fit_learning_rates")
        #: What all rows share.
        self.options = fit_options(self.chosen(0), without=OF_ARM) | {name: getattr(config, name) for name in names}
        if not all(fit_of(arm) in ("bora", "pooled") for arm in config.arms):
            self.options |= {"inner_rate": config.inner_rate}
        check_options(self.table, self.options, output=self.output)

    def run_all(self) -> None:
        """Run every seed; the first seed makes the choices."""
        for seed in range(self.config.seeds):
            wanted = [
                (arm, number)
                for arm in self.config.arms
                for number in self.config.documents
                if number != "0" or not arm.startswith(ICM)  # without documents a task has no vector
            ]
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
        """Whether an arm trains on the documents."""
        return trains(arm) and number != "0"

    def rows(self, seed: int, arm: str, number: str, split: str) -> Any:
        """The rows of the table with these keys."""
        table = self.table
        found = (table["seed"] == seed) & (table["arm"] == arm) & (table["documents"].astype(str) == number)
        return table[found & (table["split"] == split)]

    def search(self, setting: Setting, arm: str, number: str) -> None:
        """Run every learning rate and number of steps, scored on the validation documents.

        Args:
            setting: the setting of the first seed.
            arm: name of the arm.
            number: number of documents, as a text.
        """
        for rate in map(float, self.config.learning_rates):
            for steps in map(int, self.config.steps):
                if not self.tried(0, arm, number, rate, steps):
                    self.run(setting, 0, arm, number, rate, steps, "validation")

    def tried(self, seed: int, arm: str, number: str, rate: float, steps: int) -> bool:
        """Whether the table has the validation rows of a run."""
        have = self.rows(seed, arm, number, "validation")
        return bool(((have["learning_rate"] == rate) & (have["steps"] == steps)).any())

    def choice(self, arm: str, number: str) -> tuple[float, int]:
        """The learning rate and number of steps that the validation documents of the first seed choose."""
        have = self.rows(0, arm, number, "validation").groupby(["learning_rate", "steps"])[["log_likelihood", "tokens"]].sum()
        if have.empty:
            raise InputError(
                f"output {self.output} has no validation rows of {arm} with {number} documents and seed 0; give another file"
            )
        rate, steps = (have["log_likelihood"] / have["tokens"]).idxmax()
        return float(rate), int(steps)

    def chosen(self, seed: int) -> MapFitConfig:
        """The options of the fits of a seed."""
        config = self.config
        words = ["--config", config.fit_config, "--seed", str(seed), *(["--data", config.data] if config.data else [])]
        return parse_config(MapFitConfig, words)

    def setting(self, seed: int) -> Setting:
        """Fit the tasks that are not left out."""
        config = self.config
        chosen = self.chosen(seed)
        check_usual(chosen, NOT_HERE, file=config.fit_config, why="the arms do not have it")
        whole = dataclasses.replace(chosen, max_train_documents=None, max_eval_documents=None, threads=config.threads)
        model, data = build_run(whole, quiet=True)
        left_out = tasks_to_leave_out(data, config.left_out, least_documents=config.least_documents, seed=seed)
        others = [task for task in data.tasks if task not in left_out]
        print(f"seed {seed}: left out {', '.join(map(name_line, left_out))}", file=sys.stderr)
        old = subset(data, others, max_train_documents=config.others_documents, seed=seed)
        new = subset(data, left_out, seed=seed)
        options, (of_old, _) = part_of(chosen, FitOptions), of_group(model, data, torch.tensor([*map(data.tasks.index, others)]))
        rest: dict[str, Any] = {"tau_per": chosen.tau_per, "tau_start": chosen.tau_start, "inner_rate": config.inner_rate}
        of_others = Others(of_old, old, options, seed=seed, **rest)
        needed = {fit_of(arm) for arm in config.arms}
        for name in ["bora", *sorted(needed - {"bora"})]:  # the posterior of icm is around the fit of bora
            of_others.fits[name] = self.fit_to_others(seed, name, of_others, chosen.epochs)
        return Setting(of_others, new, options)

    def fit_to_others(self, seed: int, name: str, others: Others, epochs: int) -> Fitted:
        """Fit at the learning rate that the validation documents of its own tasks choose. The first seed tries all rates.

        Args:
            seed: the seed.
            name: name of the fit.
            others: the other tasks.
            epochs: largest number of epochs.
        """
        found: dict[float, Fitted] = {}

        def fit_at(rate: float) -> Fitted:
            start = time.perf_counter()
            fitted = found[rate] = others.fit(name, rate)
            seconds = time.perf_counter() - start
            if not self.tried(seed, name, OTHERS, rate, epochs):
                scores = predictions(fitted.model, others.data.validation, Adapted.of(fitted).draws)
                self.record(scores, others.data, "validation", (seed, name, OTHERS, rate, epochs), seconds)
            return fitted

        if seed == 0:
            for rate in map(float, self.config.fit_learning_rates):
                if not self.tried(seed, name, OTHERS, rate, epochs):
                    fit_at(rate)
        best, _ = self.choice(name, OTHERS)
        return found[best] if best in found else fit_at(best)

    def run(self, setting: Setting, seed: int, arm: str, number: str, rate: float, steps: int, split: str) -> None:
        """Do one run and record its rows."""
        documents = ALL if number == "all" else int(number)
        some = subset(setting.new, setting.new.tasks, max_train_documents=documents, seed=seed)
        # validation documents choose the rate and the steps, but do not stop the fit: a new task would have none for that
        data = dataclasses.replace(some, validation=subset(some, some.tasks, max_train_documents=0).train)
        start = time.perf_counter()
        adapted = self.adapted(setting, arm, data, rate, steps, seed)
        seconds = time.perf_counter() - start
        part = some.test if split == "test" else some.validation
        self.record(predictions(adapted.model, part, adapted.draws), some, split, (seed, arm, number, rate, steps), seconds)

    def record(
        self,
        found: TokenPredictions | ChoicePredictions,
        data: TaskData,
        split: str,
        run: tuple[int, str, str, float, int],
        seconds: float,
    ) -> None:
        """Add one row for each task to the table, and write the file.

        Args:
            found: predictions of the documents.
            data: the data of the run.
            split: name of the split that was scored.
            run: (seed, arm, documents, learning rate, steps).
            seconds: duration of the fit.
        """
        seed, arm, number, rate, steps = run
        rows, ece = [], calibration(found).ece
        for d, task in enumerate(data.tasks):
            log_prob = found.log_prob[found.task == d].double()
            values = [seed, arm, number, split, rate, steps, task]
            of_run = {"train_documents": data.train.documents_per_task[d], "seconds": round(seconds, 2)}
            score: dict[str, Any] = {"tokens": len(log_prob), "log_likelihood": float(log_prob.sum()), "ece": ece}
            score["perplexity"] = perplexity(score["log_likelihood"], len(log_prob)) if len(log_prob) else None
            rows.append(dict(zip(KEYS, values, strict=True)) | of_run | score)
        new = pd.DataFrame(with_options(rows, self.options))
        self.table = pd.concat([self.table, new], ignore_index=True) if len(self.table) else new
        write_results(self.table, self.output)
        how = f"{number} documents, rate {rate:g}, {steps} steps"
        overall = perplexity(float(found.log_prob.double().sum()), len(found.log_prob))
        print(f"seed {seed}: {arm}, {how}: {split} {overall:.2f} in {seconds:.1f} s", file=sys.stderr)

    def adapted(self, setting: Setting, arm: str, data: TaskData, rate: float, steps: int, seed: int) -> Adapted:
        """Give all new tasks together their adapters by an arm."""
        others = setting.others
        if arm not in USUAL:
            options = {name: value for name, value in dataclasses.asdict(setting.options).items() if name in OPTIONS}
            options |= {"steps": max(steps, 1), "learning_rate": rate, "token_budget": TOKEN_BUDGET, "patience": 0, "seed": seed}
            return other_way(others, arm, data, options)
        return Adapted.of(self.fitted(setting, arm, data, rate, steps, seed))

    def fitted(self, setting: Setting, arm: str, data: TaskData, rate: float, steps: int, seed: int) -> Fitted:
        """Fit one of the usual arms to all new tasks together."""
        fits, model = setting.others.fits, setting.others.model
        if arm == "bora":
            new = given_model(fits["bora"], len(data.tasks))
        else:
            mean = model.starts if arm == "scratch" else fits["pooled"].weights()[1]
            flat = Given(mean, {name: torch.tensor(0.0) for name in mean})
            plain = model.likelihood.with_task_weights(None)
            new = BoRA(model.backbone, len(data.tasks), adapter=model.adapter, prior=flat, likelihood=plain, seed=seed)
        batches = 0 if arm == "pooled" else len(data.train.batches(token_budget=TOKEN_BUDGET, seed=seed))
        if not batches:
            return fit_deviations(
                new, dataclasses.replace(data, train=data.validation)
            )  # without documents: the centre of the prior
        epochs = -(-steps // -(-batches // setting.options.accumulate))
        return fit(
            new, data, setting.options, epochs=epochs, learning_rate=rate, token_budget=TOKEN_BUDGET, patience=0,
            task_subsampling=False, task_dropout=0.0,
        )  # fmt: skip


def perplexity(log_likelihood: float, number: int) -> float:
    """exp of the mean negative log-likelihood.

    >>> perplexity(math.log(0.5) * 3, 3)
    2.0
    """
    return math.exp(min(-log_likelihood / number, 700.0))


def summary(table: Any) -> Any:
    """Test perplexity by arm and number of documents, as mean and sd over seeds, with NLL, ECE and the median time."""
    test = table[table["split"] == "test"].assign(documents=table["documents"].astype(str))
    test = test if "ece" in test else test.assign(ece=math.nan)  # rows of an older table
    sums = test.groupby(["arm", "documents", "seed"])[["log_likelihood", "tokens"]].sum()
    overall = np.exp(-sums["log_likelihood"] / sums["tokens"]).rename("perplexity")
    nll = np.log(overall).rename("nll")
    of_run = test.groupby(["arm", "documents", "seed"])[["seconds", "ece"]].first()
    found = pd.concat([overall, nll, of_run], axis=1).groupby(["arm", "documents"])
    return found.agg(
        mean=("perplexity", "mean"), sd=("perplexity", "std"), nll=("nll", "mean"), ece=("ece", "mean"),
        seeds=("perplexity", "size"), seconds=("seconds", "median"),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Run all seeds and print the summary."""
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
