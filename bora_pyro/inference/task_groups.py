"""Groups of independent tasks that are fitted together: one optimiser step has all documents of a group.

>>> from bora_pyro.data import TaskData, TokenSplit
>>> rows, task = [[0, 5], [0, 6], [0, 7, 8], [0, 1, 2, 3]], [0, 0, 1, 3]
>>> split = TokenSplit.from_documents(rows, task=task, num_tasks=4)
>>> none = split.subset(torch.arange(0))
>>> [group.tolist() for group in task_groups(TaskData(["ada", "bob", "cleo", "dan"], split, none, none), token_budget=9)]
[[0, 1], [3]]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.subset import subset
from bora_pyro.data.tasks import TaskData
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.task_rows import MANY_TASKS
from bora_pyro.likelihoods import Measure
from bora_pyro.model import BoRA


def task_groups(data: TaskData, *, token_budget: int) -> list[Tensor]:
    """Divide the tasks with training documents into groups, so that each task is fitted as if it were alone.

    The documents of a group fit into one batch. Every step then has the whole gradient of each task, and the other tasks do not
    change it. A task whose documents do not fit into one batch is alone in its group. A task with validation documents is
    alone too, because these documents decide which of its epochs is kept.

    Args:
        data: the data of all tasks.
        token_budget: tokens of a batch, padding included.

    Returns:
        The tasks of each group, (tasks,), ordered by name.
    """
    train, none = data.train, torch.zeros(len(data.tasks), dtype=torch.int64)
    rows = torch.bincount(train.task, minlength=len(data.tasks))
    longest = none.scatter_reduce(0, train.task, train.lengths, "amax")
    alone = (rows * longest > token_budget) | (torch.bincount(data.validation.task, minlength=len(data.tasks)) > 0)
    groups = [task[None] for task in ((rows > 0) & alone).nonzero()[:, 0]]
    group: list[int] = []
    # in the order of lengths, so that a batch has little padding
    for task in longest.argsort(stable=True).tolist():
        if not rows[task] or alone[task]:
            continue
        group_rows = int(rows[group].sum()) + int(rows[task])
        if group and (group_rows * int(longest[task]) > token_budget or len(group) == MANY_TASKS):
            groups.append(_by_name(group, data))
            group = []
        group.append(task)
    return groups + ([_by_name(group, data)] if group else [])


def _by_name(tasks: list[int], data: TaskData) -> Tensor:
    return torch.tensor(sorted(tasks, key=lambda task: data.tasks[task]))


def of_group(model: BoRA, data: TaskData, group: Tensor) -> tuple[BoRA, TaskData]:
    """Model and data of some tasks (tasks,), ordered by name; the prior must be the same for every task."""
    weights, group_model = model.likelihood.task_weights, copy.copy(model)
    group_model.num_tasks = len(group)
    group_model.likelihood = model.likelihood if weights is None else model.likelihood.with_task_weights(weights[group])
    return group_model, subset(data, [data.tasks[d] for d in group.tolist()])


def joined_history(fits: Sequence[Fitted], tokens: Sequence[int], observations: Sequence[int]) -> list[dict[str, Any]]:
    """Combine the histories of fits to different tasks into one; a fit with fewer epochs contributes its last epoch again.

    Args:
        fits: the fits.
        tokens: predicted tokens of each fit's training documents.
        observations: what the likelihood's measure is a mean over, in the training documents of each fit; losses are weighted by
            them.
    """
    if len(fits) == 1:
        return fits[0].history
    history = []
    for number in range(max((len(fitted.history) for fitted in fits), default=0)):
        records = [fitted.history[min(number, len(fitted.history) - 1)] for fitted in fits]
        running = [(n, record) for n, record, fitted in zip(tokens, records, fits, strict=True) if number < len(fitted.history)]
        time = sum(n / record["training_tokens_per_second"] for n, record in running)
        history.append(
            {
                "epoch": number + 1,
                "loss": sum(n * record["loss"] for n, record in zip(observations, records, strict=True)) / sum(observations),
                "training_tokens_per_second": sum(n for n, _ in running) / time,
                "seconds": sum(record["seconds"] for record in records),
            }
        )
    return history


def joined_score(fits: Sequence[Fitted], observations: Sequence[int], measure: Measure) -> float | None:
    """The measure of the validation documents over all fits to different tasks; None if there are no such documents.

    Args:
        fits: the fits.
        observations: what the measure is a mean over, such as predicted tokens: their number in each fit's validation documents.
        measure: the measure of the fits' likelihood.
    """
    scores = [(n, fitted.validation_score) for n, fitted in zip(observations, fits, strict=True)]
    known = [(n, score) for n, score in scores if score is not None]
    return measure.of(-sum(n * measure.nll(score) for n, score in known), sum(n for n, _ in known))
