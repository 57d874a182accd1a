"""Split the documents of every task into training, validation and test sets, never cutting a group.

>>> import datasets
>>> rows = [{"task": task, "text": f"{task}{n}", "group": f"speech {n}"} for task in "ab" for n in range(5)]
>>> parts, record, notes = split_by_group(datasets.Dataset.from_list(rows))
>>> {name: len(part) for name, part in parts.items()}
{'train': 6, 'validation': 2, 'test': 2}
>>> again = apply_split(datasets.Dataset.from_list(rows), record)
>>> again["test"]["text"][:] == parts["test"]["text"][:]
True
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from bora_pyro.data.assign import assign_groups, groups_of_several_tasks
from bora_pyro.data.counts import counted, listed, others
from bora_pyro.data.encode import content_columns
from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError, nearest, shown

MIN_DOCUMENTS = 3
_ONE_SIDE = "put the whole group on one side, or leave the given split out to have one made by group"


def split_by_group(
    dataset: datasets.Dataset,
    *,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    small_tasks: str = "error",
    least_tasks: int = 2,
) -> tuple[dict[str, datasets.Dataset], dict[str, Any], list[str]]:
    """Split by group within each task.

    The groups of a task are shuffled; each then goes to the split that lacks the largest share of its documents (train before
    test before validation where they lack the same). So three groups give one to each split, two train and test, one trains.
    A group that several tasks have is on one side in all of them. These groups are shuffled and assigned first, each to the
    split that its tasks lack most.

    Args:
        dataset: columns ``task``, ``text``, ``group``.
        fractions: share of each task's documents in train, validation and test; they sum to 1.
        seed: of the shuffle. The split of a task depends on the seed, its name and its groups, not on the order of the rows;
            and on other tasks only if it shares groups with them.
        small_tasks: what to do with a task of fewer than three documents, ``error`` or ``drop``.
        least_tasks: the least number of tasks.

    Returns:
        ``{"train": ..., "validation": ..., "test": ...}`` with rows in their old order; the record
        ``{"seed": ..., "fractions": [...], "tasks": {task: {group: split}}}``, which JSON can hold and `apply_split` reads;
        notes on what was dropped and on tasks that are not in every split.

    Raises:
        InputError: a task has fewer than three documents, there are too few tasks, or an argument is out of range.
    """
    fractions = checked_fractions(fractions)
    dataset, notes = drop_small_tasks(dataset, small_tasks=small_tasks)
    documents = group_sizes(dataset)
    check_task_count(documents, notes, least=least_tasks)
    record = {"seed": int(seed), "fractions": list(fractions), "tasks": assign_groups(documents, fractions, seed=seed)}
    parts = apply_split(dataset, record)
    return parts, record, notes + shared_group_notes(documents) + split_notes(parts, record)


def group_sizes(dataset: datasets.Dataset) -> dict[str, Counter[str]]:
    """The number of documents of each group of each task."""
    documents: dict[str, Counter[str]] = defaultdict(Counter)
    for task, group in zip(dataset["task"][:], dataset["group"][:], strict=True):
        documents[task][group] += 1
    return documents


def shared_group_notes(documents: Mapping[str, Mapping[str, object]]) -> list[str]:
    """A note on groups that several tasks have."""
    if not (number := len(groups_of_several_tasks(documents))):
        return []
    return [f"{counted(number, 'group')} of several tasks: {'it is' if number == 1 else 'each is'} on one side in all of them"]


def apply_split(dataset: datasets.Dataset, record: Mapping[str, Any]) -> dict[str, datasets.Dataset]:
    """Split as a record says. Tasks that are not in the record are left out: the record may be of a run on fewer tasks.

    Raises:
        InputError: the record is no split record, or its tasks and groups are not those of the table.
    """
    tasks = record.get("tasks") if isinstance(record, Mapping) else None
    if not isinstance(tasks, Mapping) or not all(isinstance(groups, Mapping) for groups in tasks.values()):
        raise InputError(
            "the split record has no entry 'tasks' of the form {task: {group: split}}; give one that split_by_group made"
        )
    rows: dict[str, list[int]] = {name: [] for name in SPLITS}
    seen: dict[str, set[str]] = {task: set() for task in tasks}
    for row, (task, group) in enumerate(zip(dataset["task"][:], dataset["group"][:], strict=True)):
        if task not in tasks:
            continue
        split = tasks[task].get(group)
        if not isinstance(split, str) or split not in rows:
            why = "is not in the split record" if split is None else f"is in split {shown(split)} of the split record"
            raise InputError(f"group {shown(group)} of task {shown(task)} {why}; use the table that was split, or split anew")
        rows[split].append(row)
        seen[task].add(group)
    for task, groups in tasks.items():
        if missing := set(groups) - seen[task]:
            hint = "" if seen[task] else nearest(task, set(dataset["task"][:]))
            raise InputError(
                f"{len(missing)} of {len(groups)} groups of task {shown(task)} in the split record are not in the table; "
                f"use the table that was split, or split anew{hint}"
            )
    return {name: dataset.select(indices) for name, indices in rows.items()}


def record_of_column(dataset: datasets.Dataset) -> dict[str, Any]:
    """The record of a ready split, for a table with a column ``split``.

    Raises:
        InputError: a group of a task stands on two sides.
    """
    tasks: dict[str, dict[str, str]] = defaultdict(dict)
    for task, group, split in zip(dataset["task"][:], dataset["group"][:], dataset["split"][:], strict=True):
        if tasks[task].setdefault(group, split) != split:
            raise InputError(f"group {shown(group)} of task {shown(task)} is in {tasks[task][group]} and in {split}; {_ONE_SIDE}")
    return {"seed": None, "fractions": None, "tasks": {task: tasks[task] for task in sorted(tasks)}}


def check_shared_groups(record: Mapping[str, Any], *, named: bool) -> list[str]:
    """Check that a group that several tasks have is on one side in all of them.

    Args:
        record: the record of a ready split.
        named: whether the user named the column of the groups. Otherwise nobody said that ``doc_id`` means the same in every
            task, and what stands on two sides is only counted.

    Returns:
        A note, or none.

    Raises:
        InputError: a group of a column that the user named stands on two sides.
    """
    tasks, several = record["tasks"], 0
    for group, names in groups_of_several_tasks(tasks).items():
        first = names[0]
        other = next((task for task in names if tasks[task][group] != tasks[first][group]), None)
        if other is None:
            continue
        if named:
            raise InputError(
                f"group {shown(group)} is in {tasks[first][group]} (task {shown(first)}) and in {tasks[other][group]} (task "
                f"{shown(other)}); {_ONE_SIDE}"
            )
        several += 1
    if not several:
        return []
    what = f"{counted(several, 'value')} of doc_id {'is' if several == 1 else 'are'}"
    return [f"{what} in several tasks, on different sides of the given split (kept; group_column doc_id would refuse it)"]


def drop_small_tasks(dataset: datasets.Dataset, *, small_tasks: str = "error") -> tuple[datasets.Dataset, list[str]]:
    """Refuse or drop tasks of fewer than three documents: they cannot have training, validation and test documents."""
    if small_tasks not in ("error", "drop"):
        hint = nearest(str(small_tasks), ("error", "drop"))
        raise InputError(f"small_tasks is {shown(small_tasks)}; use 'error' or 'drop'{hint}")
    counts = Counter(dataset["task"][:])
    small = sorted(task for task, count in counts.items() if count < MIN_DOCUMENTS)
    if not small:
        return dataset, []
    if small_tasks == "error":
        more = others(len(small) - 1, "and so")
        raise InputError(
            f"task {shown(small[0])} has {counted(counts[small[0]], 'document')}, fewer than {MIN_DOCUMENTS}{more}; "
            "add documents, or leave such tasks out with small_tasks=drop"
        )
    what = counted(len(small), "task")
    return without_tasks(dataset, small), [f"{what} with fewer than {MIN_DOCUMENTS} documents left out: {listed(small)}"]


def drop_untrained_tasks(dataset: datasets.Dataset, *, small_tasks: str = "error") -> tuple[datasets.Dataset, list[str]]:
    """Refuse or drop tasks that have no training document in a given split."""
    split = zip(dataset["task"][:], dataset["split"][:], strict=True)
    untrained = sorted(set(dataset["task"][:]) - {task for task, side in split if side == "train"})
    if not untrained:
        return dataset, []
    if small_tasks == "error":
        more = others(len(untrained) - 1, "nor")
        raise InputError(
            f"task {shown(untrained[0])} has no training document in the given split{more}; add documents to train, or leave "
            "such tasks out with small_tasks=drop"
        )
    what = counted(len(untrained), "task")
    return without_tasks(dataset, untrained), [f"{what} without a training document left out: {listed(untrained)}"]


def without_tasks(dataset: datasets.Dataset, tasks: Iterable[str]) -> datasets.Dataset:
    """The rows of all other tasks."""
    tasks = set(tasks)
    return dataset.select([row for row, task in enumerate(dataset["task"][:]) if task not in tasks])


def check_task_count(tasks: Iterable[str], notes: Sequence[str] = (), *, least: int = 2) -> None:
    """Raise an InputError if there are too few tasks.

    Args:
        tasks: names of the tasks.
        notes: on the tasks that were left out before.
        least: the least number: two, or one where the other tasks of the prior are elsewhere.
    """
    tasks = list(tasks)
    if len(tasks) < least:
        what = f"1 task, {shown(tasks[0])}" if tasks else "no task"
        why = f" left ({'; '.join(notes)})" if notes else ""
        hint = "Give more documents" if notes else "Check task_column"
        raise InputError(
            f"the data has {what}{why}; BoRA shares between tasks and needs two or more. "
            f"{hint}; for one task use peft's LoRA directly"
        )


def split_notes(parts: Mapping[str, datasets.Dataset], record: Mapping[str, Any], *, asked: bool = True) -> list[str]:
    """Notes on tasks that are not on every side of a split, if a split was asked for, and on texts that are on two sides."""
    present = {task: set(groups.values()) for task, groups in record["tasks"].items() if asked}
    lacking: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for task in sorted(present):
        if missing := tuple(name for name in SPLITS if name not in present[task]):
            lacking[missing].append(task)
    notes = []
    for missing, tasks in sorted(lacking.items()):
        noun = f"{counted(len(tasks), 'task')} {'has' if len(tasks) == 1 else 'have'} no {' and no '.join(missing)} documents"
        # Three groups reach every side, so a task that lacks a side has too few, unless fractions or the user say otherwise.
        made = record.get("fractions") is not None and all(len(record["tasks"][task]) < len(SPLITS) for task in tasks)
        few = " (too few groups to split)" if made else ""
        notes.append(f"{noun}{few}: {listed(tasks)}")
    sides: Counter[tuple[str, ...]] = Counter()
    for part in parts.values():
        sides.update(set(zip(*(part[column][:] for column in content_columns(part.column_names)), strict=True)))
    if shared := sum(count > 1 for count in sides.values()):
        notes.append(f"{counted(shared, 'text')} {'stands' if shared == 1 else 'stand'} in more than one split (kept)")
    return notes


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Shares of train, validation and test, after a check."""
    values = tuple(float(fraction) for fraction in fractions)
    if len(values) != len(SPLITS) or min(values) < 0 or values[0] == 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise InputError(
            f"fractions are {tuple(fractions)}; give three shares for train, validation and test that are not negative, "
            "with train above 0, and sum to 1"
        )
    return values
