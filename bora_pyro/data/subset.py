"""Take a subset of the tasks of a data set, and a subset of their training documents.

>>> from bora_pyro.data import TaskData, TokenSplit
>>> split = TokenSplit.from_documents([[0, 5], [0, 6], [0, 7]], task=[0, 1, 1], num_tasks=2)
>>> some = subset(TaskData(["ada", "bob"], split, split, split), ["bob"], max_train_documents=1)
>>> some.tasks, len(some.train), [some.test.document(n).tolist() for n in range(2)]
(['bob'], 1, [[0, 6], [0, 7]])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bora_pyro.data.assign import task_generator
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest, shown


def subset(data: TaskData, tasks: Sequence[str], *, max_train_documents: int | None = None, seed: int = 0) -> TaskData:
    """The data of some tasks, sorted by name.

    Args:
        data: the data of all tasks.
        tasks: names of the tasks to keep.
        max_train_documents: keep at most so many training documents of each task, drawn at random; None keeps all. A smaller
            number keeps a subset of what a larger number keeps.
        seed: seed of the draw.

    Raises:
        InputError: a task is not in the data.
    """
    for task in tasks:
        if task not in data.tasks:
            raise InputError(f"task {shown(task)} is not in the data, which has {len(data.tasks)}{nearest(task, data.tasks)}")
    names = sorted(set(tasks))
    place = torch.full((len(data.tasks),), -1)
    place[[data.tasks.index(name) for name in names]] = torch.arange(len(names))

    def part(split: TokenSplit, limit: int | None = None) -> TokenSplit:
        kept = (place[split.task] >= 0).nonzero()[:, 0]
        if limit is not None:
            # whole documents, so that pieces of a long one stay together
            firsts = split.first_pieces
            own = [firsts[place[split.task[firsts]] == d] for d in range(len(names))]
            firsts = torch.cat([_some(documents, limit, names[d], seed) for d, documents in enumerate(own)])
            kept = torch.isin(split.document_of, split.document_of[firsts]).nonzero()[:, 0]
        some = split.subset(kept.sort().values)
        return some.replace(task=place[some.task], num_tasks=len(names))

    parts = (part(data.train, max_train_documents), part(data.validation), part(data.test))
    return TaskData(names, *parts, chat_template=data.chat_template)


def tasks_to_leave_out(data: TaskData, number: int, *, least_documents: int = 1, seed: int = 0) -> list[str]:
    """Draw some of the tasks that have documents in all three splits.

        >>> from bora_pyro.data import TokenSplit
        >>> split = TokenSplit.from_documents([[0, 5], [0, 6], [0, 7]], task=[0, 1, 2], num_tasks=3)
        >>> tasks_to_leave_out(TaskData(["ada", "bob", "cleo"], split, split, split), 1)
        ['cleo']

    Args:
        data: the data of all tasks.
        number: how many tasks to draw. Two or more tasks must remain.
        least_documents: the least number of training documents of a task to draw.
        seed: seed of the draw.

    Returns:
        The names of the tasks, sorted.

    Raises:
        InputError: there are too few such tasks.
    """
    counts = [split.documents_per_task for split in (data.train, data.validation, data.test)]
    enough = [
        task for d, task in enumerate(data.tasks) if counts[0][d] >= max(least_documents, 1) and counts[1][d] and counts[2][d]
    ]
    if len(enough) < number or len(data.tasks) < number + 2:
        raise InputError(
            f"{len(enough)} of {len(data.tasks)} tasks have {least_documents} training documents or more and all three splits; "
            f"give a smaller number to leave out than {number}, or a smaller least_documents"
        )
    return sorted(np.random.default_rng(seed).permutation(enough)[:number].tolist())


def _some(documents: Tensor, limit: int, task: str, seed: int) -> Tensor:
    order = task_generator(seed, task, "subset").permutation(len(documents))
    return documents[torch.from_numpy(order)[:limit]]
