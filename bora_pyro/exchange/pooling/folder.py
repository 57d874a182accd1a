"""Reading of a folder of PEFT adapters to pool, and writing of a folder with the pooled adapters and tables.

>>> from bora_pyro.exchange.pooling.hierarchy import FixedShrinkage
>>> from bora_pyro.exchange.pooling.pool import pool
>>> adapters = read_adapters("adapters")  # doctest: +SKIP
>>> write_pooled("pooled", pool(adapters, backbone, FixedShrinkage(0.3)))  # doctest: +SKIP
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from bora_pyro.data.files import read_file
from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.exchange.load import PeftAdapter, read_peft
from bora_pyro.exchange.names import AdapterNames, write_task_names
from bora_pyro.exchange.pooling.pool import Pooled
from bora_pyro.exchange.save import CONFIG, write_peft
from bora_pyro.files.atomic import whole_folder, write_record
from bora_pyro.files.slugs import GLOBAL_MEAN

#: The file in a folder of pooled adapters with the options and the results of the pooling.
POOLING = "pooling.json"


def read_adapters(folder: str | Path, tasks: Sequence[str] | None = None, *, least: int = 2) -> dict[str, PeftAdapter]:
    """Read the adapters in the subfolders of a folder.

    Subfolders that are not adapters of a task (``global-mean`` and draws ``<task>--draw-<k>``, as this library writes them) are
    ignored unless they are named.

    Args:
        folder: the folder that contains the PEFT folders.
        tasks: names of folders or of tasks (:mod:`bora_pyro.exchange.names`); default: all tasks.
        least: the least number of adapters, one or two.

    Returns:
        The adapters, by name of their folder.

    Raises:
        InputError: if there is no such folder, it has fewer adapters, or as for
            :func:`~bora_pyro.exchange.load.read_peft`.
    """
    folder, names = Path(folder), _folders(folder)
    own = adapter_names(folder)
    if tasks is None:
        tasks = own.folders
    else:
        found = {task: own.folder_of(task) or (task if task in names else None) for task in tasks}
        if unknown := [task for task in tasks if found[task] is None]:
            raise InputError(f"{folder} has no adapter {unknown[0]!r}, of {len(names)}{own.nearest(unknown[0])}")
        tasks = [name for name in found.values() if name is not None]
    if len(dict.fromkeys(tasks)) < least:
        number = "one or more" if least == 1 else "two or more"
        raise InputError(f"{folder} has {len(tasks)} adapters of tasks; give a folder with {number} folders with {CONFIG}")
    return {task: read_peft(folder / task) for task in dict.fromkeys(tasks)}


def adapter_names(folder: str | Path) -> AdapterNames:
    """The adapter folders in a folder, without Θ and draws, and the names of their tasks if known.

    Raises:
        InputError: if there is no such folder, or as for :meth:`~bora_pyro.exchange.names.AdapterNames.read`.
    """
    return AdapterNames.read(folder, (name for name in _folders(folder) if name != GLOBAL_MEAN and "--draw-" not in name))


def _folders(folder: str | Path) -> list[str]:
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder; give one in which each adapter has a folder of its own")
    return sorted(entry.name for entry in Path(folder).iterdir() if (entry / CONFIG).is_file())


def read_documents(file: str, tasks: Sequence[str], names: AdapterNames | None = None) -> list[float]:
    """Read N_d of each task from a table with the columns ``task`` and ``documents``. Rows of other tasks are ignored.

    Args:
        file: the table.
        tasks: names of the adapters' folders.
        names: the names of the tasks in these folders, if known. The table may use the name of a task or of its folder.

    Raises:
        InputError: if the table cannot be read, lacks a column or a task, has a task twice, or has a number that is not
            positive.
    """
    table = read_file(Path(file))
    for column in ("task", "documents"):
        if column not in table.columns:
            raise InputError(f"{file} has no column {column!r}; it has {', '.join(map(str, table.columns))}")
    given = table["task"].astype(str)
    folders = (names or AdapterNames(tuple(tasks))).folders_of(given, among=tasks)
    numbers = pd.to_numeric(table["documents"], errors="coerce")
    found: dict[str, float] = {}
    for name, number in zip(given, numbers, strict=True):
        if (task := folders[name]) is None or task not in tasks:
            continue
        if task in found:
            raise InputError(f"{file} names the task {shown(task)} twice; give each one row")
        if not 0 < number < math.inf:
            raise InputError(f"{file} has no positive number of documents of the task {shown(task)}")
        found[task] = float(number)
    if missing := [task for task in tasks if task not in found]:
        raise InputError(f"{file} has no row of the task {missing[0]!r}{nearest(missing[0], given)}")
    return [found[task] for task in tasks]


def group_table(pooled: Pooled) -> pd.DataFrame:
    """One row per group: entries, rank of the frame, standard deviation, τ, h, and the least, mean and largest shrinkage."""
    return pd.DataFrame(
        [
            {
                "group": name,
                "entries": found.entries,
                "frame_rank": max(pooled.frames[name]) if pooled.frames else None,
                "standard_deviation": found.variance**0.5,
                "tau": found.tau,
                "information": found.information,
                "least_shrinkage": float(found.shrinkage.min()),
                "mean_shrinkage": float(found.shrinkage.mean()),
                "most_shrinkage": float(found.shrinkage.max()),
            }
            for name, found in pooled.groups.items()
        ]
    )


def task_table(pooled: Pooled, documents: Sequence[float] | None = None) -> pd.DataFrame:
    """One row per task: documents, rank, distance from Θ before and after shrinkage, truncation error, shrinkage by group."""
    before, after = pooled.distances
    shrinkages: dict[str, Tensor] = {f"shrinkage_{name}": found.shrinkage for name, found in pooled.groups.items()}
    return pd.DataFrame(
        {
            "task": pooled.tasks,
            **({} if documents is None else {"documents": list(documents)}),
            "rank": [one.rank for one in pooled.adapters.values()],
            "distance": before.numpy(),
            "distance_shrunk": after.numpy(),
            "relative_error": pooled.relative_error.numpy(),
            **{name: value.numpy() for name, value in shrinkages.items()},
        }
    )


def write_pooled(
    output_dir: str | Path,
    pooled: Pooled,
    *,
    options: dict[str, Any] | None = None,
    documents: Sequence[float] | None = None,
    names: AdapterNames | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the shrunk adapters, Θ and the tables to one folder, which is created only when all of it is complete.

    Args:
        output_dir: the folder to make, with ``<task>/``, ``global-mean/``, ``groups.csv``, ``tasks.csv`` and ``pooling.json``.
        pooled: the result of :func:`~bora_pyro.exchange.pooling.pool.pool`.
        options: the options of the pooling, for ``pooling.json``.
        documents: N_d of each task, for ``tasks.csv``.
        names: the names of the tasks, for ``tasks.json``, which is written if any name is known.
        base_model: the name of the base in the adapters; default: the name that the base was loaded by.
        overwrite: whether to replace an earlier result.

    Raises:
        InputError: if the folder exists or cannot be written, or a task has the name of Θ's folder.
    """
    if GLOBAL_MEAN in pooled.tasks:
        raise InputError(f"a task is called {GLOBAL_MEAN!r}, which is the folder of Θ; rename its folder")
    groups, tasks = group_table(pooled), task_table(pooled, documents)
    with whole_folder(output_dir, record=POOLING, overwrite=overwrite) as aside:
        for name, factors in {**pooled.factors, GLOBAL_MEAN: pooled.mean}.items():
            write_peft(aside / name, pooled.backbone, factors, alpha=pooled.alpha, base_model=base_model)
        known = {} if names is None else {folder: names.tasks[folder] for folder in pooled.tasks if folder in names.tasks}
        if known:
            write_task_names(aside, known)
        groups.to_csv(aside / "groups.csv", index=False)
        tasks.to_csv(aside / "tasks.csv", index=False)
        content = {
            "options": options or {},
            "groups": {row.pop("group"): _plain(row) for row in groups.to_dict("records")},
            "tasks": {row.pop("task"): _plain(row) for row in tasks.to_dict("records")},
            "global_mean_relative_error": pooled.mean_relative_error,
        }
        write_record(aside, POOLING, content)
    return Path(output_dir)


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """The values of a row for JSON: infinity as "inf", which the command line reads, and unknown values as null."""
    shown: dict[str, Any] = {}
    for name, value in row.items():
        number = isinstance(value, float)
        shown[str(name)] = None if value is None or (number and math.isnan(value)) else "inf" if value == math.inf else value
    return shown
