"""Tasks that are independent of each other, in groups that one optimiser step each looks at whole.

>>> from bora_pyro.data import TaskData, TokenSplit
>>> rows, task = [[0, 5], [0, 6], [0, 7, 8], [0, 1, 2, 3]], [0, 0, 1, 3]
>>> split = TokenSplit.from_documents(rows, task=task, num_tasks=4)
>>> none = split.subset(torch.arange(0))
>>> [group.tolist() for group in task_groups(TaskData(["ada", "bob", "cleo", "dan"], split, none, none), token_budget=9)]
[[0, 1], [3]]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.subset import subset
from bora_pyro.data.tasks import TaskData
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.task_rows import MANY_TASKS
from bora_pyro.model import BoRA


def task_groups(data: TaskData, *, token_budget: int) -> list[Tensor]:
    """The tasks with training documents, (tasks,) of each group by name, so that each task is fitted as it would be alone.

    The documents of a group fill one batch: every step then has the whole gradient of each of its tasks, in which the others
    have no part. A task that needs more than a batch is a group of its own, and so is one with validation documents, which
    say for it alone which epoch is kept.

    Args:
        data: of all tasks.
        token_budget: tokens of a batch, padding included.
    """
    train, none = data.train, torch.zeros(len(data.tasks), dtype=torch.int64)
    rows = torch.bincount(train.task, minlength=len(data.tasks))
    longest = none.scatter_reduce(0, train.task, train.lengths, "amax")
    alone = (rows * longest > token_budget) | (torch.bincount(data.validation.task, minlength=len(data.tasks)) > 0)
    groups = [task[None] for task in ((rows > 0) & alone).nonzero()[:, 0]]
    together: list[int] = []
    # like lengths together, so that little of a batch is padding
    for task in longest.argsort(stable=True).tolist():
        if not rows[task] or alone[task]:
            continue
        of_group = int(rows[together].sum()) + int(rows[task])
        if together and (of_group * int(longest[task]) > token_budget or len(together) == MANY_TASKS):
            groups.append(_by_name(together, data))
            together = []
        together.append(task)
    return groups + ([_by_name(together, data)] if together else [])


def _by_name(tasks: list[int], data: TaskData) -> Tensor:
    return torch.tensor(sorted(tasks, key=lambda task: data.tasks[task]))


def of_group(model: BoRA, data: TaskData, group: Tensor) -> tuple[BoRA, TaskData]:
    """Model and data of some tasks (tasks,), ordered by name; the prior says the same of every task."""
    weights, part = model.likelihood.task_weights, copy.copy(model)
    part.num_tasks = len(group)
    part.likelihood = model.likelihood if weights is None else model.likelihood.with_task_weights(weights[group])
    return part, subset(data, [data.tasks[d] for d in group.tolist()])


def joined_history(fits: Sequence[Fitted], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """The epochs of fits to other tasks each, as those of one; a fit with fewer epochs stays where its last one has left it.

    Args:
        fits: the fits.
        tokens: predicted tokens of the training documents of each, by which their losses weigh.
    """
    if len(fits) == 1:
        return fits[0].history
    history = []
    for number in range(max((len(found.history) for found in fits), default=0)):
        records = [found.history[min(number, len(found.history) - 1)] for found in fits]
        there = [(n, record) for n, record, found in zip(tokens, records, fits, strict=True) if number < len(found.history)]
        time = sum(n / record["training_tokens_per_second"] for n, record in there)
        history.append(
            {
                "epoch": number + 1,
                "loss": sum(n * record["loss"] for n, record in zip(tokens, records, strict=True)) / sum(tokens),
                "training_tokens_per_second": sum(n for n, _ in there) / time,
                "seconds": sum(record["seconds"] for record in records),
            }
        )
    return history


def joined_perplexity(fits: Sequence[Fitted], tokens: Sequence[int]) -> float | None:
    """Validation perplexity of fits to other tasks each, with so many predicted ``tokens``; None where there are none."""
    known = [(n, found.validation_perplexity) for n, found in zip(tokens, fits, strict=True)]
    logs = [n * math.log(perplexity) for n, perplexity in known if perplexity is not None]
    return math.exp(sum(logs) / sum(n for n, perplexity in known if perplexity is not None)) if logs else None
