"""Token batches of unequal documents, with the one scale that keeps the likelihood unbiased.

>>> from bora_pyro.data.token_split import TokenSplit
>>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
>>> [batch] = split.batches(token_budget=8)
>>> batch.labels.tolist(), batch.task.tolist(), batch.scale
([[-100, 7, -100], [-100, 5, 6]], [0, 1], 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from bora_pyro.data.task_draw import TaskDraw
from bora_pyro.token_loss import IGNORED

if TYPE_CHECKING:
    from bora_pyro.data.token_split import TokenSplit


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
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task: Tensor
    index: Tensor
    scale: float
    tasks: TaskDraw | None = None
    share: float = 1.0

    @property
    def row(self) -> Tensor:
        """(rows,) int64: where each document's task stands among ``tasks``, and so in the weights of the batch."""
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
        )


class Batches(Sequence[Batch]):
    """The batches of one epoch, built one by one as they are read."""

    def __init__(self, split: TokenSplit, members: list[np.ndarray]) -> None:
        self._split = split
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    @property
    def tasks(self) -> list[Tensor]:
        """The tasks of each batch's documents, rising, without building it."""
        return [self._split.task[torch.from_numpy(members)].unique() for members in self._members]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of each batch, padding included, without building it."""
        return [(len(members), int(self._split.lengths[torch.from_numpy(members)].max())) for members in self._members]

    @overload
    def __getitem__(self, position: int) -> Batch: ...
    @overload
    def __getitem__(self, position: slice) -> list[Batch]: ...
    def __getitem__(self, position: int | slice) -> Batch | list[Batch]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        split = self._split
        index = torch.from_numpy(self._members[position])
        lengths = split.lengths[index]  # (rows,)
        columns = torch.arange(int(lengths.max()))  # (tokens,)
        mask = columns < lengths[:, None]  # (rows, tokens)
        # Padding reads a document's last token, so that no index leaves the tensor, and is then overwritten.
        where = split.offsets[index][:, None] + columns.minimum(lengths[:, None] - 1)
        input_ids = split.tokens[where].to(torch.int64).masked_fill(~mask, split.pad_token_id)
        read = columns == 0 if split.observed is None else ~split.observed[where]
        labels = input_ids.masked_fill(~mask | read, IGNORED)
        return Batch(
            input_ids=input_ids,
            attention_mask=mask.to(torch.int64),
            labels=labels,
            task=split.task[index],
            index=index,
            scale=float(len(self)),
        )


def pack(lengths: np.ndarray, order: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Cut `order` into runs with rows x longest <= token_budget."""
    members: list[np.ndarray] = []
    start = longest = 0
    for position, length in enumerate(lengths[order]):
        widened = max(longest, int(length))
        if position > start and (position - start + 1) * widened > token_budget:
            members.append(order[start:position].copy())
            start, widened = position, int(length)
        longest = widened
    if len(order):
        members.append(order[start:].copy())
    return members
