"""One fit of one arm of ``compare_peers.py``, in a process of its own, so that its peak memory is its own.

    python scripts/experiments/peer_fits.py --arm peft_each --learning_rate 0.01 --result fit.json

The result is a JSON file with a row for each arm that the fit gives: the adapters of ``peft_each`` also give the soups. Arms
through PEFT are trained by ``transformers.Trainer`` (AdamW with the moments of ``bora_pyro``'s fit, no weight decay, the same
schedule) on the batches of ``bora_pyro.inference.fit``, in the same order. A fit of one task has that task's rows of each batch.
All arms of one rank have the same start. The adapters are then read into this library, which scores all arms, after a check that
PEFT's logits are the same. So ``peft_one`` and ``bora_inf`` are two implementations of one fit, and must agree.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peer_bora import fit_ours
from peer_names import with_names
from peer_options import NAMED, FitOf
from peer_outcome import Outcome
from peer_peft import PEFT_ARMS, Peft

from bora_pyro.backbone.loading import quiet_bitsandbytes
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.files.atomic import replace_file
from bora_pyro.inference.evaluate import Scores, evaluate
from bora_pyro.inference.memory import peak_memory_bytes
from bora_pyro.model import BoRA
from bora_pyro.options.command_line import parse_config, run_script
from bora_pyro.options.field import option
from bora_pyro.predict.multiple_choice import Question
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.questions import accuracies, questions_of


@dataclass(kw_only=True)
class PeerFitConfig(FitOf):
    """Fit one arm at one learning rate with one seed, and write its rows."""

    arm: str = option("peft_one", "the arm, as in compare_peers.py")
    learning_rate: float = option(0.01, "AdamW's largest learning rate", positive=True)
    seed: int = option(0, "seed of the split, the start and the order of the documents", least=0)
    result: str = option("peer_fit.json", "the JSON file to write", filled=True)


def fit_arm(arm: str, template: BoRA, data: TaskData, config: MapFitConfig) -> list[Outcome]:
    """Fit an arm, and the arms that come with it."""
    if arm in ("base", f"base{NAMED}"):
        own = with_names(data, template.backbone) if arm.endswith(NAMED) else data
        [scores] = evaluate(template, own.validation, None)
        perplexity = scores.perplexity()
        assert perplexity is not None
        return [Outcome(arm, template, None, perplexity, data=None if own is data else own)]
    if arm not in PEFT_ARMS:
        return [fit_ours(arm, template, data, config)]
    through = Peft(template, data, config)
    outcome = PEFT_ARMS[arm](through, arm)
    return [outcome, *(through.soups(outcome) if arm == "peft_each" else [])]


def row_of(outcome: Outcome, data: TaskData, questions: Sequence[Question]) -> dict[str, Any]:
    """The numbers of an arm: perplexities and accuracies over all documents and by task, and what they cost."""
    own = outcome.data or data
    [test], [validation] = (evaluate(outcome.model, split, outcome.theta) for split in (own.test, own.validation))
    if own is not data:  # the questions are asked as the documents are read
        questions = [dataclasses.replace(question, prompt=f"{question.task}\n{question.prompt}") for question in questions]
    right, documents = accuracies(outcome.model, questions, outcome.theta, data.tasks), data.train.documents_per_task

    def of_task(d: int, name: str) -> dict[str, Any]:
        scores = {"documents": documents[d], "validation": _rounded(validation, d), "test": _rounded(test, d)}
        return scores | ({"accuracy": right.get(name)} if questions else {})

    return {
        "arm": outcome.arm, "validation_perplexity": outcome.validation, "test_perplexity": test.perplexity(),
        "test_accuracy": right[None], "best_epoch": outcome.epoch, "averaged": outcome.averaged,
        "training_tokens": outcome.tokens, "trainable_parameters": outcome.parameters, "adapter_bytes": outcome.adapter_bytes,
        "seconds": round(outcome.seconds, 2), **outcome.more, "documents_digest": data.digest[:16],
        "tasks": {name: of_task(d, name) for d, name in enumerate(data.tasks)},
    }  # fmt: skip


def _rounded(scores: Scores, d: int) -> float | None:
    perplexity = scores.perplexity(d)
    return None if perplexity is None else float(f"{perplexity:.6g}")


def run(config: PeerFitConfig) -> list[dict[str, Any]]:
    """Fit one arm and return its rows."""
    torch.set_num_threads(config.threads)
    options = config.fit(seed=config.seed, learning_rate=config.learning_rate)
    template, data = build_run(options, quiet=True)
    if not data.validation.num_tokens:
        raise InputError("there is no validation document to choose learning rates by; give data with a validation split")
    questions = questions_of(options, template.backbone, data)
    outcomes = fit_arm(config.arm, template, data, options)
    memory = peak_memory_bytes(template.backbone.device)
    return [row_of(outcome, data, questions) | {"peak_memory_bytes": memory} for outcome in outcomes]


def main(argv: list[str]) -> int:
    """Fit one arm, and write its rows."""
    transformers.utils.logging.disable_progress_bar()
    quiet_bitsandbytes()
    try:
        config = parse_config(PeerFitConfig, argv, prog="peer_fits.py")
        rows = run(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    replace_file(Path(config.result), lambda file: file.write_text(json.dumps(rows, indent=1), encoding="utf-8"))
    return 0


if __name__ == "__main__":
    run_script(main)
