"""Ways to split the documents of tasks into training, validation and test sets: small objects with one method.

>>> from bora_pyro.data.tables import table
>>> documents = table([{"task": task, "text": f"{task}{n}", "group": f"row {n}"} for task in "ab" for n in range(5)])
>>> found = ByGroup(fractions=(0.6, 0.2, 0.2), seed=1).split(documents, DataOptions())
>>> {name: len(part) for name, part in found.parts.items()}
{'train': 6, 'validation': 2, 'test': 2}
>>> ByRecord(found.record).split(documents, DataOptions()).record == found.record
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import datasets

from bora_pyro.data.options import DataOptions
from bora_pyro.data.split import (
    apply_split,
    check_task_count,
    drop_small_tasks,
    record_of_column,
    split_by_group,
    split_notes,
)
from bora_pyro.errors import InputError


class Split(NamedTuple):
    """The documents after the split.

    Attributes:
        parts: the rows of ``train``, ``validation`` and ``test``.
        record: the side of each group of each task, in values for JSON; :class:`ByRecord` reads it.
        notes: lines for the user: what was dropped, and which tasks are not on every side.
    """

    parts: dict[str, datasets.Dataset]
    record: dict[str, Any]
    notes: list[str]


class Splitter(Protocol):
    """A way to split the documents of tasks."""

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split a table.

        Args:
            table: the documents, with columns ``task``, ``group`` and, where ``split_column`` is given, ``split``.
            options: the options that limit the number of tasks and say what happens to small ones.

        Raises:
            InputError: the table cannot be split so.
        """


@dataclass(frozen=True)
class ByGroup:
    """A seeded split of each task, which never separates the documents of a group.

    Attributes:
        fractions: share of train, validation and test.
        seed: seed of the split.
    """

    fractions: Sequence[float] = (0.6, 0.2, 0.2)
    seed: int = 0

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split the first ``num_tasks`` tasks as :func:`~bora_pyro.data.split.split_by_group` does."""
        dropped: list[str] = []
        if options.small_tasks == "drop":  # before the first tasks are taken, so that num_tasks are left
            table, dropped = drop_small_tasks(table, small_tasks="drop")
        table = _first_tasks(table, options.num_tasks)
        parts, record, notes = split_by_group(table, fractions=self.fractions, seed=self.seed, small_tasks=options.small_tasks)
        return Split(parts, record, dropped + notes)


@dataclass(frozen=True)
class ByColumn:
    """The ready split in a column of the table.

    Attributes:
        new_tasks: whether the tasks are new ones for a finished fit; then one task is enough.
    """

    new_tasks: bool = False

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split as the column ``split`` of the table says."""
        if options.num_tasks is not None or not self.new_tasks:
            table = _first_tasks(table, options.num_tasks)
        record = record_of_column(table)
        parts = apply_split(table, record)
        return Split(parts, record, split_notes(parts, record))


@dataclass(frozen=True)
class AllTrain:
    """All documents are for training. This is for new tasks of a finished fit, and one task is enough."""

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Put every group of every task into ``train``."""
        if options.num_tasks is not None:
            table = _first_tasks(table, options.num_tasks)
        tasks: dict[str, dict[str, str]] = {task: {} for task in sorted(set(table["task"][:]))}
        for task, group in zip(table["task"][:], table["group"][:], strict=True):
            tasks[task][group] = "train"
        record = {"seed": None, "fractions": None, "tasks": tasks}
        parts = apply_split(table, record)
        return Split(parts, record, split_notes(parts, record, asked=False))


@dataclass(frozen=True)
class ByRecord:
    """The split of an earlier run. Tasks that are not in its record are left out.

    Attributes:
        record: content of ``split.json``, or ``TaskData.split_record``.
    """

    record: Mapping[str, Any]

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split as the record says. ``split_column`` and ``small_tasks`` have no influence."""
        record, notes = self._first_tasks(options.num_tasks), []
        parts = apply_split(table, record)
        names = set(table["task"][:])
        left_out = names - set(record["tasks"])
        if options.small_tasks == "drop" and options.split_column is None:
            large, dropped = drop_small_tasks(table, small_tasks="drop")
            if (small := names - set(large["task"][:])) <= left_out:
                notes += dropped  # the run that made the record had this note
                left_out -= small
        if left_out and options.num_tasks is None:
            what = "1 task" if len(left_out) == 1 else f"{len(left_out)} tasks"
            notes.append(f"{what} that the split record does not have {'was' if len(left_out) == 1 else 'were'} left out")
        return Split(parts, record, notes + split_notes(parts, record))

    def _first_tasks(self, num_tasks: int | None) -> dict[str, Any]:
        tasks = self.record.get("tasks")
        if num_tasks is None or not isinstance(tasks, Mapping):
            return dict(self.record)
        return {**self.record, "tasks": {task: tasks[task] for task in _take(sorted(tasks), num_tasks, "the split record")}}


def _first_tasks(table: datasets.Dataset, num_tasks: int | None) -> datasets.Dataset:
    """The rows of the first ``num_tasks`` tasks by name."""
    names = table["task"][:]
    tasks = sorted(set(names))
    check_task_count(tasks)
    if num_tasks is None:
        return table
    keep = set(_take(tasks, num_tasks, "the data"))
    return table.select([row for row, name in enumerate(names) if name in keep])


def _take(tasks: list[str], num_tasks: int, where: str) -> list[str]:
    if not 2 <= num_tasks <= len(tasks):
        raise InputError(f"num_tasks is {num_tasks}; {where} has {len(tasks)} tasks, give 2 to {len(tasks)} or None for all")
    return tasks[:num_tasks]
