"""The validation documents that teach τ, and those that choose the epoch: all of them, or two halves.

If the same documents do both, their perplexity at the best epoch is a little too low, because τ was learned from them.

>>> from bora_pyro.data import TokenSplit
>>> split = TokenSplit.from_documents([[0, 5]] * 5, task=[1, 0, 1, 0, 2], num_tasks=3)
>>> folds = Folds.of(split, "half", learns_tau=True)
>>> folds.choosing, folds.teaching
(tensor([0, 1, 4]), tensor([2, 3]))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError
from bora_pyro.inference.options import HALF


@dataclass(frozen=True)
class Folds:
    """Positions of validation documents in their split, in ascending order; None: all documents.

    Attributes:
        choosing: the documents that choose the epoch.
        teaching: the documents that teach τ.
    """

    choosing: Tensor | None = None
    teaching: Tensor | None = None

    @classmethod
    def of(cls, split: TokenSplit, documents: str, *, learns_tau: bool) -> Folds:
        """The folds under the option ``tau_documents``.

        With ``half``, the documents in the order of their tasks go to the two folds in turn. So each task has about as many in
        one as in the other, and of the tasks with one document every other one teaches τ. The pieces of a long document stay
        together.

        Raises:
            InputError: ``half`` without a τ that is learned, or with fewer than two validation documents.
        """
        if documents != HALF:
            return cls()
        if not learns_tau:
            raise InputError("tau_documents is half, but no tau is learned in this fit; leave tau_documents out")
        if split.num_documents < 2:
            raise InputError(
                f"tau_documents is half, and there is {split.num_documents} validation document; give more documents, or all"
            )
        order = split.task[split.first_pieces].argsort(stable=True)
        teaches = torch.zeros(split.num_documents, dtype=torch.bool)
        teaches[order[1::2]] = True
        of_rows = teaches[split.document_of]
        return cls((~of_rows).nonzero()[:, 0], of_rows.nonzero()[:, 0])

    def note(self, split: TokenSplit) -> str | None:
        """How many documents each fold has, as a note; None if all documents do both."""
        if self.choosing is None or self.teaching is None:
            return None
        choosing, teaching = split.subset(self.choosing), split.subset(self.teaching)
        counts = zip(choosing.documents_per_task, teaching.documents_per_task, strict=True)
        in_one = sum((first > 0) != (second > 0) for first, second in counts)
        text = f"{teaching.num_documents} validation documents teach tau, and {choosing.num_documents} others choose the epoch"
        return text + (f"; {in_one} task{'s have' if in_one > 1 else ' has'} documents in one of both only" if in_one else "")
