"""The rank of each task, given by name, in a file or in the order of the tasks.

>>> ranks_of({"ada": 2, "bob": 8}, ["ada", "bob"])
Ranks(2, 8)
>>> ranks_of({"bob": 8}, ["ada", "bob"], other=4)
Ranks(4, 8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bora_pyro.adapters.layer_options import check_rank
from bora_pyro.backbone.fit_hooks import FitHooks
from bora_pyro.data.by_task import read_by_task
from bora_pyro.errors import InputError, nearest, shown

OPTION = "task_ranks"
# How many ranks are printed.
_SHOWN = 8


class Ranks(tuple[int, ...]):
    """The ranks of the tasks in the order of the model. It prints itself shortly.

    >>> Ranks(range(1, 101))
    Ranks(100 tasks, 1 to 100)
    """

    def __repr__(self) -> str:
        if len(self) > _SHOWN:
            return f"Ranks({len(self)} tasks, {min(self)} to {max(self)})"
        return f"Ranks({', '.join(map(str, self))})"


def ranks_by_name(given: Mapping[str, Any] | str | Path) -> dict[str, int]:
    """Ranks by the names of tasks.

    Args:
        given: a mapping; or a file that :func:`~bora_pyro.data.by_task.read_by_task` reads, with the column ``rank``.

    Raises:
        InputError: the file cannot be read or gives a task twice, or a rank is not a whole number from 1 up.
    """
    label = _label(given)
    read = given if isinstance(given, Mapping) else read_by_task(Path(given).expanduser(), "rank", label)
    return {str(task): check_rank(f"{label}: the rank of task {shown(str(task))}", value) for task, value in read.items()}


def ranks_of(given: Mapping[str, Any] | str | Path, tasks: Sequence[str], other: int | None = None) -> Ranks:
    """The ranks of the tasks of a fit.

    Args:
        given: as for :func:`ranks_by_name`.
        tasks: names of the tasks in the order of the model.
        other: the rank of tasks that are not named; None: all have to be named.

    Raises:
        InputError: a named task is none of ``tasks``; one of them has no rank; all have one although ``other`` is given; or as
            for :func:`ranks_by_name`.
    """
    label, by_name = _label(given), ranks_by_name(given)
    for name in by_name:
        if name not in tasks:
            raise InputError(f"{label}: there is no task {shown(name)} among the {len(tasks)} of the fit{nearest(name, tasks)}")
    left = [task for task in tasks if task not in by_name]
    if left and other is None:
        raise InputError(f"{label} has no rank of task {shown(left[0])}; name it, or give task_rank for the tasks without one")
    if not left and other is not None:
        raise InputError(
            f"task_rank is {other}, for tasks without a rank of their own, and {label} names all; leave task_rank out"
        )
    return Ranks(by_name.get(task, other or 0) for task in tasks)


class SameRanks(FitHooks):
    """Refuses to resume a fit whose tasks had other ranks. A checkpoint has the masks of the ranks, and would restore them.

    Raises:
        InputError: (from ``load_state``) the ranks have changed.
    """

    name = OPTION

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = torch.tensor(list(ranks))

    def state(self) -> dict[str, Tensor]:
        return {"ranks": self.ranks}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if "ranks" not in state or not torch.equal(state["ranks"].cpu(), self.ranks):
            raise InputError(
                f"the ranks of the tasks ({OPTION}) are not those with which the fit began; restore them, or start afresh with "
                "--overwrite true"
            )


def _label(given: Mapping[str, Any] | str | Path) -> str:
    return OPTION if isinstance(given, Mapping) else f"{OPTION} {str(given)!r}"
