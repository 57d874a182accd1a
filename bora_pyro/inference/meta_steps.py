"""The meta-steps of an epoch: which tasks are drawn for each, with which of their documents.

>>> from bora_pyro.data import TokenSplit
>>> split = TokenSplit.from_documents([[0, n] for n in range(5)], task=[0, 0, 0, 1, 2], num_tasks=3)
>>> steps = meta_steps(split, tasks_per_step=2, documents_per_task=2, seed=0)
>>> len(steps), sorted(torch.cat(steps).tolist())
(3, [0, 1, 2, 3, 4])
"""

from __future__ import annotations

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit


def meta_steps(split: TokenSplit, *, tasks_per_step: int, documents_per_task: int, seed: int) -> list[Tensor]:
    """Draw the meta-steps of an epoch. Every document is in exactly one of them, and a task is at most once in each.

    The documents of a task are shuffled and cut into parts. In each round, every task with a part left is drawn, in a random
    order, ``tasks_per_step`` tasks for a meta-step. The meta-steps are shuffled in the end. Their number does not depend on the
    seed. Tasks without documents are never drawn.

    Args:
        split: the training documents. The pieces of a long document, or the options of a question, stay together.
        tasks_per_step: the largest number of tasks of a meta-step.
        documents_per_task: the largest number of documents of a task in a meta-step.
        seed: seed of the draw.

    Returns:
        The rows of each meta-step, (rows,) positions in the split in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(number: int) -> Tensor:
        return torch.randperm(number, generator=generator)

    of_document = split.task[split.first_pieces]
    parts: list[list[Tensor]] = []
    for d in range(split.num_tasks):
        own = (of_document == d).nonzero()[:, 0]
        parts.append([*own[shuffled(len(own))].split(documents_per_task)] if len(own) else [])
    steps: list[Tensor] = []
    for number in range(max(map(len, parts), default=0)):
        drawn = torch.tensor([d for d, of_task in enumerate(parts) if number < len(of_task)])
        for tasks in drawn[shuffled(len(drawn))].split(tasks_per_step):
            documents = torch.cat([parts[d][number] for d in tasks.tolist()])
            steps.append(torch.isin(split.document_of, documents).nonzero()[:, 0])
    return [steps[place] for place in shuffled(len(steps)).tolist()]
