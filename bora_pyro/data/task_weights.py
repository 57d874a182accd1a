"""Task weights: a factor for the log-likelihood of each task.

>>> task_weights({"Ada": 2.0}, ["Ada", "Bo"])
tensor([2., 1.])
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bora_pyro.data.by_task import read_by_task
from bora_pyro.errors import InputError, nearest, shown


def task_weights(
    given: Mapping[str, float] | str | Path, tasks: Sequence[str], *, known: Collection[str] | None = None
) -> Tensor:
    """The weight of each task. A task without a given weight has weight 1.

    Args:
        given: weights by task; or a table file (.csv and the like) with columns ``task`` and ``weight``; or a .yaml or .json file
            with a mapping from tasks to weights. Task names in YAML stay texts: ``no`` is the task "no", ``010`` the task "010".
        tasks: names of the tasks, in order.
        known: further names that may be given and are ignored: tasks of the data that the fit leaves out.

    Returns:
        (D,) float32.

    Raises:
        InputError: the file cannot be read, a task is unknown or given twice, or a weight is not a finite number above 0.
    """
    label = "task_weights" if isinstance(given, Mapping) else f"task_weights {str(given)!r}"
    weights = dict.fromkeys(tasks, 1.0)
    read = given if isinstance(given, Mapping) else read_by_task(Path(given).expanduser(), "weight", label)
    for task, weight in read.items():
        name = str(task)
        if name not in weights and name not in (known or ()):
            raise InputError(f"{label}: there is no task {shown(name)} in the data{nearest(name, tasks)}")
        try:
            number = math.nan if isinstance(weight, bool) else float(weight)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError(f"{label}: the weight of task {shown(name)} is {shown(weight)}; give a finite number above 0")
        if name in weights:
            weights[name] = number
    return torch.tensor([weights[task] for task in tasks], dtype=torch.float32)
