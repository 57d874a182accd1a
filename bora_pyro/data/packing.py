"""Pack documents into batches that hold a number of tokens, padding included.

>>> [part.tolist() for part in pack(np.array([3, 9, 4, 2]), np.array([3, 0, 2, 1]), 12)]
[[3, 0, 2], [1]]
>>> units = Units.of(np.arange(5), np.array([3, 9, 4, 2, 3]), document_of=np.array([0, 0, 1, 1, 1]))
>>> [rows.tolist() for rows in packed_rows(units, 18)]
[[2, 3, 4], [0, 1]]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Documents are sorted by length within chunks. A chunk must be large, so that the documents of a batch have nearly the same
# length. It must be small compared with the split, so that a batch has other documents in each epoch.
_CHUNK_BATCHES = 16
_MIN_CHUNKS = 4


@dataclass(frozen=True)
class Units:
    """What a batch has as a whole: single rows, or all rows of a question.

    Attributes:
        rows: (rows,) positions of the rows in their split, unit by unit.
        counts: (units,) number of rows of each unit.
        longest: (units,) tokens of the longest row of each unit.
    """

    rows: np.ndarray
    counts: np.ndarray
    longest: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, lengths: np.ndarray, *, document_of: np.ndarray | None = None) -> Units:
        """The units of some rows.

        Args:
            rows: (n,) positions of the rows.
            lengths: (all rows,) tokens of each row of the split.
            document_of: (all rows,) the document of each row, whose rows stay together; None: each row is a unit.
        """
        if document_of is None or not len(rows):
            return cls(rows, np.ones_like(rows), lengths[rows])
        rows = rows[np.argsort(document_of[rows], kind="stable")]
        first = np.flatnonzero(np.diff(document_of[rows], prepend=-1))
        return cls(rows, np.diff(first, append=len(rows)), np.maximum.reduceat(lengths[rows], first))


def packed_rows(units: Units, token_budget: int, *, seed: int | None = None) -> list[np.ndarray]:
    """The rows of the batches of one epoch. Each batch has units of similar length.

    Args:
        units: the units.
        token_budget: the largest number of tokens of a batch, padding included. A single larger unit is a batch of its own.
        seed: seed of the shuffle of units and batches; None does not shuffle but sorts by length.
    """
    number, longest, counts = len(units.counts), units.longest, units.counts
    if not number:
        return []
    order = np.arange(number)
    if seed is None:
        members = pack(longest, order[np.argsort(longest, kind="stable")], token_budget, counts=counts)
    else:
        generator = np.random.default_rng(seed)
        order = order[generator.permutation(number)]
        chunk = int(_CHUNK_BATCHES * token_budget / (counts * longest)[order].mean())
        chunk = max(1, min(chunk, -(-number // _MIN_CHUNKS)))
        parts = []
        for place, start in enumerate(range(0, number, chunk)):
            part = order[start : start + chunk]
            part = part[np.argsort(longest[part], kind="stable")]
            # Alternately ascending and descending, so that a batch that spans two chunks has similar lengths too.
            parts.append(part if place % 2 == 0 else part[::-1])
        packed = pack(longest, np.concatenate(parts), token_budget, counts=counts)
        members = [packed[position] for position in generator.permutation(len(packed))]
    if len(units.rows) == number:
        return [units.rows[part] for part in members]
    rows = np.split(units.rows, np.cumsum(counts)[:-1])
    return [np.concatenate([rows[unit] for unit in part]) for part in members]


def pack(lengths: np.ndarray, order: np.ndarray, token_budget: int, *, counts: np.ndarray | None = None) -> list[np.ndarray]:
    """Cut ``order`` into consecutive parts, as long as possible, with rows times longest document at most ``token_budget``.

    ``counts`` are the rows of each document; None: 1 each.
    """
    members: list[np.ndarray] = []
    start = longest = rows = 0
    numbers = np.ones_like(order) if counts is None else counts[order]
    for position, (length, number) in enumerate(zip(lengths[order].tolist(), numbers.tolist(), strict=True)):
        widened = max(longest, length)
        if position > start and (rows + number) * widened > token_budget:
            members.append(order[start:position].copy())
            start, widened, rows = position, length, 0
        longest, rows = widened, rows + number
    if len(order):
        members.append(order[start:].copy())
    return members
