"""The documents of further tasks behind those of others.

>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
>>> one = TokenSplit.from_documents([[0, 8, 9, 5]], task=[0], num_tasks=1)
>>> joined = join_tasks(TaskData(["ada", "zoe"], split, split, split), TaskData(["bob"], one, one, one))
>>> joined.tasks, joined.train.task.tolist(), joined.train.document(2).tolist()
(['ada', 'zoe', 'bob'], [0, 1, 2], [0, 8, 9, 5])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.split_names import SPLITS
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, shown


def join_tasks(first: TaskData, second: TaskData) -> TaskData:
    """The tasks of two sets of documents: those of the first in their order, then those of the second.

    The notes are those of the second set. There is no record of the split, because each set has its own, and no weights or
    groups of tasks.

    Args:
        first: documents of texts, not of questions.
        second: documents of other tasks, made with the same tokenizer.

    Raises:
        InputError: a task is in both.
    """
    if both := [task for task in second.tasks if task in first.tasks]:
        raise InputError(f"task {shown(both[0])} has documents already; give documents of new tasks alone")
    sides: dict[str, Any] = {name: _joined(getattr(first, name), getattr(second, name)) for name in SPLITS}
    return TaskData([*first.tasks, *second.tasks], **sides, notes=list(second.notes), chat_template=first.chat_template)


def _joined(first: TokenSplit, second: TokenSplit) -> TokenSplit:
    parts = (first, second)
    observed = index = None
    if any(part.observed is not None for part in parts):
        observed = torch.cat([_observed(part) for part in parts])
    if any(part.document_index is not None for part in parts):
        index = torch.cat([first.document_of, second.document_of + first.num_documents])
    return TokenSplit(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.lengths for part in parts]),
        task=torch.cat([first.task, second.task + first.num_tasks]),
        characters=torch.cat([part.characters for part in parts]),
        num_tasks=first.num_tasks + second.num_tasks,
        pad_token_id=first.pad_token_id,
        observed=observed,
        offsets=torch.cat([first.offsets, second.offsets + len(first.tokens)]),
        document_index=index,
    )


def _observed(split: TokenSplit) -> Tensor:
    """(all tokens,) bool, whether a token is predicted: all are, except the first of each document."""
    if split.observed is not None:
        return split.observed
    observed = torch.ones(len(split.tokens), dtype=torch.bool)
    observed[split.offsets] = False
    return observed
