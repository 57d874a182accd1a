"""From a folder of PEFT adapters to a folder of pooled ones with tables: what ``scripts/pool_adapters.py`` does.

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
from bora_pyro.errors import InputError, nearest
from bora_pyro.exchange.load import PeftAdapter, read_peft
from bora_pyro.exchange.names import AdapterNames, write_task_names
from bora_pyro.exchange.pooling.pool import Pooled
from bora_pyro.exchange.save import CONFIG, write_peft
from bora_pyro.files.atomic import whole_folder, write_record
from bora_pyro.files.slugs import GLOBAL_MEAN

#: The file of a pooled folder that says how it was made.
POOLING = "pooling.json"


def read_adapters(folder: str | Path, tasks: Sequence[str] | None = None) -> dict[str, PeftAdapter]:
    """The adapters in the folders of a folder, by the folder's name.

    A folder ``global-mean`` and draws, ``<task>--draw-<k>``, as this library writes them, are no tasks and are passed over,
    unless they are named.

    Args:
        folder: where the PEFT folders lie.
        tasks: names of folders, or of the tasks in them (:mod:`bora_pyro.exchange.names`); default: all.

    Raises:
        InputError: no such folder, fewer than two adapters, or as for :func:`~bora_pyro.exchange.load.read_peft`.
    """
    folder, names = Path(folder), _folders(folder)
    own = adapter_names(folder)
    if tasks is None:
        tasks = own.folders
    else:
        found = {task: own.folder_of(task) or (task if task in names else None) for task in tasks}
        if unknown := [task for task in tasks if found[task] is None]:
            raise InputError(f"{folder} has no adapter {unknown[0]!r}, of {len(names)}{own.nearest(unknown[0])}")
        tasks = [place for place in found.values() if place is not None]
    if len(dict.fromkeys(tasks)) < 2:
        raise InputError(f"{folder} has {len(tasks)} adapters of tasks; give a folder with two or more folders with {CONFIG}")
    return {task: read_peft(folder / task) for task in dict.fromkeys(tasks)}


def adapter_names(folder: str | Path) -> AdapterNames:
    """The adapters of tasks in a folder, Θ and draws passed over, and the names of those tasks as far as they are known.

    Raises:
        InputError: no such folder, or as for :meth:`~bora_pyro.exchange.names.AdapterNames.read`.
    """
    return AdapterNames.read(folder, (name for name in _folders(folder) if name != GLOBAL_MEAN and "--draw-" not in name))


def _folders(folder: str | Path) -> list[str]:
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder; give one in which each adapter has a folder of its own")
    return sorted(entry.name for entry in Path(folder).iterdir() if (entry / CONFIG).is_file())


def read_documents(file: str, tasks: Sequence[str], names: AdapterNames | None = None) -> list[float]:
    """N_d of each task from a table with the columns ``task`` and ``documents``; other rows are passed over.

    Args:
        file: the table.
        tasks: names of the adapters' folders.
        names: what is known of the tasks in them; a row may have the name of the task or of its folder.

    Raises:
        InputError: the table cannot be read, lacks a column or a task, names one twice, or has a number that is not positive.
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
            raise InputError(f"{file} names the task {task!r} twice; give each one row")
        if not 0 < number < math.inf:
            raise InputError(f"{file} has no positive number of documents of the task {task!r}")
        found[task] = float(number)
    if missing := [task for task in tasks if task not in found]:
        raise InputError(f"{file} has no row of the task {missing[0]!r}{nearest(missing[0], given)}")
    return [found[task] for task in tasks]


def group_table(pooled: Pooled) -> pd.DataFrame:
    """A row a group: entries, the frame's rank, spread, τ, h, and the shrinkage of the tasks."""
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
    """A row a task: documents, shrinkage by group, distance from Θ before and after, what the cut to a low rank has lost."""
    before, after = pooled.distances
    shrinkages: dict[str, Tensor] = {f"shrinkage_{name}": found.shrinkage for name, found in pooled.groups.items()}
    return pd.DataFrame(
        {
            "task": pooled.tasks,
            **({} if documents is None else {"documents": list(documents)}),
            "rank": [one.rank for one in pooled.adapters.values()],
            "distance": before.numpy(),
            "distance_shrunk": after.numpy(),
            "relative_error": pooled.lost.numpy(),
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
    """Write the shrunk adapters, Θ, and the tables, as one folder that appears when all of it is written.

    Args:
        output_dir: the folder to make: ``<task>/``, ``global-mean/``, ``groups.csv``, ``tasks.csv`` and ``pooling.json``.
        pooled: what :func:`~bora_pyro.exchange.pooling.pool.pool` has given.
        options: how it was made, for ``pooling.json``.
        documents: N_d, for ``tasks.csv``.
        names: what is known of the tasks' names; where something is, it goes to ``tasks.json``.
        base_model: what the adapters call their base; default: the name that it was loaded by.
        overwrite: replace an earlier result.

    Raises:
        InputError: the folder is taken or cannot be written, or a task is called as Θ's folder is.
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
            "global_mean_relative_error": pooled.mean_lost,
        }
        write_record(aside, POOLING, content)
    return Path(output_dir)


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """Numbers as JSON has them: infinity as the command line takes it, what is not known as null."""
    shown: dict[str, Any] = {}
    for name, value in row.items():
        number = isinstance(value, float)
        shown[str(name)] = None if value is None or (number and math.isnan(value)) else "inf" if value == math.inf else value
    return shown
