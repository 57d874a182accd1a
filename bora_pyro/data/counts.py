"""Counts of a table of documents: what was read, what became of it, and what was left out and why.

>>> sides, tokens = {"train": 6, "validation": 2, "test": 2}, {"train": 900, "validation": 250, "test": 300}
>>> print(Counts(11, 2, sides, tokens, {"with no task": 1}))
11 rows read; 10 documents of 2 tasks: 6 train, 2 validation, 2 test (1 row left out: 1 with no task); 1,450 tokens to predict
>>> counted(1, "row"), counted(1200, "row")
('1 row', '1,200 rows')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets

from bora_pyro.errors import shown


class Documents(NamedTuple):
    """The documents of a source.

    Attributes:
        table: one document a row, with the columns ``task`` and ``group``, those of the content, and ``split`` if the split is
            given, by a column or by the source itself. A table that was streamed has digests in place of the content.
        content: the columns of the content: ``text``; ``prompt`` and ``text``, and ``options`` if there are; or ``messages``.
        rows: the number of rows read.
        left_out: the number of rows that are no document, by reason, such as ``with empty text``.
        notes: lines for the user.
        columns: all columns of the source.
        used: the columns that were read.
        form: the form of the documents, as ``document_form`` names it.
        task_groups: the group of each task, if there is a column of them.
    """

    table: datasets.Dataset
    content: list[str]
    rows: int
    left_out: dict[str, int]
    notes: list[str]
    columns: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    form: str = ""
    task_groups: Mapping[str, str] = {}


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a source. Every row is a document of one side, or left out for one reason.

    Attributes:
        rows: rows read.
        tasks: tasks with documents.
        documents: documents by side.
        tokens: tokens to predict by side.
        left_out: rows left out by reason.
        columns: all columns of the source.
        used: the columns that were read.
        form: the form of the documents.
    """

    rows: int
    tasks: int
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    left_out: Mapping[str, int] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    form: str = ""

    def __str__(self) -> str:
        sides = ", ".join(f"{number:,} {side}" for side, number in self.documents.items())
        kept = f"{counted(sum(self.documents.values()), 'document')} of {counted(self.tasks, 'task')}: {sides}"
        reasons = {reason: number for reason, number in self.left_out.items() if number}
        gone = ""
        if reasons:
            why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
            gone = f" ({counted(sum(reasons.values()), 'row')} left out: {why})"
        return f"{counted(self.rows, 'row')} read; {kept}{gone}; {counted(sum(self.tokens.values()), 'token')} to predict"

    def as_dict(self) -> dict[str, Any]:
        """The counts in values for JSON."""
        return {
            "rows": self.rows,
            "tasks": self.tasks,
            "documents": dict(self.documents),
            "tokens": dict(self.tokens),
            "left_out": {reason: number for reason, number in self.left_out.items() if number},
        }


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[object], *, most: int = 5) -> str:
    """The first of some names, each short.

    >>> listed(["Ada", "Bo", "Cleo"], most=2)
    "'Ada', 'Bo' and 1 more"
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def others(number: int, word: str) -> str:
    """A clause on other tasks of which the same is true; empty if there are none.

    >>> others(3, "nor")
    ' (nor have 3 other tasks)'
    """
    return f" ({word} {'has' if number == 1 else 'have'} {counted(number, 'other task')})" if number else ""
