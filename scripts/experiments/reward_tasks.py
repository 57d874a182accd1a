"""The tasks of ``compare_rewards.py``: prompts from the beginnings of documents, and a number of words for each task.

The name of a task says its target, so that a reward needs nothing else:

>>> score("Returns the", " sum of all weights.", "linalg (5 words)")
-1.0
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from transformers import PreTrainedTokenizerBase

from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.errors import InputError, shown
from bora_pyro.rewards import Length
from bora_pyro.rewards.prompts import prompt_ids

#: The name of `score` for ``bora reward-fit --reward``.
REWARD = f"{__name__}:score"
_NAME = re.compile(r" \((\d+) words\)$")


def score(prompt: str, text: str, task: str) -> float:
    """Minus the distance of the number of words from the task's target."""
    return Length(target=target_of(task))(prompt, text, task)


def task_name(name: str, words: int) -> str:
    """The name of a task with its target.

    >>> task_name("linalg", 5)
    'linalg (5 words)'
    """
    return f"{name} ({words} words)"


def target_of(task: str) -> int:
    """The target in the name of a task.

    >>> target_of("linalg")
    Traceback (most recent call last):
    bora_pyro.errors.InputError: the task 'linalg' has no target; its name has to end as in 'linalg (5 words)'
    """
    found = _NAME.search(task)
    if found is None:
        raise InputError(f"the task {shown(task)} has no target; its name has to end as in {shown(f'{task} (5 words)')}")
    return int(found[1])


@dataclass(frozen=True)
class RewardTables:
    """The documents of the tasks, and a prompt from the beginning of each.

    Attributes:
        documents: a row a document: ``task``, ``text`` and ``split``.
        prompts: a row a prompt: ``task``, ``prompt`` and ``split``.
        left_out: held-out documents whose beginning is that of another document.
    """

    documents: pd.DataFrame
    prompts: pd.DataFrame
    left_out: int

    @classmethod
    def of(
        cls,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        targets: Sequence[int],
        *,
        prompt_tokens: int,
        documents: int,
        held_out: int,
    ) -> RewardTables:
        """Choose the tasks with the most training documents, one for each target, and cut the prompts.

        A held-out prompt is no training prompt, of whatever task, and stands once in its split.

        Args:
            data: the documents.
            tokenizer: the tokenizer of the base.
            targets: the number of words that is best, of the tasks by name.
            prompt_tokens: tokens of a prompt, after the start token. Shorter documents are left out.
            documents: training documents of a task at most.
            held_out: validation and test documents of a task at most.

        Raises:
            InputError: there are fewer tasks than targets, or a task has no document for a split.
        """
        if len(targets) > len(data.tasks):
            raise InputError(f"words has {len(targets)} targets, and the documents have {len(data.tasks)} tasks; give fewer")
        counts = data.train.documents_per_task
        order = sorted(range(len(data.tasks)), key=lambda d: (-counts[d], data.tasks[d]))[: len(targets)]
        tasks = sorted(order, key=lambda d: data.tasks[d])
        names = {d: task_name(data.tasks[d], target) for d, target in zip(tasks, targets, strict=True)}
        rows, seen, left_out = [], set[str](), 0
        for name, split, most in (
            ("train", data.train, documents),
            ("validation", data.validation, held_out),
            ("test", data.test, held_out),
        ):
            own = set[str]()
            for d in tasks:
                number = 0
                for text, prompt in _texts(split, d, tokenizer, prompt_tokens):
                    if number == most:
                        break
                    if name != "train" and prompt in seen | own:
                        left_out += 1
                        continue
                    own.add(prompt)
                    rows.append({"task": names[d], "text": text, "prompt": prompt, "split": name})
                    number += 1
                if not number:
                    raise InputError(
                        f"task {shown(data.tasks[d])} has no {name} document of more than {prompt_tokens} tokens with a "
                        "beginning of its own; give fewer words, or another prompt_tokens"
                    )
            seen |= own
        table = pd.DataFrame(rows)
        return cls(table[["task", "text", "split"]], table[["task", "prompt", "split"]], left_out)


def _texts(split: TokenSplit, task: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> list[tuple[str, str]]:
    """The documents of a task that are longer than a prompt: text and prompt."""
    whole, found = split.subset(split.first_pieces), []
    for number in (whole.task == task).nonzero()[:, 0].tolist():
        ids = prompt_ids(whole.document(number), tokenizer)
        if len(ids) > prompt_tokens + 1:
            found.append(tuple(tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[: prompt_tokens + 1])))
    return found
