"""Compare ways to detect texts of unknown tasks, on documents of known tasks and of tasks that the fit has not seen.

    python scripts/experiments/compare_unknown.py --output results/unknown.csv

For each seed some tasks are left out, BoRA (learned τ) is fitted to the others, and the test documents of all tasks are scored. A
higher score means that a text is more likely of an unknown task:

- ``prior predictive``: log p(unknown | text) of ``infer_task(..., unknown=0.5)``.
- ``doubt``: minus the largest p(d | text) among the known tasks, calibrated on their validation documents.
- ``bag of words``: minus the largest p(d | text) of scikit-learn's logistic regression on TF-IDF.

The table has the AUROC of each score (0.5 is chance). For the first score it also says how often ``unknown`` is the most probable
answer for documents of known and of unknown tasks, with the prior p(unknown) = 0.5. Needs scikit-learn
(pip install 'bora_pyro[routing]').

The fit has the options of ``--fit_config``; ``seed``, ``learning_rate``, ``max_eval_documents`` and ``threads`` are overridden.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from bag_of_words import BagOfWords, beginnings
from fit_options import check_usual
from torch import Tensor

from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.data.subset import subset, tasks_to_leave_out
from bora_pyro.errors import InputError
from bora_pyro.files.text import name_line
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.options import FitOptions
from bora_pyro.inference.task_groups import of_group
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option, part_of
from bora_pyro.predict.infer_task import TaskProbabilities, infer_task
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.results_table import read_results, write_results
from bora_pyro.runs.stored_options import check_options, fit_options, with_options

KEYS = ["seed", "method", "tokens"]


@dataclass(kw_only=True)
class UnknownConfig:
    """Compare ways to detect texts of tasks that a fit has not seen."""

    fit_config: str = option("results/documentation.yaml", "YAML of the options of the fit to the other tasks")
    data: str | None = option(None, "the documents (default: what fit_config names)")
    left_out: int = option(5, "number of tasks that are left out")
    eval_documents: int = option(20, "largest number of validation and of test documents of a task")
    learning_rate: float = option(0.03, "learning rate of the fit to the other tasks")
    lengths: list[str] = option(["32", "all"], "numbers of first tokens of each document (default: 32 all)")
    draws: int = option(8, "draws of the prior predictive")
    unknown: float = option(0.5, "prior probability that a text is of none of the tasks")
    seeds: int = option(3, "number of seeds, from 0")
    threads: int = option(2, "CPU threads")
    output: str = option("results/unknown.csv", "the table, one row for each seed, method and length")

    def validate(self) -> None:
        """Check the values."""
        for name in ("left_out", "eval_documents", "draws", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number from 1 up")
        if not 0 < self.unknown < 1:
            raise InputError(f"unknown is {self.unknown}; give a probability between 0 and 1")
        for text in self.lengths:
            if text != "all" and not (text.isdigit() and int(text) >= 2):
                raise InputError(f"lengths has {text!r}; give whole numbers from 2 up, or all")
        if not Path(self.fit_config).is_file():
            raise InputError(f"fit_config {self.fit_config} does not exist; give a YAML file of map_fit.py's options")


def auroc(of_known: Tensor, of_unknown: Tensor) -> float:
    """Probability that a document of an unknown task has the higher score (Mann and Whitney's U); a tie counts half.

    Args:
        of_known: scores of documents of known tasks.
        of_unknown: scores of documents of unknown tasks.
    """
    more = of_unknown[:, None] > of_known
    same = of_unknown[:, None] == of_known
    return float((more.double() + same.double() / 2).mean())


def chosen_options(config: UnknownConfig, seed: int) -> MapFitConfig:
    """The options of the fit of a seed."""
    given = {"config": config.fit_config, "data": config.data, "seed": seed, "learning_rate": config.learning_rate}
    given |= {"max_eval_documents": config.eval_documents, "threads": config.threads}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return parse_config(MapFitConfig, words)


def fit_others(config: UnknownConfig, seed: int) -> tuple[Fitted, TaskData, TokenSplit]:
    """Fit the tasks that are not left out. Returns the fit, its data, and the test documents of the tasks that are left out."""
    chosen = chosen_options(config, seed)
    names = ("router", "start_from", "scale_learning_rate_with_tau")
    check_usual(chosen, names, file=config.fit_config, why="the fit to the other tasks does not have it")
    model, data = build_run(chosen, quiet=True)
    left_out = tasks_to_leave_out(data, config.left_out, seed=seed)
    print(f"seed {seed}: left out {', '.join(map(name_line, left_out))}", file=sys.stderr)
    others = torch.tensor([d for d, task in enumerate(data.tasks) if task not in left_out])
    of_old, old = of_group(model, data, others)
    return fit(of_old, old, part_of(chosen, FitOptions)), old, subset(data, left_out).test


def of_known_tasks(found: TaskProbabilities) -> TaskProbabilities:
    """p(d | text), given that the task is known."""
    likelihood, prior = found.log_likelihood[:, :-1], found.log_prior[:-1].log_softmax(0)
    return dataclasses.replace(found, tasks=found.known, log_likelihood=likelihood, log_prior=prior, unknown=False)


def compare(config: UnknownConfig, seed: int) -> list[dict[str, Any]]:
    """The rows of one seed."""
    fitted, old, new = fit_others(config, seed)
    rows = []
    for length in config.lengths:
        tokens = sys.maxsize if length == "all" else int(length)
        known, unknown = beginnings(old.test, tokens), beginnings(new, tokens)

        def row(method: str, scores: list[Tensor], length: str = length, **more: Any) -> dict[str, Any]:
            numbers = {"documents": len(scores[0]), "documents_unknown": len(scores[1])}
            return {"seed": seed, "method": method, "tokens": length} | numbers | {"auroc": auroc(*scores)} | more

        options: dict[str, Any] = {"prior": "flat", "unknown": config.unknown, "draws": config.draws, "seed": seed}
        found = [infer_task(fitted, split, **options) for split in (known, unknown)]
        among = [of_known_tasks(of) for of in found]
        validation = beginnings(old.validation, tokens)
        chosen = infer_task(fitted, validation, prior="flat").calibrate(validation.task)
        log_prob = [of.log_prob for of in found]
        said = [float((value.argmax(1) == len(old.tasks)).double().mean()) for value in log_prob]
        rows.append(row("prior predictive", [value[:, -1] for value in log_prob], false_alarms=said[0], found=said[1]))
        rows.append(row("doubt", [-of.at(chosen).log_prob.max(1).values for of in among]))
        words = BagOfWords(fitted, old, tokens, among[0].log_prior)
        rows.append(row("bag of words", [-words.log_prob(split).max(1).values for split in (known, unknown)]))
    return rows


def main(argv: list[str]) -> int:
    """Compare for every seed, write the table, and print its means."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(UnknownConfig, argv, prog="compare_unknown.py")
        torch.set_num_threads(config.threads)
        table = read_results(config.output, KEYS)
        options = fit_options(chosen_options(config, 0))
        options |= {name: getattr(config, name) for name in ("left_out", "lengths", "draws", "unknown")}
        check_options(table, options, output=config.output)
        for seed in range(config.seeds):
            if not (table["seed"] == seed).any():
                rows = pd.DataFrame(with_options(compare(config, seed), options))
                table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
                write_results(table, config.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = table.groupby(["method", "tokens"])[["auroc", "false_alarms", "found"]].agg(["mean", "std"])
    print(found.round(3).to_string())
    print(f"table: {config.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
