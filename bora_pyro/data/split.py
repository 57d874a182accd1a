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

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from bora_pyro.data.encode import content_columns
from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError, nearest, shown

MIN_DOCUMENTS = 3

# Which side takes a group if several lack the same share: a task with two groups gets test documents rather than validation ones.
_PREFERENCE = ("train", "test", "validation")


def task_generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends only on the seed and the names, so that the draws of one task do not change those of another.

    >>> bool(task_generator(0, "a").random() == task_generator(0, "a").random())
    True
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; give a whole number, 0 or larger")
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return np.random.default_rng([int(seed), int.from_bytes(digest[:8], "big")])


def split_by_group(
    dataset: datasets.Dataset,
    *,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    small_tasks: str = "error",
) -> tuple[dict[str, datasets.Dataset], dict[str, Any], list[str]]:
    """Split by group within each task.

    The groups of a task are shuffled; each then goes to the split that lacks the largest share of its documents (train before
    test before validation where they lack the same). So three groups give one to each split, two train and test, one trains.

    Args:
        dataset: columns ``task``, ``text``, ``group``; a group is a pair (task, group).
        fractions: share of each task's documents in train, validation and test; they sum to 1.
        seed: of the shuffle. The split of a task depends on the seed, its name and its groups, not on other tasks or on the
            order of the rows.
        small_tasks: what to do with a task of fewer than three documents, ``error`` or ``drop``.

    Returns:
        ``{"train": ..., "validation": ..., "test": ...}`` with rows in their old order; the record
        ``{"seed": ..., "fractions": [...], "tasks": {task: {group: split}}}``, which JSON can hold and `apply_split` reads;
        notes on what was dropped and on tasks that are not in every split.

    Raises:
        InputError: a task has fewer than three documents, there are fewer than two tasks, or an argument is out of range.
    """
    fractions = _checked_fractions(fractions)
    dataset, notes = drop_small_tasks(dataset, small_tasks=small_tasks)
    documents: dict[str, Counter[str]] = defaultdict(Counter)
    for task, group in zip(dataset["task"][:], dataset["group"][:], strict=True):
        documents[task][group] += 1
    check_task_count(documents)
    tasks = {task: _assign(documents[task], fractions, task_generator(seed, task)) for task in sorted(documents)}
    record = {"seed": int(seed), "fractions": list(fractions), "tasks": tasks}
    parts = apply_split(dataset, record)
    return parts, record, notes + split_notes(parts, record)


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
            raise InputError(f"group {group!r} of task {task!r} {why}; use the table that was split, or split anew")
        rows[split].append(row)
        seen[task].add(group)
    for task, groups in tasks.items():
        if missing := set(groups) - seen[task]:
            hint = "" if seen[task] else nearest(task, set(dataset["task"][:]))
            raise InputError(
                f"{len(missing)} of {len(groups)} groups of task {task!r} in the split record are not in the table; "
                f"use the table that was split, or split anew{hint}"
            )
    return {name: dataset.select(indices) for name, indices in rows.items()}


def record_of_column(dataset: datasets.Dataset) -> dict[str, Any]:
    """The record of a ready split, for a table with a column ``split``.

    Raises:
        InputError: a group stands on two sides.
    """
    tasks: dict[str, dict[str, str]] = defaultdict(dict)
    for task, group, split in zip(dataset["task"][:], dataset["group"][:], dataset["split"][:], strict=True):
        if tasks[task].setdefault(group, split) != split:
            raise InputError(
                f"group {group!r} of task {task!r} is in {tasks[task][group]} and in {split}; put the whole group on one side, "
                "or leave split_column out to have the split made by group"
            )
    return {"seed": None, "fractions": None, "tasks": {task: tasks[task] for task in sorted(tasks)}}


def drop_small_tasks(dataset: datasets.Dataset, *, small_tasks: str = "error") -> tuple[datasets.Dataset, list[str]]:
    """Refuse or drop tasks of fewer than three documents: they cannot have training, validation and test documents."""
    if small_tasks not in ("error", "drop"):
        hint = nearest(str(small_tasks), ("error", "drop"))
        raise InputError(f"small_tasks is {small_tasks!r}; use 'error' or 'drop'{hint}")
    counts = Counter(dataset["task"][:])
    small = sorted(task for task, count in counts.items() if count < MIN_DOCUMENTS)
    if not small:
        return dataset, []
    if small_tasks == "error":
        more = f", as do {len(small) - 1} others" if len(small) > 1 else ""
        raise InputError(
            f"task {small[0]!r} has {_plural(counts[small[0]], 'document')}, fewer than {MIN_DOCUMENTS}{more}; "
            "add documents, or leave such tasks out with small_tasks=drop"
        )
    keep = [row for row, task in enumerate(dataset["task"][:]) if counts[task] >= MIN_DOCUMENTS]
    what = _plural(len(small), "task")
    return dataset.select(keep), [f"{what} with fewer than {MIN_DOCUMENTS} documents left out: {_listed(small)}"]


def check_task_count(tasks: Iterable[str]) -> None:
    """Raise an InputError if there are fewer than two tasks."""
    tasks = list(tasks)
    if len(tasks) < 2:
        what = f"1 task, {tasks[0]!r}" if tasks else "no task"
        raise InputError(
            f"the data has {what}; BoRA shares between tasks and needs two or more. "
            "Check task_column; for one task use peft's LoRA directly"
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
        noun = f"{_plural(len(tasks), 'task')} {'has' if len(tasks) == 1 else 'have'} no {' and no '.join(missing)} documents"
        # Three groups reach every side, so a task that lacks a side has too few, unless fractions or the user say otherwise.
        made = record.get("fractions") is not None and all(len(record["tasks"][task]) < len(SPLITS) for task in tasks)
        few = " (too few groups to split)" if made else ""
        notes.append(f"{noun}{few}: {_listed(tasks)}")
    sides: Counter[tuple[str, ...]] = Counter()
    for part in parts.values():
        sides.update(set(zip(*(part[column][:] for column in content_columns(part.column_names)), strict=True)))
    if shared := sum(count > 1 for count in sides.values()):
        notes.append(f"{_plural(shared, 'text')} {'stands' if shared == 1 else 'stand'} in more than one split (kept)")
    return notes


def _assign(documents: Mapping[str, int], fractions: Sequence[float], generator: np.random.Generator) -> dict[str, str]:
    """Give each group of one task to a split; `documents` counts the documents of each group."""
    # Sorted first, so that the order of the rows does not matter.
    groups = sorted(documents)
    target = {name: fraction * sum(documents.values()) for name, fraction in zip(SPLITS, fractions, strict=True)}
    open_splits = [name for name in _PREFERENCE if target[name] > 0]
    filled = dict.fromkeys(open_splits, 0)
    assigned = {}
    for position in generator.permutation(len(groups)):
        # max takes the first of equals: the order of _PREFERENCE.
        name = max(open_splits, key=lambda split: 1 - filled[split] / target[split])
        filled[name] += documents[groups[position]]
        assigned[groups[position]] = name
    return {group: assigned[group] for group in groups}


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(fraction) for fraction in fractions)
    if len(values) != len(SPLITS) or min(values) < 0 or values[0] == 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise InputError(
            f"fractions are {tuple(fractions)}; give three shares for train, validation and test that are not negative, "
            "with train above 0, and sum to 1"
        )
    return values


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str], *, most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
