"""A digest of tokenised documents. It is equal if and only if a fit sees the same tokens, in the same order, of the same tasks.

>>> from bora_pyro.data.token_split import TokenSplit
>>> one, other = (TokenSplit.from_documents([[0, 5, word], [0, 7]], task=[1, 0], num_tasks=2) for word in (6, 8))
>>> documents_digest(["ada", "bob"], [one]) == documents_digest(["ada", "bob"], [one.subset(torch.tensor([0, 1]))])
True
>>> documents_digest(["ada", "bob"], [one]) == documents_digest(["ada", "bob"], [other])
False
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bora_pyro.data.token_split import TokenSplit

#: The number of tokens that are hashed at a time, and held in memory if the split lies in a file.
CHUNK = 2**20


def documents_digest(
    tasks: Sequence[str],
    splits: Sequence[TokenSplit],
    weights: Tensor | None = None,
    *,
    task_groups: Sequence[str] | None = None,
) -> str:
    """The SHA-256 of everything that a fit sees of the documents, as 64 hexadecimal digits.

    It does not depend on how the documents are stored: with or without gaps between them, in memory or in a file.

    Args:
        tasks: the task names, in the order of their indices.
        splits: the splits. Of each document, its length, its task, its tokens and which tokens are predicted are hashed; of
            options also their question, and which one is right.
        weights: (D,) factors of the tasks' log-likelihoods, or None.
        task_groups: the name of each task's group, or None.
    """
    whole = hashlib.sha256(json.dumps([*tasks]).encode())
    for split in splits:
        tokens, observed = hashlib.sha256(), hashlib.sha256()
        for part, predicted in _chunks(split):
            tokens.update(_bytes(part))
            observed.update(_bytes(predicted))
        for about in (split.lengths, split.task):
            whole.update(hashlib.sha256(_bytes(about)).digest())
        whole.update(tokens.digest() + observed.digest())
        for about in (split.document_of, split.correct) if split.correct is not None else ():
            whole.update(hashlib.sha256(_bytes(about)).digest())
    if weights is not None:
        whole.update(_bytes(weights.double()))
    if task_groups is not None:
        whole.update(json.dumps(["task groups", *task_groups]).encode())
    return whole.hexdigest()


def document_checksums(split: TokenSplit) -> np.ndarray:
    """A CRC-32 checksum of each document, to tell different documents apart: (documents,). That of pieces is their sum."""
    sums = (zlib.crc32(split.document(n).numpy().tobytes()) for n in range(len(split)))
    if split.observed is not None:  # documents differ too if the same tokens have other labels
        sums = (zlib.crc32(split.labels(n).numpy().tobytes(), checksum) for n, checksum in enumerate(sums))
    if split.correct is not None:  # and questions, if another option is right
        sums = (
            zlib.crc32(b"right" if right else b"", checksum) for right, checksum in zip(split.correct.tolist(), sums, strict=True)
        )
    return split.sum_by_document(torch.from_numpy(np.fromiter(sums, dtype=np.int64, count=len(split)))).numpy()


def _chunks(split: TokenSplit) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of a few whole documents at a time, and whether each token is predicted; (tokens,) each."""
    ends, start, before = split.lengths.cumsum(0), 0, 0
    while start < len(split):
        stop = max(start + 1, int(torch.searchsorted(ends, before + CHUNK, right=True)))
        offsets, lengths = split.offsets[start:stop], split.lengths[start:stop]
        first = lengths.cumsum(0) - lengths
        place: slice | Tensor = slice(int(offsets[0]), int(offsets[-1] + lengths[-1]))
        if not torch.equal(offsets - offsets[0], first):
            place = torch.repeat_interleave(offsets - first, lengths) + torch.arange(int(lengths.sum()))
        if split.observed is None:
            predicted = torch.ones(int(lengths.sum()), dtype=torch.bool)
            predicted[first] = False
        else:
            predicted = split.observed[place]
        yield split.tokens[place], predicted
        start, before = stop, int(ends[stop - 1])


def _bytes(value: Tensor) -> memoryview:
    if not value.numel():  # a tensor without elements may have a stride of 0, which cannot be viewed as bytes
        return memoryview(b"")
    return value.cpu().contiguous().view(torch.uint8).numpy().data
