"""The batches of one epoch, built one at a time.

>>> from bora_pyro.data.token_split import TokenSplit
>>> batches = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2).batches(token_budget=3)
>>> batches.shapes, batches[0].input_ids.tolist()
([(1, 2), (1, 3)], [[0, 7]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED, Batch

if TYPE_CHECKING:
    from bora_pyro.data.token_split import TokenSplit


class Batches(Sequence[Batch]):
    """The batches of one epoch. Each is built when it is read.

    Args:
        split: the documents.
        members: the rows of each batch.
    """

    def __init__(self, split: TokenSplit, members: list[np.ndarray]) -> None:
        self._split = split
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    @property
    def tasks(self) -> list[Tensor]:
        """The task indices of each batch, in ascending order, without building the batches."""
        return [self._split.task[torch.from_numpy(members)].unique() for members in self._members]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, tokens) of each batch, padding included, without building the batches."""
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
        # At padding, the index is that of the document's last token, so that it is valid; the value is then overwritten.
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
            piece_share=None if split.piece_share is None else split.piece_share[index].float(),
            question=None if split.correct is None else _numbered(split.document_of[index]),
            correct=None if split.correct is None else split.correct[index],
        )


def _numbered(document: Tensor) -> Tensor:
    """(rows,) the position of each row's document in the batch, for rows of documents one after the other."""
    return document.unique_consecutive(return_inverse=True)[1]
