"""The steps of an epoch: the documents of each step, and the tasks that it draws.

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
    """A function that returns the steps of an epoch. A step is a list of batches, whose losses are added up.

    The number of steps is the same in every epoch. The steps depend only on the number of the epoch, so that a resumed fit takes
    the same steps. The observed log-density of a batch, times its ``scale``, is an unbiased estimate of that of the epoch.
    """

    def __call__(self, epoch: int) -> Sequence[list[Batch]]:
        """The steps of an epoch; epochs count from 0."""


class EpochSteps(Sequence[list[Batch]]):
    """Steps in which every document occurs exactly once. A step is a list of batches; their losses times ``share`` are added up.

    With S steps, the scale of each batch is S. The mean over all steps is then the log-likelihood of the whole split:
    (1/S) Σ_s S Σ_{n in s} x_n = Σ_n x_n.

    If a step draws tasks, a batch draws the tasks of its documents. A task d that m_d batches draw has a log-prior of weight
    S/m_d in each of them. The mean over all steps is then the log-prior of d.

    Tasks without documents are distributed over the batches in turn. An epoch draws at most as many of them as it draws tasks
    with documents, counted once per batch. If there are more, the seed chooses a part of them, with a larger weight that
    represents all of them. The mean over epochs is then exact.

    If a step has k batches, each has ``share`` 1/k, so that the KL divergence of Θ, which all tasks have in common, counts once
    per step. Scales and weights are multiplied by k.

    Args:
        split: the training documents.
        token_budget: tokens of a batch, padding included.
        accumulate: batches per step, for each part of the partition.
        seed: seed of the order of the documents; None: ordered by length.
        partition: the tasks of each process, together all tasks. Each process packs its own documents into batches. None: one
            part, and every batch has all tasks.
        mine: numbers of the parts whose batches are returned; default: all parts, as one process that does the work of several.
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
            by_part = [torch.isin(split.task, tasks).nonzero()[:, 0] for tasks in partition]
            parts = [split.batches(token_budget=token_budget, seed=seed, documents=documents) for documents in by_part]
        self._generator = torch.Generator().manual_seed(seed or 0)
        self._steps = max(-(-len(part) // accumulate) for part in parts)
        chosen = range(len(parts)) if mine is None else mine
        self._parts = [parts[number] for number in chosen]
        self._lengths = [len(part) for part in parts]
        self._draws = None if partition is None else [self._draw(parts[number], partition[number]) for number in chosen]

    def _draw(self, batches: Batches, part: Tensor) -> list[TaskDraw]:
        """The tasks of each batch of one part of the partition, and their weights; ``part`` are the tasks, (tasks,)."""
        tasks = batches.tasks
        times = torch.zeros(int(part.max()) + 1)
        for batch_tasks in tasks:
            times[batch_tasks] += 1
        without = part[times[part] == 0]
        chosen = without[torch.randperm(len(without), generator=self._generator)[: int(times.sum())]]
        # k chosen tasks represent n tasks, so each has the weight n/k
        times[chosen] = len(chosen) / max(len(without), 1)
        draws = []
        for number, batch_tasks in enumerate(tasks):
            index = torch.cat([batch_tasks, chosen[number :: len(tasks)]]).sort().values
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
