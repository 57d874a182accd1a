"""The steps of an epoch: which documents each one looks at, and of which tasks it speaks.

>>> from bora_pyro.data import TokenSplit
>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7, 8], [0, 9]], task=[1, 0, 1], num_tasks=4)
>>> steps = EpochSteps(split, token_budget=3, partition=[torch.arange(4)])
>>> [[batch.tasks.index.tolist() for batch in step] for step in steps]
[[[1, 2]], [[1, 3]], [[0]]]
>>> steps[0][0].tasks.weight  # task 1 has documents in two steps of three
tensor([1.5000, 3.0000])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, overload

import torch
from torch import Tensor

from bora_pyro.data.batch import Batch, TaskDraw
from bora_pyro.data.token_split import Batches, TokenSplit


class StepsOfEpoch(Protocol):
    """Gives the steps of an epoch: a sequence of steps, each a list of batches whose losses are added up.

    The number of steps is the same in every epoch, and the steps depend on the number of the epoch alone, so that a fit that is
    resumed takes the same ones. A batch's ``scale`` makes its observed sites an unbiased estimate of those of the epoch.
    """

    def __call__(self, epoch: int) -> Sequence[list[Batch]]:
        """The steps of an epoch; epochs count from 0."""


class EpochSteps(Sequence[list[Batch]]):
    """Every document in exactly one step; a step is a list of batches, whose losses times their shares are added up.

    With S steps, each batch of step s counts S times, so that a step drawn uniformly has the whole split's log-likelihood as
    its mean: (1/S) Σ_s S Σ_{n in s} x_n = Σ_n x_n. Where tasks are drawn too, task d is one of those of m_d batches, the ones
    with documents of it, and its log-prior counts S/m_d times in each, whose mean over the steps is the log-prior once. Tasks
    without documents are dealt out over the batches, one after another; were they to outnumber the others there, it is a part
    of them that the seed chooses, counting for all, so that their mean over epochs is exact. Each of the k batches of a step
    has the share 1/k, so that what all tasks have in common, Θ's KL divergence, counts once; scales and weights are k times
    as large.

    Args:
        split: the training documents.
        token_budget: tokens of a batch, padding included.
        accumulate: batches of one share in a step.
        seed: of the order of the documents; None: by length.
        partition: the tasks of each process, which packs its own documents; together all tasks. None: one share of all tasks,
            and every batch speaks of all of them.
        mine: the shares whose batches are wanted; default: all, one process that does the work of several.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        token_budget: int,
        accumulate: int = 1,
        seed: int | None = None,
        partition: Sequence[Tensor] | None = None,
        mine: Sequence[int] | None = None,
    ) -> None:
        self._accumulate = accumulate
        if partition is None:
            parts = [split.batches(token_budget=token_budget, seed=seed)]
        else:
            of_share = [torch.isin(split.task, share).nonzero()[:, 0] for share in partition]
            parts = [split.batches(token_budget=token_budget, seed=seed, documents=documents) for documents in of_share]
        self._generator = torch.Generator().manual_seed(seed or 0)
        self._steps = max(-(-len(part) // accumulate) for part in parts)
        chosen = range(len(parts)) if mine is None else mine
        self._parts = [parts[number] for number in chosen]
        self._lengths = [len(part) for part in parts]
        self._draws = None if partition is None else [self._draw(parts[number], partition[number]) for number in chosen]

    def _draw(self, batches: Batches, share: Tensor) -> list[TaskDraw]:
        """The tasks of each batch of one share, and their weights."""
        tasks = batches.tasks
        times = torch.zeros(int(share.max()) + 1)
        for of_batch in tasks:
            times[of_batch] += 1
        without = share[times[share] == 0]
        chosen = without[torch.randperm(len(without), generator=self._generator)[: int(times.sum())]]
        # one of k that stands for n counts n/k times
        times[chosen] = len(chosen) / max(len(without), 1)
        draws = []
        for number, of_batch in enumerate(tasks):
            index = torch.cat([of_batch, chosen[number :: len(tasks)]]).sort().values
            draws.append(TaskDraw(index, self._steps / times[index]))
        return draws

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, position: int) -> list[Batch]: ...
    @overload
    def __getitem__(self, position: slice) -> list[list[Batch]]: ...
    def __getitem__(self, position: int | slice) -> list[Batch] | list[list[Batch]]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        first = position % len(self) * self._accumulate
        k = sum(max(0, min(self._accumulate, length - first)) for length in self._lengths)
        step = []
        for number, part in enumerate(self._parts):
            for place in range(first, min(first + self._accumulate, len(part))):
                draw = None if self._draws is None else self._draws[number][place]
                draw = draw and replace(draw, weight=draw.weight * k)
                step.append(replace(part[place], scale=float(len(self) * k), tasks=draw, share=1 / k))
        return step
