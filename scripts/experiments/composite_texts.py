"""Texts whose task is hidden, and texts in which several tasks follow one another, with the task of each token.

>>> split = TokenSplit.from_documents([[0, 5, 6, 7], [0, 8, 9, 5]], task=[0, 1], num_tasks=2)
>>> texts = composites(split, 2, segment=2, number=1, seed=0)
>>> sorted(texts.split.document(0).tolist()), texts.start
([0, 5, 6, 8, 9], [[2]])
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bora_pyro.data import TokenSplit


@dataclass(frozen=True)
class Texts:
    """Texts with the task of each predicted token.

    Attributes:
        split: the texts.
        task: one for each text, (tokens,) int64: the task of each predicted token.
        start: one for each text: the places among its predicted tokens at which a task begins, after the first.
    """

    split: TokenSplit
    task: list[Tensor]
    start: list[list[int]]

    @classmethod
    def of_documents(cls, split: TokenSplit) -> Texts:
        """Texts of one task each."""
        task = [torch.full((n,), d) for n, d in zip(split.predicted.tolist(), split.task.tolist(), strict=True)]
        return cls(split, task, [[] for _ in task])


def composites(split: TokenSplit, tasks: int, *, segment: int, number: int, seed: int) -> Texts | None:
    """Texts of several tasks, each with the beginning of a document: its first ``segment`` tokens behind the start token.

    Args:
        split: the documents.
        tasks: number of tasks in a text.
        segment: tokens of each task.
        number: number of texts.
        seed: seed of the choice of tasks and documents.

    Returns:
        The texts; None if too few tasks have a document that is long enough.
    """
    whole = split.subset(split.first_pieces)
    long = {d: ((whole.task == d) & (whole.lengths > segment)).nonzero()[:, 0].tolist() for d in range(split.num_tasks)}
    usable = [d for d, documents in long.items() if documents]
    if len(usable) < tasks:
        return None
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for _ in range(number):
        chosen = [usable[n] for n in torch.randperm(len(usable), generator=generator)[:tasks].tolist()]
        documents = [long[d][int(torch.randint(len(long[d]), (), generator=generator))] for d in chosen]
        parts = [whole.document(n) for n in documents]
        rows.append([int(parts[0][0]), *(int(token) for part in parts for token in part[1 : segment + 1])])
        labels.append(torch.tensor(chosen).repeat_interleave(segment))
    made = TokenSplit.from_documents(rows, task=[0] * number, num_tasks=split.num_tasks, pad_token_id=split.pad_token_id)
    return Texts(made, labels, [[segment * n for n in range(1, tasks)]] * number)


def until_found(best: list[Tensor], texts: Texts) -> dict[str, float]:
    """How often the most probable task is right, and how soon after a switch.

        >>> split = TokenSplit.from_documents([[0, 5, 5, 5, 5]], task=[0], num_tasks=2)
        >>> texts = Texts(split, [torch.tensor([0, 0, 1, 1])], [[2]])
        >>> until_found([torch.tensor([0, 0, 0, 1])], texts)
        {'accuracy': 0.75, 'tokens_until_found': 1.0, 'found': 1.0}

    Args:
        best: one for each text, (tokens,) int64: the most probable task before each predicted token.
        texts: the texts.
    """
    right = [own == task for own, task in zip(best, texts.task, strict=True)]
    waits, found = [], []
    for of_text, starts in zip(right, texts.start, strict=True):
        for begin, end in pairwise([*starts, len(of_text)]):
            hits = of_text[begin:end].nonzero()[:, 0]
            found.append(len(hits) > 0)
            waits.append(int(hits[0]) if len(hits) else end - begin)
    accuracy = {"accuracy": float(torch.cat(right).double().mean())}
    if not waits:
        return accuracy
    return accuracy | {"tokens_until_found": sum(waits) / len(waits), "found": sum(found) / len(found)}
