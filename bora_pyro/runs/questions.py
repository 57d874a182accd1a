"""Test documents as multiple-choice questions: a prompt, its options in a column of the table, and the completion that is right.

>>> from bora_pyro.data.tables import table
>>> from bora_pyro.runs.build import build_run
>>> rows = [{"task": t, "prompt": f"{n} is", "completion": [" even", " odd"][n % 2]} for t in ("a", "b") for n in range(5)]
>>> config = MapFitConfig(data=table(row | {"options": [" odd", " even"]} for row in rows), options_column="options")
>>> model, data = build_run(config, quiet=True)
>>> questions = questions_of(config, model.backbone, data)
>>> len(questions), questions[0].options, [name for name in accuracies(model, questions, None, data.tasks)]
(2, (' odd', ' even'), [None, 'a', 'b'])
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bora_pyro.backbone.backbone import Backbone
from bora_pyro.data import DataOptions, TaskData
from bora_pyro.data.encode import encoder
from bora_pyro.data.readers import open_source
from bora_pyro.data.tables import read_rows
from bora_pyro.inference.fitted import Fitted
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.field import part_of
from bora_pyro.predict.multiple_choice import Question, check_questions, choose
from bora_pyro.runs.config.map_fit import MapFitConfig

# Rows that are tokenised at one time.
_ROWS = 1000


def questions_of(config: MapFitConfig, backbone: Backbone, data: TaskData) -> list[Question]:
    """The test documents of a run as questions; none without ``options_column``, or if the fit observes the answers itself.

    A row of the table is a question if the test documents contain it: its task, and the tokens of its prompt and completion.

    Args:
        config: the configuration of the run.
        backbone: the base, which must have a tokenizer.
        data: the documents of the run.

    Raises:
        InputError: the table has no such column, or no prompts; a cell is not a list of options with the completion among them;
            or a question is longer than the context of the base.
    """
    if config.options_column is None or not data.test.num_documents or data.test.correct is not None:
        return []
    options, tokenizer = part_of(config, DataOptions), backbone.tokenizer
    assert tokenizer is not None
    longest = min(options.max_tokens, backbone.context or options.max_tokens)
    encode = encoder(tokenizer, longest, long_documents=options.long_documents)
    wanted = Counter((data.tasks[d], data.test.document(n).numpy().tobytes()) for n, d in enumerate(data.test.task.tolist()))
    rows = [row for row in _rows(config, options) if row["task"] in set(data.tasks)]
    found: list[Question] = []
    for first in range(0, len(rows), _ROWS):
        part = rows[first : first + _ROWS]
        encoded = encode({name: [row[name] for row in part] for name in ("task", "prompt", "text")})
        for ids, number in zip(encoded["input_ids"], encoded["row"], strict=True):
            row, key = part[number], (part[number]["task"], np.asarray(ids, dtype=np.int64).tobytes())
            if wanted[key]:
                wanted[key] -= 1
                choices = json.loads(row["options"])
                found.append(Question(row["prompt"], tuple(choices), choices.index(row["text"]), row["task"]))
    if found:
        check_questions(backbone, found)
    return found


def _rows(config: MapFitConfig, options: DataOptions) -> Iterator[dict[str, str]]:
    """Task, prompt, text and options (as JSON text) of each row of the source."""
    raw = open_source(config.data, options, hub_split=options.hub_split)
    return read_rows(raw, options.columns)[1]


def accuracies(
    model: BoRA, questions: Sequence[Question], weights: Weights | None, tasks: Sequence[str]
) -> dict[str | None, float | None]:
    """The share of questions whose most probable option is the right one: of all (None), and of each task that has questions.

    Options are compared by log-likelihood per token (:func:`~bora_pyro.predict.multiple_choice.choose`).

    Args:
        model: the model.
        questions: the questions.
        weights: θ of all tasks, (D, layers, *shape) by name; None: the base alone.
        tasks: the names of the model's tasks.
    """
    if not questions:
        return {None: None}
    found = choose(model, questions, [weights], tasks)
    of_task = {tasks[d]: float(found.correct[found.task == d].double().mean()) for d in found.task.unique().tolist()}
    return {None: float(found.correct.double().mean()), **of_task}


def with_accuracy(metrics: dict[str, Any], fitted: Fitted, questions: Sequence[Question]) -> dict[str, Any]:
    """Add ``test_accuracy`` and ``base_test_accuracy`` to the content of ``metrics.json``, over all questions and by task."""
    if not questions:
        return metrics
    base, adapted = (accuracies(fitted.model, questions, weights, fitted.tasks) for weights in (None, fitted.weights()[0]))

    def columns(name: str | None) -> dict[str, float | None]:
        return {"test_accuracy": adapted.get(name), "base_test_accuracy": base.get(name)}

    tasks = {slug: row | columns(row["name"]) for slug, row in metrics["tasks"].items()}
    return metrics | columns(None) | {"test_questions": len(questions), "tasks": tasks}
