"""One mixed batch of documents, and the tasks that it speaks of.

>>> draw = TaskDraw(torch.tensor([3, 8]), torch.tensor([10.0, 5.0]))
>>> draw.positions(torch.tensor([8, 3, 8]))
tensor([1, 0, 1])
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: What of the labels is no observation; `torch.nn.functional.cross_entropy` has the same default.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Some documents of a split, right-padded.

    Attributes:
        input_ids: (rows, tokens) int64.
        attention_mask: (rows, tokens) int64, 1 at tokens and 0 at padding.
        labels: (rows, tokens) int64, `input_ids` with -100 at padding, at tokens that are only read, and at position 0, which
            nothing predicts. Not shifted: the logits at position i predict the label at i + 1.
        task: (rows,) int64, index of the task.
        index: (rows,) int64, position of the document in its split.
        scale: number of batches in the epoch; scale times the log-likelihood of the batch is an unbiased estimate of the
            split's (see `TokenSplit.batches`).
        tasks: the tasks that the batch speaks of; None: all tasks of the model.
        share: what its loss is multiplied with where k batches make one step: 1/k.
        own_rows: whether each document has a row of weights of its own, in the order of the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task: Tensor
    index: Tensor
    scale: float
    tasks: TaskDraw | None = None
    share: float = 1.0
    own_rows: bool = False

    @property
    def row(self) -> Tensor:
        """(rows,) int64: where each document's task stands among ``tasks``, and so in the weights of the batch."""
        if self.own_rows:
            return torch.arange(len(self.task), device=self.task.device)
        return self.task if self.tasks is None else self.tasks.positions(self.task)

    @property
    def predicted(self) -> Tensor:
        """(rows,) int64: how many tokens of each document are predicted."""
        return (self.labels[:, 1:] != IGNORED).sum(-1)

    def parts(self, tokens: int) -> list[Batch]:
        """The batch in as many parts as keep each within so many tokens, padding included; their losses add up to its own.

        Each of k parts has a k-th of the share and counts its documents k times, so that the prior counts once.
        """
        rows, longest = self.input_ids.shape
        k = min(rows, -(-rows * longest // max(tokens, 1)))
        if k == 1:
            return [self]
        parts = []
        for index in torch.arange(rows).tensor_split(k):
            of_part = slice(int(index[0]), int(index[-1]) + 1)
            width = int(self.attention_mask[of_part].sum(-1).max())
            part = {name: getattr(self, name)[of_part, :width] for name in ("input_ids", "attention_mask", "labels")}
            part |= {name: getattr(self, name)[of_part] for name in ("task", "index")}
            parts.append(replace(self, **part, scale=self.scale * k, share=self.share / k))
        return parts

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            task=self.task.to(device),
            index=self.index.to(device),
            scale=self.scale,
            tasks=None if self.tasks is None else self.tasks.to(device),
            share=self.share,
            own_rows=self.own_rows,
        )


@dataclass(frozen=True)
class TaskDraw:
    """Some of the tasks, and how often each one's prior counts for them.

    Attributes:
        index: (tasks,) int64, rising: the tasks.
        weight: (tasks,) float32: the factor of each one's log-prior. With S steps in an epoch, m_d of them with task d, S/m_d
            makes their average the log-prior of all tasks.
        rows_loaded: whether the guide's tensors have a row for each of these tasks alone, and not one for each task of the model.
    """

    index: Tensor
    weight: Tensor
    rows_loaded: bool = False

    def positions(self, task: Tensor) -> Tensor:
        """Where the tasks ``task`` (rows,) stand in ``index``; they must be there."""
        return torch.searchsorted(self.index, task)

    def widened(self, index: Tensor) -> TaskDraw:
        """The same among more tasks, ``index``, rising; those that were not drawn weigh nothing."""
        weight = self.weight.new_zeros(len(index))
        weight[torch.searchsorted(index, self.index)] = self.weight
        return replace(self, index=index, weight=weight)

    def to(self, device: torch.device | str) -> TaskDraw:
        """The same on another device."""
        return replace(self, index=self.index.to(device), weight=self.weight.to(device))


def loaded_tasks(index: Tensor) -> TaskDraw:
    """The tasks ``index`` as held rows, each with weight 1: to look at their adapters, not to train them."""
    return TaskDraw(index, torch.ones(len(index), device=index.device), rows_loaded=True)
