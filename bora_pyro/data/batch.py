"""A batch of documents of several tasks, and the subset of tasks in it.

>>> draw = TaskDraw(torch.tensor([3, 8]), torch.tensor([10.0, 5.0]))
>>> draw.positions(torch.tensor([8, 3, 8]))
tensor([1, 0, 1])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

#: The label of a token that is not predicted; `torch.nn.functional.cross_entropy` has the same default.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Some documents of a split, right-padded.

    Attributes:
        input_ids: (rows, tokens) int64.
        attention_mask: (rows, tokens) int64, 1 at tokens and 0 at padding.
        labels: (rows, tokens) int64, `input_ids` with -100 at padding, at tokens that are not predicted (such as a prompt), and
            at position 0. Labels are not shifted: the logits at position i predict the label at i + 1.
        task: (rows,) int64, task index of each document.
        index: (rows,) int64, position of each document in its split.
        scale: number of batches in the epoch. ``scale`` times the log-likelihood of the batch is an unbiased estimate of the
            log-likelihood of the split (see `TokenSplit.batches`).
        tasks: the subset of tasks that the batch updates; None means all tasks of the model.
        share: the factor of the batch's loss. It is 1/k if k batches make one step.
        own_rows: whether the weights have one row for each document of the batch, in the order of ``first_rows``, instead of one
            for each task.
        piece_share: (rows,) float32, for pieces of long documents: the share of each row in the predicted tokens of its document.
            None: each row is a whole document.
        question: (rows,) int64, for questions with options: the number of each row's question in the batch, in ascending order
            from 0. Its rows are the options, each behind the prompt. None: there are no questions.
        correct: (rows,) bool, for questions: whether each row is the right option.
        layout: further arguments of the language model for rows that share prompts: the ``position_ids``, (rows, tokens), and an
            ``attention_mask``, (rows, 1, tokens, tokens) bool. None: each row is one text.
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
    piece_share: Tensor | None = None
    question: Tensor | None = None
    correct: Tensor | None = None
    layout: Mapping[str, Tensor] | None = None

    @property
    def first_rows(self) -> Tensor:
        """(documents,) int64: position of the first row of each document. A question is a document, a piece of a long one too."""
        if self.question is None:
            return torch.arange(len(self.task), device=self.task.device)
        return self.question.diff(prepend=self.question.new_tensor([-1])).nonzero()[:, 0]

    @property
    def row(self) -> Tensor:
        """(rows,) int64: position of each document's row in the weights of the batch.

        This is the position of its task in ``tasks``, or with ``own_rows`` its position in the batch.
        """
        if self.own_rows:
            return torch.arange(len(self.task), device=self.task.device) if self.question is None else self.question
        return self.task if self.tasks is None else self.tasks.positions(self.task)

    @property
    def predicted(self) -> Tensor:
        """(rows,) int64: number of predicted tokens of each document."""
        return (self.labels[:, 1:] != IGNORED).sum(-1)

    def parts(self, tokens: int) -> list[Self]:
        """Split the batch into k parts of like size, with about ``tokens`` tokens or fewer each, padding included.

        Each part has ``share / k`` and ``scale * k``, so the losses of the parts add up to the loss of the batch, and the prior
        counts once. A question stays whole.
        """
        rows, longest = self.input_ids.shape
        bounds = [*self.first_rows.tolist(), rows]
        k = min(len(bounds) - 1, -(-rows * longest // max(tokens, 1)))
        if k == 1:
            return [self]
        parts = []
        for index in torch.arange(len(bounds) - 1).tensor_split(k):
            of_part = slice(bounds[int(index[0])], bounds[int(index[-1]) + 1])
            width = int(self.attention_mask[of_part].sum(-1).max())
            part = {name: getattr(self, name)[of_part, :width] for name in ("input_ids", "attention_mask", "labels")}
            part |= {name: getattr(self, name)[of_part] for name in ("task", "index")}
            part |= {} if self.piece_share is None else {"piece_share": self.piece_share[of_part]}
            if self.question is not None and self.correct is not None:
                part |= {"question": self.question[of_part] - self.question[of_part.start], "correct": self.correct[of_part]}
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
            piece_share=None if self.piece_share is None else self.piece_share.to(device),
            question=None if self.question is None else self.question.to(device),
            correct=None if self.correct is None else self.correct.to(device),
            layout=None if self.layout is None else {name: value.to(device) for name, value in self.layout.items()},
        )


@dataclass(frozen=True)
class TaskDraw:
    """A subset of the tasks, with a weight for the prior of each task.

    Attributes:
        index: (tasks,) int64, the task indices in ascending order.
        weight: (tasks,) float32, the factor of each task's log-prior. If an epoch has S steps and task d is in m_d of them, the
            weight S/m_d makes the average over the epoch equal to the log-prior of all tasks.
        rows_loaded: whether the guide's tensors have rows for these tasks only, and not for every task of the model.
    """

    index: Tensor
    weight: Tensor
    rows_loaded: bool = False

    def positions(self, task: Tensor) -> Tensor:
        """(rows,) int64: position of each task in ``index``. All tasks in ``task`` (rows,) must be there."""
        return torch.searchsorted(self.index, task)

    def widened(self, index: Tensor) -> TaskDraw:
        """Extend the subset to the tasks ``index``, in ascending order. The added tasks have weight 0."""
        weight = self.weight.new_zeros(len(index))
        weight[torch.searchsorted(index, self.index)] = self.weight
        return replace(self, index=index, weight=weight)

    def to(self, device: torch.device | str) -> TaskDraw:
        """The same on another device."""
        return replace(self, index=self.index.to(device), weight=self.weight.to(device))


def loaded_tasks(index: Tensor) -> TaskDraw:
    """The tasks ``index`` with weight 1 and with their rows loaded, for reading their adapters rather than training them."""
    return TaskDraw(index, torch.ones(len(index), device=index.device), rows_loaded=True)
