"""The tokens of a split: all documents in one flat tensor.

Some tokens of a document are never predicted: its first token, a prompt, and in a chat what others than the assistant say.

>>> TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
TokenSplit(2 documents, 3 predicted tokens, 2 tasks)
>>> TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2, read=[2, 1])
TokenSplit(2 documents, 2 predicted tokens, 2 tasks)
>>> TokenSplit.from_documents([[0, 5, 6], [0, 7], [0, 8]], task=[1, 1, 0], num_tasks=2, document_index=[4, 4, 9])
TokenSplit(2 documents in 3 pieces, 4 predicted tokens, 2 tasks)

A document can also be a question, whose rows are its options, each behind the prompt:

>>> rows, right = [[0, 5, 6], [0, 5, 7], [0, 8, 6], [0, 8, 9]], [True, False, False, True]
>>> TokenSplit.from_documents(rows, task=[0, 0, 1, 1], num_tasks=2, read=[2] * 4, document_index=[0, 0, 1, 1], correct=right)
TokenSplit(2 questions with 4 options, 4 predicted tokens, 2 tasks)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bora_pyro.data.batch import IGNORED
from bora_pyro.data.batches import Batches
from bora_pyro.data.packing import Units, packed_rows
from bora_pyro.errors import InputError


class TokenSplit:
    """The tokens of one split: all documents in one flat tensor, with offsets.

    A row is a document, or a piece of a document that was split because it is long (``long_documents: split``). The model reads
    each row by itself, so what is said of documents here is true of pieces too. Where documents are counted, pieces of one
    document count once: ``num_documents``, ``documents_per_task``. The number of rows is ``len(split)``.

    With ``correct`` a document is a question, and its rows are its options. Then too a document counts once, and all its rows are
    in one batch.

    Args:
        tokens: (all tokens,) the token ids of the documents, in memory or in a memory-mapped file.
        lengths: (documents,) number of tokens of each document, at least 2, because the first is never predicted.
        task: (documents,) task index of each document.
        characters: (documents,) number of characters of the predicted tokens of each document.
        num_tasks: number of tasks, including those without documents in this split.
        pad_token_id: the padding token of a batch. The masks make its value irrelevant.
        observed: (all tokens,) bool, whether a token is predicted. None: all are, except the first of each document.
        offsets: (documents,) position in ``tokens`` of the first token of each document. ``tokens`` may then have further
            tokens. None: the documents follow one another.
        document_index: (rows,) a number for each row. Rows with the same number are pieces of one document, in order. None: each
            row is a document.
        correct: (rows,) bool, whether a row is the right option of its question. Rows with the same number in ``document_index``
            are then the options of one question, two or more, one of which is right. None: there are no questions.

    Attributes:
        predicted: (documents,) int64, number of predicted tokens of each document.

    Raises:
        InputError: a document has fewer than two tokens or none to predict, a task index is out of range, or sizes disagree.
    """

    def __init__(
        self,
        tokens: Tensor,
        lengths: Tensor,
        *,
        task: Tensor,
        characters: Tensor,
        num_tasks: int,
        pad_token_id: int = 0,
        observed: Tensor | None = None,
        offsets: Tensor | None = None,
        document_index: Tensor | None = None,
        correct: Tensor | None = None,
    ) -> None:
        if not len(lengths) == len(task) == len(characters) or (offsets is None and int(lengths.sum()) != len(tokens)):
            raise InputError(
                f"lengths ({len(lengths)}, sum {int(lengths.sum())}), task ({len(task)}), characters ({len(characters)}) and "
                f"tokens ({len(tokens)}) disagree; give one length, task and character count a document"
            )
        if len(lengths) and int(lengths.min()) < 2:
            raise InputError(
                f"document {int(lengths.argmin())} has {int(lengths.min())} tokens; give at least 2, the first is never predicted"
            )
        if len(task) and not 0 <= int(task.min()) <= int(task.max()) < num_tasks:
            raise InputError(
                f"task indices run from {int(task.min())} to {int(task.max())}; with {num_tasks} tasks use 0 to {num_tasks - 1}"
            )
        self.tokens = tokens.to(torch.int32)  # half the memory; every vocabulary fits
        self.lengths = lengths.to(torch.int64)
        self.offsets = self.lengths.cumsum(0) - self.lengths if offsets is None else offsets.to(torch.int64)
        self.observed = observed
        self.task = task.to(torch.int64)
        self.characters = characters.to(torch.int64)
        self.num_tasks = num_tasks
        self.pad_token_id = pad_token_id
        if len(self.offsets) != len(lengths) or (len(lengths) and int((self.offsets + self.lengths).max()) > len(tokens)):
            raise InputError(
                f"offsets ({len(self.offsets)}) and lengths ({len(lengths)}) disagree, or reach beyond the {len(tokens)} tokens"
            )
        if observed is not None and (len(observed) != len(tokens) or bool(observed[self.offsets].any())):
            raise InputError(
                f"observed has {len(observed)} entries for {len(tokens)} tokens, or says that the first of a document is "
                "predicted; give a bool a token, False for the first"
            )
        self.predicted = _predicted(observed, self.offsets, self.lengths)
        if len(lengths) and int(self.predicted.min()) < 1:
            raise InputError(f"document {int(self.predicted.argmin())} has no token to predict; leave it out")
        self.document_index = document_index
        if document_index is not None:
            if len(document_index) != len(lengths):
                raise InputError(f"document_index has {len(document_index)} entries for {len(lengths)} rows; give one a row")
            if bool((self.task[self.first_pieces][self.document_of] != self.task).any()):
                raise InputError("document_index gives rows of several tasks the same number; a document has one task")
        self.correct = correct
        if correct is not None:
            self._check_questions(correct)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Sequence[int]],
        *,
        task: Sequence[int],
        num_tasks: int,
        characters: Sequence[int] | None = None,
        pad_token_id: int = 0,
        read: Sequence[int] | None = None,
        document_index: Sequence[int] | None = None,
        correct: Sequence[bool] | None = None,
    ) -> TokenSplit:
        """Make a split from lists of token ids.

        Args:
            documents: token ids of each document.
            task: task index of each document.
            num_tasks: number of tasks.
            characters: number of characters of the predicted tokens of each document; default: one for each token.
            pad_token_id: the padding token of a batch.
            read: number of first tokens of each document that are not predicted; default: 1, the start.
            document_index: a number for each document; those with the same number are pieces of one. None: each is a whole one.
            correct: whether each document is the right option of a question, whose options have the same number in
                ``document_index``. None: there are no questions.
        """
        lengths = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        observed = None
        if read is not None:
            tokens_read = zip(lengths.tolist(), read, strict=True)
            observed = torch.tensor([n >= k for length, k in tokens_read for n in range(length)], dtype=torch.bool)
        of_prompt = torch.ones_like(lengths) if read is None else torch.tensor(read, dtype=torch.int64)
        return cls(
            torch.tensor(list(chain.from_iterable(documents)), dtype=torch.int64),
            lengths,
            task=torch.tensor(task, dtype=torch.int64),
            characters=lengths - of_prompt if characters is None else torch.tensor(characters, dtype=torch.int64),
            num_tasks=num_tasks,
            pad_token_id=pad_token_id,
            observed=observed,
            document_index=None if document_index is None else torch.tensor(document_index, dtype=torch.int64),
            correct=None if correct is None else torch.tensor(correct, dtype=torch.bool),
        )

    def _check_questions(self, correct: Tensor) -> None:
        if self.document_index is None or len(correct) != len(self):
            raise InputError(
                f"correct has {len(correct)} entries for {len(self)} rows, and document_index is "
                f"{'missing' if self.document_index is None else 'there'}; give both, one entry a row"
            )
        options, right = self.sum_by_document(torch.ones_like(self.lengths)), self.sum_by_document(correct.long())
        if len(options) and (int(options.min()) < 2 or bool((right != 1).any())):
            number = int(((options < 2) | (right != 1)).nonzero()[0])
            raise InputError(
                f"question {number} has {int(options[number])} options, {int(right[number])} of them right; give two options or "
                "more, one of them right"
            )

    def subset(self, documents: Tensor) -> TokenSplit:
        """The split of the documents at positions ``documents`` (n,), in that order. The tokens are not copied."""
        names = ["lengths", "task", "characters", "offsets"]
        names += [name for name in ("document_index", "correct") if getattr(self, name) is not None]
        return self.replace(**{name: getattr(self, name)[documents] for name in names})

    def replace(self, **changes: Any) -> TokenSplit:
        """The same split with some arguments changed. The tokens are not copied.

        >>> split = TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2)
        >>> split.replace(lengths=split.lengths.clamp(max=2)).document(0).tolist()
        [0, 5]
        """
        names = ["tokens", "lengths", "task", "characters", "num_tasks", "pad_token_id", "observed", "offsets"]
        names += ["document_index", "correct"]
        return TokenSplit(**{name: getattr(self, name) for name in names} | changes)

    @property
    def num_documents(self) -> int:
        """Number of documents. The pieces of a document, or the options of a question, count once; ``len(split)`` counts rows."""
        return len(self.first_pieces)

    @cached_property
    def document_of(self) -> Tensor:
        """(rows,) int64: the position of each row's document among all documents, from 0 to ``num_documents`` - 1."""
        if self.document_index is None:
            return torch.arange(len(self))
        return self.document_index.unique(return_inverse=True)[1]

    @cached_property
    def first_pieces(self) -> Tensor:
        """(documents,) int64: the position of the first row of each document. ``subset`` of them cuts every document."""
        rows = torch.arange(len(self))
        if self.document_index is None or not len(self):
            return rows
        return rows.new_zeros(int(self.document_of.max()) + 1).scatter_reduce(
            0, self.document_of, rows, "amin", include_self=False
        )

    @cached_property
    def piece_share(self) -> Tensor | None:
        """(rows,) float64: the share of each row in the predicted tokens of its document; None if each row is a document.

        The shares of the pieces of a document add up to 1, so that a sum of shares counts documents.
        """
        if self.document_index is None:
            return None
        return self.predicted / self.sum_by_document(self.predicted)[self.document_of].double()

    def sum_by_document(self, values: Tensor) -> Tensor:
        """Sum the values of the pieces of each document: (rows, ...) to (documents, ...), in the order of ``first_pieces``."""
        if self.document_index is None:
            return values
        return values.new_zeros((self.num_documents, *values.shape[1:])).index_add_(0, self.document_of, values)

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.predicted.sum())

    @property
    def documents_per_task(self) -> list[int]:
        """N_d, the number of documents of each task. Pieces of one document count once."""
        return torch.bincount(self.task[self.first_pieces], minlength=self.num_tasks).tolist()

    @property
    def tokens_per_task(self) -> Tensor:
        """(D,) int64: number of tokens of each task, predicted or not. The work for a task grows with it."""
        return torch.zeros(self.num_tasks, dtype=torch.int64).index_add_(0, self.task, self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        documents = f"{self.num_documents} documents" + f" in {len(self)} pieces" * (self.num_documents < len(self))
        if self.correct is not None:
            documents = f"{self.num_documents} questions with {len(self)} options"
        return f"TokenSplit({documents}, {self.num_tokens} predicted tokens, {self.num_tasks} tasks)"

    def document(self, index: int) -> Tensor:
        """(tokens,) int64, the token ids of one document."""
        start = int(self.offsets[index])
        return self.tokens[start : start + int(self.lengths[index])].to(torch.int64)

    def labels(self, index: int) -> Tensor:
        """(tokens,) int64, the token ids of one document, with -100 at tokens that are not predicted."""
        start, ids = int(self.offsets[index]), self.document(index)
        read = torch.arange(len(ids)) == 0 if self.observed is None else ~self.observed[start : start + len(ids)]
        return ids.masked_fill(read, IGNORED)

    def batches(self, *, token_budget: int = 4096, seed: int | None = None, documents: Tensor | None = None) -> Batches:
        """The batches of one epoch. Every document is in exactly one batch. All options of a question are in the same batch.

        A batch holds documents of similar length, so it has little padding. Batches differ in their number of documents. The
        log-likelihood of a batch must therefore be scaled by the number M of batches, and not by N / B (the documents of the
        split over the documents of the batch). Let x_n be the log-likelihood of document n. For a batch b drawn uniformly,

            E[M sum_{n in b} x_n] = (1/M) sum_b M sum_{n in b} x_n = sum_n x_n,

        exactly, because every n is in one b. With N / B the mean is (1/M) sum_b N/B_b sum_{n in b} x_n, which gives too much
        weight to the documents of small batches, that is, to long documents.

        Args:
            token_budget: the largest number of tokens of a batch, padding included (rows times longest row). A single longer
                document, or a larger question, is a batch of its own.
            seed: seed of the shuffle of documents and batches; use another one for each epoch. None does not shuffle but sorts
                by length.
            documents: (n,) positions of the rows to use; default: all.

        Returns:
            A sequence that builds each `Batch` when it is read.

        Raises:
            InputError: the budget is not positive, or ``documents`` has some options of a question and not the others.
        """
        if token_budget < 1:
            raise InputError(f"token_budget is {token_budget}; give the tokens of one batch, for instance 4096")
        rows = np.arange(len(self)) if documents is None else documents.numpy()
        document_of = None if self.correct is None else self.document_of.numpy()
        units = Units.of(rows, self.lengths.numpy(), document_of=document_of)
        if document_of is not None and len(rows) != np.isin(document_of, document_of[rows]).sum():
            raise InputError("documents has some options of a question and not the others; give all rows of a question, or none")
        return Batches(self, packed_rows(units, token_budget, seed=seed))


def _predicted(observed: Tensor | None, offsets: Tensor, lengths: Tensor) -> Tensor:
    """(documents,) number of predicted tokens of each document."""
    if observed is None or not len(lengths):
        return lengths - 1
    # each place only once, because a document may occur several times
    places, which = torch.stack([offsets, offsets + lengths], 1).unique(dim=0, return_inverse=True)
    bounds = places.flatten().numpy()
    # reduceat sums from each bound to the next, and from the last one to the end; a bound at the end itself is not allowed
    bounds = bounds[:-1] if bounds[-1] == len(observed) else bounds
    return torch.from_numpy(np.add.reduceat(observed.numpy(), bounds, dtype=np.int64)[::2])[which]
