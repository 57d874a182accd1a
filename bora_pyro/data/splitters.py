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

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import datasets

from bora_pyro.data.assign import assign_groups
from bora_pyro.data.counts import counted, listed
from bora_pyro.data.options import DataOptions
from bora_pyro.data.split import (
    apply_split,
    check_shared_groups,
    check_task_count,
    checked_fractions,
    drop_small_tasks,
    drop_untrained_tasks,
    group_sizes,
    record_of_column,
    shared_group_notes,
    split_by_group,
    split_notes,
    without_tasks,
)
from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError, shown

#: Reasons why the documents of a task are left out.
_SMALL, _UNTRAINED = "of tasks with too few", "of tasks without a training document"
_BEYOND, _UNKNOWN = "of tasks beyond num_tasks", "of tasks that the split record does not have"


class Split(NamedTuple):
    """The documents after the split.

    Attributes:
        parts: the rows of ``train``, ``validation`` and ``test``.
        record: the side of each group of each task, in values for JSON; :class:`ByRecord` reads it.
        notes: lines for the user: what was dropped, and which tasks are not on every side.
        left_out: the number of documents that were left out, by reason.
        keeps_tasks: whether a task stays even if none of its training documents has a token to predict. So it is for tasks of an
            earlier fit, and for new tasks of a finished one.
    """

    parts: dict[str, datasets.Dataset]
    record: dict[str, Any]
    notes: list[str]
    left_out: Mapping[str, int] = MappingProxyType({})
    keeps_tasks: bool = False


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
        least_tasks: the least number of tasks.
    """

    fractions: Sequence[float] = (0.6, 0.2, 0.2)
    seed: int = 0
    least_tasks: int = 2

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split the first ``num_tasks`` tasks as :func:`~bora_pyro.data.split.split_by_group` does."""
        dropped: list[str] = []
        whole = table
        if options.small_tasks == "drop":  # before the first tasks are taken, so that num_tasks are left
            table, dropped = drop_small_tasks(table, small_tasks="drop")
        first = _first_tasks(table, options.num_tasks, dropped, least=self.least_tasks)
        how: dict[str, Any] = {"small_tasks": options.small_tasks, "least_tasks": self.least_tasks}
        parts, record, notes = split_by_group(first, fractions=self.fractions, seed=self.seed, **how)
        left_out = {_SMALL: len(whole) - len(table), _BEYOND: len(table) - len(first)}
        return Split(parts, record, dropped + notes, left_out)


@dataclass(frozen=True)
class AsGiven:
    """The split that the data has, in a column or as files and splits of their own. A side that it lacks is cut from train.

    Training documents never come from another side. Validation and test, where the data has them, stay as they are. If the
    whole data has no validation documents or no test documents, these are cut from train by group within each task, as many as
    a split of the training documents of the task by ``fractions`` gives them.

    Attributes:
        fractions: share of train, validation and test.
        seed: seed of the cut.
        least_tasks: the least number of tasks.
    """

    fractions: Sequence[float] = (0.6, 0.2, 0.2)
    seed: int = 0
    least_tasks: int = 2

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split as the column ``split`` of the table says."""
        given = _side_counts(table["split"][:])
        if not given["train"]:
            raise InputError(
                f"the given split has {_sides(given)} and none to train on; give training documents, or read one split "
                "alone with hub_split to have it split by group"
            )
        wanted = {name: fraction for name, fraction in zip(SPLITS, checked_fractions(self.fractions), strict=True) if fraction}
        missing = [name for name in wanted if not given[name]]
        if sum(given.values()) == given["train"]:
            made = ByGroup(self.fractions, self.seed, self.least_tasks).split(table, options)
            how = f"the given split has train alone; {' and '.join(missing)} were cut from it by group" if missing else None
            return _with_note(made, how)
        whole, dropped = table, list[str]()
        if options.small_tasks == "drop":
            table, dropped = drop_untrained_tasks(table, small_tasks="drop")
        first = _first_tasks(table, options.num_tasks, dropped, least=self.least_tasks)
        drop_untrained_tasks(first, small_tasks=options.small_tasks)
        record = record_of_column(first)
        notes = dropped + check_shared_groups(record, named=options.group_column is not None)
        if missing:
            record = self._cut(first, record, {name: wanted[name] for name in ("train", *missing)})
            notes += shared_group_notes(record["tasks"])
        parts, how = apply_split(first, record), None
        if missing:
            cut = " and ".join(f"{len(parts[name]):,} for {name}" for name in missing)
            there = " and ".join(name for name in SPLITS if given[name])
            how = f"the given split has {there}; {cut} were cut from train by group"
        elif options.split_column is None:
            how = _used(parts)
        left_out = {_UNTRAINED: len(whole) - len(table), _BEYOND: len(table) - len(first)}
        return _with_note(Split(parts, record, notes + split_notes(parts, record), left_out), how)

    def _cut(self, table: datasets.Dataset, record: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, Any]:
        """Cut sides that are missing from train; `shares` has the fractions of train and of these sides."""
        train = table.select([row for row, side in enumerate(table["split"][:]) if side == "train"])
        fractions = [shares.get(name, 0.0) / sum(shares.values()) for name in SPLITS]
        cut = assign_groups(group_sizes(train), fractions, seed=self.seed)
        tasks = {task: groups | cut[task] for task, groups in record["tasks"].items()}
        return {"seed": int(self.seed), "fractions": fractions, "tasks": tasks}


@dataclass(frozen=True)
class ByColumn:
    """The ready split in a column of the table, and nothing else: what it lacks stays missing.

    Attributes:
        new_tasks: whether the tasks are new ones for a finished fit; then one task is enough, and a task may have no training
            documents.
    """

    new_tasks: bool = False

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split as the column ``split`` of the table says."""
        first = table
        if options.num_tasks is not None or not self.new_tasks:
            first = _first_tasks(table, options.num_tasks)
        record = record_of_column(first)
        notes = check_shared_groups(record, named=options.group_column is not None)
        parts = apply_split(first, record)
        left_out = {_BEYOND: len(table) - len(first)}
        return Split(parts, record, notes + split_notes(parts, record), left_out, keeps_tasks=self.new_tasks)


@dataclass(frozen=True)
class AllTrain:
    """All documents are for training, or all but a share. This is for new tasks of a finished fit, and one task is enough.

    Attributes:
        held_out: the share of each task's documents that are for testing, by group. A task with one group keeps it for training.
        seed: seed of the choice of these documents.
    """

    held_out: float = 0.0
    seed: int = 0

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Put the groups of every task into ``train`` and, if a share is held out, into ``test``."""
        first = table if options.num_tasks is None else _first_tasks(table, options.num_tasks)
        record: dict[str, Any]
        if self.held_out:
            fractions = checked_fractions((1 - self.held_out, 0.0, self.held_out))
            tasks = assign_groups(group_sizes(first), fractions, seed=self.seed)
            record = {"seed": int(self.seed), "fractions": list(fractions), "tasks": tasks}
        else:
            tasks = {task: {} for task in sorted(set(first["task"][:]))}
            for task, group in zip(first["task"][:], first["group"][:], strict=True):
                tasks[task][group] = "train"
            record = {"seed": None, "fractions": None, "tasks": tasks}
        parts = apply_split(first, record)
        left_out = {_BEYOND: len(table) - len(first)}
        return Split(parts, record, split_notes(parts, record, asked=False), left_out, keeps_tasks=True)


@dataclass(frozen=True)
class ForNewTasks:
    """New tasks of a finished fit: the split that the data has; otherwise all documents are for training, or all but a share.

    Attributes:
        held_out: as for :class:`AllTrain`.
        seed: as for :class:`AllTrain`.
    """

    held_out: float = 0.0
    seed: int = 0

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split by the column ``split`` of the table, if there is one.

        Raises:
            InputError: there is one, and a share is to be held out too.
        """
        if self.held_out and "split" in table.column_names:
            raise InputError(
                f"held_out is {self.held_out:g}, but the data has a split of its own, which is used; leave held_out out"
            )
        given = "split" in table.column_names
        way: Splitter = ByColumn(new_tasks=True) if given else AllTrain(self.held_out, self.seed)
        found = way.split(table, options)
        return _with_note(found, _used(found.parts) if "split" in table.column_names and options.split_column is None else None)


@dataclass(frozen=True)
class ByRecord:
    """The split of an earlier run. Tasks that are not in its record are left out.

    Attributes:
        record: content of ``split.json``, or ``TaskData.split_record``.
    """

    record: Mapping[str, Any]

    def split(self, table: datasets.Dataset, options: DataOptions) -> Split:
        """Split as the record says. A split of the data and ``small_tasks`` have no influence."""
        record, notes = self._first_tasks(options.num_tasks), list[str]()
        parts = apply_split(table, record)
        names, gone = set(table["task"][:]), dict[str, int]()
        left_out = names - set(record["tasks"])
        if options.small_tasks == "drop" and options.split_column is None:
            large, dropped = drop_small_tasks(table, small_tasks="drop")
            if (small := names - set(large["task"][:])) <= left_out:
                notes += dropped  # the run that made the record had this note
                left_out -= small
                gone[_SMALL] = len(table) - len(large)
        if isinstance(how := record.get("how"), str):
            notes.insert(0, shown(how, characters=200)[1:-1])
        notes += shared_group_notes(record["tasks"]) if record.get("fractions") is not None else []
        if left_out and options.num_tasks is None:
            what = "1 task" if len(left_out) == 1 else f"{len(left_out)} tasks"
            notes.append(f"{what} that the split record does not have {'was' if len(left_out) == 1 else 'were'} left out")
        others = len(table) - sum(map(len, parts.values())) - sum(gone.values())
        gone[_UNKNOWN if options.num_tasks is None else _BEYOND] = others
        return Split(parts, record, notes + split_notes(parts, record), gone, keeps_tasks=True)

    def _first_tasks(self, num_tasks: int | None) -> dict[str, Any]:
        tasks = self.record.get("tasks")
        if num_tasks is None or not isinstance(tasks, Mapping):
            return dict(self.record)
        return {**self.record, "tasks": {task: tasks[task] for task in _take(sorted(tasks), num_tasks, "the split record")}}


def drop_tasks(found: Split, tasks: Sequence[str], why: str, *, least: int = 2) -> Split:
    """A split without some tasks.

    Args:
        found: the split.
        tasks: names of the tasks to leave out.
        why: what these tasks have in common, after "3 tasks".
        least: the least number of tasks that must be left.

    Raises:
        InputError: fewer are left.
    """
    note = f"{counted(len(tasks), 'task')} {why} left out: {listed(tasks)}"
    record = {**found.record, "tasks": {task: groups for task, groups in found.record["tasks"].items() if task not in {*tasks}}}
    check_task_count(record["tasks"], [note], least=least)
    parts = {name: without_tasks(part, tasks) for name, part in found.parts.items()}
    number = sum(len(found.parts[name]) - len(parts[name]) for name in parts)
    left_out = {**found.left_out, _UNTRAINED: found.left_out.get(_UNTRAINED, 0) + number}
    return found._replace(parts=parts, record=record, notes=[*found.notes, note], left_out=left_out)


def _first_tasks(
    table: datasets.Dataset, num_tasks: int | None, dropped: Sequence[str] = (), *, least: int = 2
) -> datasets.Dataset:
    """The rows of the first ``num_tasks`` tasks by name; `dropped` are notes on tasks that were left out before."""
    names = table["task"][:]
    tasks = sorted(set(names))
    check_task_count(tasks, dropped, least=least)
    if num_tasks is None:
        return table
    keep = set(_take(tasks, num_tasks, "the data"))
    return table.select([row for row, name in enumerate(names) if name in keep])


def _take(tasks: list[str], num_tasks: int, where: str) -> list[str]:
    if not 2 <= num_tasks <= len(tasks):
        raise InputError(f"num_tasks is {num_tasks}; {where} has {len(tasks)} tasks, give 2 to {len(tasks)} or None for all")
    return tasks[:num_tasks]


def _with_note(found: Split, how: str | None) -> Split:
    """The split with a note on how it was found, which its record keeps for those who read the data again."""
    return found if how is None else found._replace(record={**found.record, "how": how}, notes=[how, *found.notes])


def _used(parts: Mapping[str, datasets.Dataset]) -> str:
    return f"the split of the data is used: {_sides({name: len(part) for name, part in parts.items()})}"


def _side_counts(sides: Sequence[str]) -> dict[str, int]:
    found = Counter(sides)
    return {name: found[name] for name in SPLITS}


def _sides(counts: Mapping[str, int]) -> str:
    """The sides that have documents, such as ``3 train and 1 test documents``."""
    sides = [f"{number:,} {name}" for name, number in counts.items() if number]
    return f"{' and '.join([', '.join(sides[:-1]), sides[-1]] if len(sides) > 1 else sides)} documents"
