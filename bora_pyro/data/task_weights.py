"""Weights of tasks: the factor by which a task's log-likelihood counts more, or less, than that of others.

>>> task_weights({"Ada": 2.0}, ["Ada", "Bo"])
tensor([2., 1.])
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from bora_pyro.data.files import one_line, read_file, table_ending
from bora_pyro.errors import InputError, nearest

_COLUMNS = ("task", "weight")


def task_weights(
    given: Mapping[str, float] | str | Path, tasks: Sequence[str], *, known: Collection[str] | None = None
) -> Tensor:
    """The weight of each task, 1 where none is given.

    Args:
        given: weights by task; or a table (.csv and the other kinds of tables) with columns ``task`` and ``weight``, or a .yaml
            or .json file with a mapping from tasks to weights.
        tasks: names of the tasks, in their order.
        known: names that are no error though they are none of ``tasks``: those that the data have and the fit leaves out.

    Returns:
        (D,) float32.

    Raises:
        InputError: the file cannot be read, a task is unknown, or a weight is no finite number above 0.
    """
    label = "task_weights" if isinstance(given, Mapping) else f"task_weights {str(given)!r}"
    weights = dict.fromkeys(tasks, 1.0)
    for task, weight in (given if isinstance(given, Mapping) else _read(Path(given).expanduser(), label)).items():
        name = str(task)
        if name not in weights and name not in (known or ()):
            raise InputError(f"{label}: there is no task {name!r} in the data{nearest(name, tasks)}")
        try:
            number = math.nan if isinstance(weight, bool) else float(weight)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError(f"{label}: the weight of task {name!r} is {weight!r}; give a finite number above 0")
        if name in weights:
            weights[name] = number
    return torch.tensor([weights[task] for task in tasks], dtype=torch.float32)


def _read(path: Path, label: str) -> Mapping[str, float]:
    if table_ending(path) is not None and path.is_file():
        return _of_table(path, label)
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{label} cannot be read ({one_line(error)}); give a .csv, .yaml or .json file") from None
    if not isinstance(found, Mapping):
        raise InputError(
            f"{label} holds a {type(found).__name__}; give a mapping from tasks to weights, one `task: weight` a line"
        )
    return found


def _of_table(path: Path, label: str) -> Mapping[str, float]:
    table = read_file(path)
    for column in _COLUMNS:
        if column not in table.columns:
            raise InputError(f"{label} has no column {column!r}; give columns task and weight{nearest(column, table.columns)}")
    if len(twice := table["task"][table["task"].duplicated()]):
        raise InputError(f"{label} has the task {twice.iloc[0]!r} twice; give each once")
    return dict(zip(table["task"], table["weight"], strict=True))
