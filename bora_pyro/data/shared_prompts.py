"""Rows that share their prompts: the options of a question one after the other in one row. Each sees its prompt and itself.

A question with K options of o tokens behind a prompt of P tokens takes P + K o tokens instead of K (P + o). What the tokens of an
option see is the same, so the result is the same up to rounding.

>>> from bora_pyro.data.token_split import TokenSplit
>>> more = {"read": [3, 3], "document_index": [0, 0], "correct": [True, False]}
>>> split = TokenSplit.from_documents([[0, 4, 5, 6], [0, 4, 5, 7, 8]], task=[1, 1], num_tasks=2, **more)
>>> shared = SharedPrompts.of(split.batches()[0])
>>> shared.batch.input_ids.tolist(), shared.batch.layout["position_ids"].tolist()
([[0, 4, 5, 6, 7, 8]], [[0, 1, 2, 3, 3, 4]])
>>> shared.unpacked(shared.batch.input_ids[..., None])[..., 0].tolist()
[[0, 4, 5, 6, 0], [0, 4, 5, 7, 8]]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED, Batch


@dataclass(frozen=True)
class SharedPrompts:
    """A batch of questions with one row each, and the way back to a row for each option.

    Attributes:
        batch: the batch with a row for each question. Its ``layout`` says where each token is and what it sees.
        question: (rows,) int64, the question of each option.
        place: (rows, tokens) int64, the position of each token of an option's own row in the row of its question.
    """

    batch: Batch
    question: Tensor
    place: Tensor

    @classmethod
    def of(cls, batch: Batch, *, longest: int = sys.maxsize) -> SharedPrompts | None:
        """The batch with shared prompts; None if that has no fewer tokens, padding included, or a row longer than ``longest``."""
        question, first = batch.question, batch.first_rows
        assert question is not None
        ids, tokens = batch.input_ids, torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        lengths = batch.attention_mask.sum(-1)
        # what all options of a question have in common and do not predict
        same = (ids == ids[first][question]) & (batch.labels == IGNORED) & (batch.attention_mask > 0)
        alike = same.long().cumprod(-1).sum(-1)
        prompt = alike.new_full((len(first),), ids.shape[1]).scatter_reduce(0, question, alike, "amin")  # (questions,)
        own = lengths - prompt[question]  # tokens of each option
        before = own.cumsum(0) - own
        start = prompt[question] + before - before[first][question]  # of each option in the row of its question
        inside = tokens < prompt[question][:, None]
        place = torch.where(inside, tokens, start[:, None] + tokens - prompt[question][:, None])
        held = tokens < lengths[:, None]
        place = place.where(held, 0)
        width = int((start + own).max())
        if len(first) * width >= ids.numel() or width > longest:
            return None
        rows = question[:, None].expand_as(place)[held], place[held]
        padding = ids[0, 0].new_zeros(len(first), width)
        packed = padding.index_put(rows, ids[held])
        # 0: the prompt; 1, 2, ...: the options
        number = torch.arange(len(question), device=ids.device) - first[question] + 1
        option = padding.index_put(rows, torch.where(inside, 0, number[:, None])[held])
        position = padding.index_put(rows, tokens.expand_as(place)[held])
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        seen = causal & ((option[:, None, :] == 0) | (option[:, None, :] == option[:, :, None]))  # (questions, width, width)
        layout = {"position_ids": position, "attention_mask": seen[:, None]}
        shared = replace(
            batch, input_ids=packed, attention_mask=torch.ones_like(packed), labels=torch.full_like(packed, IGNORED),
            task=batch.task[first], index=batch.index[first], piece_share=None, question=None, correct=None, layout=layout,
        )  # fmt: skip
        return cls(shared, question, place)

    def unpacked(self, values: Tensor) -> Tensor:
        """(rows, tokens, width): values of the tokens in rows of their own, from (questions, tokens, width) of shared rows."""
        return values[self.question[:, None], self.place]
