"""Give groups of documents to the sides of a split: at random, by the share of its documents that each side still lacks.

>>> documents = {"Ada": {"talk 1": 4, "talk 2": 2, "debate": 2}, "Bo": {"debate": 3, "talk 3": 3}}
>>> sides = assign_groups(documents, (0.6, 0.2, 0.2), seed=0)
>>> sides["Ada"]["debate"] == sides["Bo"]["debate"]
True
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from bora_pyro.data.split_names import SPLITS
from bora_pyro.errors import InputError

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


def assign_groups(
    documents: Mapping[str, Mapping[str, int]], fractions: Sequence[float], *, seed: int
) -> dict[str, dict[str, str]]:
    """The side of each group of each task. A group that several tasks have is on one side in all of them.

    Args:
        documents: the number of documents of each group of each task.
        fractions: the share of train, validation and test.
        seed: of the shuffles. The order of tasks and groups has no influence.

    Returns:
        ``{task: {group: side}}``, sorted. If a task shares no group with another task, its sides depend on nothing else.
    """
    tasks = {task: _Task(groups, fractions) for task, groups in sorted(documents.items())}
    shared = groups_of_several_tasks(documents)
    members = {group: [tasks[task] for task in names] for group, names in shared.items()}
    names = sorted(shared)
    for position in task_generator(seed, "groups", "of several tasks").permutation(len(names)):
        group = names[position]
        side = _side_for_all(members[group], group)
        for task in members[group]:
            task.put(group, side)
    for name, task in tasks.items():
        # Sorted first, so that the order of the rows does not matter.
        own = sorted(group for group in task.documents if group not in shared)
        for position in task_generator(seed, name).permutation(len(own)):
            # max takes the first of equals: the order of _PREFERENCE.
            task.put(own[position], max(task.open, key=task.lack))
    return {name: {group: task.sides[group] for group in sorted(task.sides)} for name, task in tasks.items()}


def groups_of_several_tasks(documents: Mapping[str, Mapping[str, object]]) -> dict[str, list[str]]:
    """The tasks of each group that more than one task has."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, groups in documents.items():
        for group in groups:
            tasks[group].append(task)
    return {group: sorted(names) for group, names in tasks.items() if len(names) > 1}


class _Task:
    """The documents of one task while its groups are given to sides."""

    def __init__(self, documents: Mapping[str, int], fractions: Sequence[float]) -> None:
        self.documents, self.total = documents, sum(documents.values())
        self.target = {name: fraction * self.total for name, fraction in zip(SPLITS, fractions, strict=True)}
        self.open = [name for name in _PREFERENCE if self.target[name] > 0]
        self.filled: Counter[str] = Counter()
        self.sides: dict[str, str] = {}

    def lack(self, side: str) -> float:
        """The share of the documents meant for a side that it does not have yet."""
        return 1 - self.filled[side] / self.target[side]

    def put(self, group: str, side: str) -> None:
        self.sides[group] = side
        self.filled[side] += self.documents[group]


def _side_for_all(tasks: Sequence[_Task], group: str) -> str:
    """The side of a group that several tasks have.

    It is the side that these tasks lack most, each weighted by the share of its documents that the group has. But where it is
    the last group of a task that has none in train, it trains.
    """
    if any(not task.filled["train"] and len(task.sides) == len(task.documents) - 1 for task in tasks):
        return "train"
    weights = [task.documents[group] / task.total for task in tasks]
    lacks = {side: sum(w * task.lack(side) for w, task in zip(weights, tasks, strict=True)) for side in tasks[0].open}
    return max(lacks, key=lambda side: lacks[side])
