"""Compare the model's inference of a text's task with a bag-of-words classifier, on held-out documents.

    python scripts/experiments/compare_routing.py runs/demo --output results/routing.csv

- ``bora``: p(d | text) ∝ p(d) p(text | θ_d), by ``infer_task``, with and without calibration on the validation documents.
- ``bag of words``: scikit-learn's logistic regression on TF-IDF of words and pairs of words. It is trained on the training
  documents of the run, and the validation documents choose its regularisation. It sees the same texts, cut at the same length.

The table has accuracy, mean log-probability of the right task, and calibration error (ECE, 10 bins) on the test documents, cut
to their first ``--lengths`` tokens. The script also prints the perplexity of the whole test documents under five adapters: that
of the right task, that of the most probable task, an average of all by p(d | tokens before), Θ, and the base alone. Needs
scikit-learn (pip install 'bora_pyro[routing]').
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import pandas as pd
import transformers
from bag_of_words import BagOfWords, beginnings
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.inference.evaluate import evaluate
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.predict.infer_task import TaskProbabilities, infer_task
from bora_pyro.runs.results_table import write_results
from bora_pyro.runs.saved import SavedRun, load_run


@dataclass(kw_only=True)
class RoutingConfig:
    """Compare the model's task inference with a bag-of-words classifier."""

    run: str = option("", "folder of a finished fit, its output_dir", positional=True)
    lengths: list[str] = option(["16", "32", "64", "all"], "numbers of first tokens of each document (default: 16 32 64 all)")
    prior: str = option(
        "flat", "p(d): flat, or documents, in proportion to the training documents", choices=("flat", "documents")
    )
    trust_remote_code: bool = option(
        False, "allow the base model to run its own code on this machine; only on the command line", line_only=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... or mps")
    output: str = option("results/routing.csv", "the table, one row for each method and length")

    def validate(self) -> None:
        """Check the values."""
        if not self.run.strip():
            raise InputError("no run is given; name the folder of a fit, as in compare_routing.py runs/map_fit")
        for text in self.lengths:
            if text != "all" and not (text.isdigit() and int(text) >= 2):
                raise InputError(f"lengths has {text!r}; give whole numbers from 2 up, or all")


def ece(log_prob: Tensor, task: Tensor, *, bins: int = 10) -> float:
    """Expected calibration error of the most probable task: the mean over texts of |confidence − accuracy| in their bin.

    Args:
        log_prob: (texts, D) log p(d | text).
        task: (texts,) index of the right task.
        bins: number of bins of equal width.
    """
    confidence, best = log_prob.exp().max(1)
    right = (best == task).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[place == k].mean() - right[place == k].mean()).abs() * (place == k).sum() for k in place.unique()]
    return float(sum(gaps)) / len(task)


def scores(method: str, length: str, log_prob: Tensor, task: Tensor, **more: Any) -> dict[str, Any]:
    """One row of the table."""
    right = (log_prob.argmax(1) == task).double()
    return {
        "method": method, "tokens": length, "documents": len(task), "accuracy": float(right.mean()),
        "standard_error": float(right.std() / math.sqrt(len(task))),
        "log_probability": float(log_prob.gather(1, task[:, None]).mean()), "ece": ece(log_prob, task),
    } | more  # fmt: skip


def compare(run: SavedRun, config: RoutingConfig) -> pd.DataFrame:
    """A table with one row for each method and length."""
    fitted, rows = run.fitted, []
    for length in config.lengths:
        tokens = sys.maxsize if length == "all" else int(length)
        validation, test = beginnings(run.data.validation, tokens), beginnings(run.data.test, tokens)
        found = infer_task(fitted, test, prior=config.prior)
        chosen = infer_task(fitted, validation, prior=config.prior).calibrate(validation.task)
        rows.append(scores("bora", length, found.log_prob, test.task))
        rows.append(scores("bora, calibrated", length, found.at(chosen).log_prob, test.task, chosen=chosen.temperature))
        words = BagOfWords(run.fitted, run.data, tokens, found.log_prior)
        rows.append(scores("bag of words", length, words.log_prob(test), test.task, chosen=words.strength))
    return pd.DataFrame(rows)


def perplexities(run: SavedRun, found: TaskProbabilities) -> dict[str, float]:
    """Perplexity of the whole test documents under five choices of the adapter."""
    fitted, test = run.fitted, run.data.test
    theta, mean = fitted.weights()
    of_mean = {name: value[None].expand_as(theta[name]) for name, value in mean.items()}
    base, of_theta = evaluate(fitted.model, test, None, of_mean)
    every, total = found.log_likelihood, int(test.num_tokens)
    sums = {
        "the right task": every.gather(1, test.task[:, None]).sum(),
        "the most probable task": every.gather(1, found.log_prob.argmax(1, keepdim=True)).sum(),
        "all, averaged by p(d | tokens before)": found.log_evidence.sum(),
        "Θ": of_theta.log_likelihood.sum(),
        "the base": base.log_likelihood.sum(),
    }
    return {name: math.exp(-float(value) / total) for name, value in sums.items()}


def main(argv: list[str]) -> int:
    """Compare, write the table, and print it."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse_config(RoutingConfig, argv, prog="compare_routing.py")
        run = load_run(config.run, device=config.device, trust_remote_code=config.trust_remote_code)
        if not len(run.data.test) or not len(run.data.validation):
            raise InputError(f"the run in {config.run} has no validation or no test documents; give one that has both")
        table = compare(run, config)
        # on whole documents, whatever the lengths of the table are
        averaged = perplexities(run, infer_task(run.fitted, run.data.test, prior=config.prior))
        write_results(table, config.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.round(3).to_string(index=False))
    print("test perplexity under:")
    for name, value in averaged.items():
        print(f"  {name}: {value:.2f}")
    print(f"table: {config.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
