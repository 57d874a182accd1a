"""Task weights: a factor for the log-likelihood of each task.

>>> task_weights({"Ada": 2.0}, ["Ada", "Bo"])
tensor([2., 1.])
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bora_pyro.data.files import one_line, read_file, table_ending
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.files.regular import read_regular
from bora_pyro.files.safe_yaml import YamlError, parse_mapping

#: The largest .yaml or .json file of weights, in bytes. A million tasks take some 16 MiB. A table may be larger.
MAX_BYTES = 2**25
_COLUMNS = ("task", "weight")


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
    for task, weight in (given if isinstance(given, Mapping) else _read(Path(given).expanduser(), label)).items():
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


def _read(path: Path, label: str) -> Mapping[str, float]:
    if table_ending(path) not in (None, ".json") and path.is_file():
        return _read_weight_table(path, label)
    try:
        raw = read_regular(path, most=MAX_BYTES)
        if path.suffix.lower() != ".json":
            found = parse_mapping(raw, as_text=True, most=MAX_BYTES)
        else:
            found = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except YamlError as error:
        line = f", line {error.line}" if error.line else ""
        raise InputError(f"{label}{line}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{label} cannot be read ({one_line(error)}); give a .csv, .yaml or .json file") from None
    if not isinstance(found, Mapping):
        raise InputError(f"{label} holds a {type(found).__name__}; give a mapping from tasks to weights")
    if not found:
        raise InputError(f"{label} holds no weights; give one `task: weight` a line, or leave it out")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from JSON without repeated keys; Python's reader would silently take the last value."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _read_weight_table(path: Path, label: str) -> Mapping[str, float]:
    table = read_file(path)
    for column in _COLUMNS:
        if column not in table.columns:
            raise InputError(f"{label} has no column {column!r}; give columns task and weight{nearest(column, table.columns)}")
    tasks = table["task"].map(str)  # 8 and "8" are the same task
    if len(twice := tasks[tasks.duplicated()]):
        raise InputError(f"{label} has the task {shown(twice.iloc[0])} twice; give each once")
    return dict(zip(tasks, table["weight"], strict=True))
