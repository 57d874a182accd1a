"""What the result of a run must have for the run to be read back, and whether it is of the documents at hand."""

from __future__ import annotations

import json
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import METRICS

# What metrics.json must have for a run to be read back.
_NEEDED = ("test_perplexity", "train_documents", "test_documents", "tasks")
_NEEDED_OF_TASK = ("test_perplexity", "base_test_perplexity")


def read_metrics(folder: RunFolder) -> dict[str, Any]:
    """What ``metrics.json`` holds.

    Raises:
        InputError: there is none, or it lacks something that every run writes.
    """
    metrics = folder.read_metrics()
    if missing := [name for name in _NEEDED if name not in metrics]:
        raise InputError(f"{folder.path / METRICS} has no {missing[0]!r}; run the fit again with --resume true")
    return metrics


def check_data(folder: RunFolder, data: TaskData, metrics: dict[str, Any], metadata: dict[str, str]) -> None:
    """Refuse data that are not those of the fit, as far as a run can tell."""
    found: dict[str, Any] = {"train_documents": data.train.num_documents, "test_documents": data.test.num_documents}
    for name, number in found.items():
        if number != metrics[name]:
            raise InputError(
                f"the run in {folder.path} had {metrics[name]} {name.replace('_', ' ')}, the data now give {number}; "
                "use the documents of the fit, or fit again"
            )
    try:
        tasks = json.loads(metadata["tasks"])
    except (KeyError, ValueError, RecursionError):
        tasks = None
    if tasks != data.tasks:
        raise InputError(f"the posterior in {folder.path} is of other tasks than its split.json; run the fit again")
    rows = metrics["tasks"].values()
    if [row["name"] for row in rows] != data.tasks:
        raise InputError(f"{folder.path / METRICS} is of other tasks than split.json; run the fit again with --resume true")
    for row in rows:
        if missing := [name for name in _NEEDED_OF_TASK if name not in row]:
            raise InputError(
                f"{folder.path / METRICS} has no {missing[0]!r} of task {row['name']!r}; run the fit again with --resume true"
            )


def stored_result(folder: RunFolder, data: TaskData) -> dict[str, Any] | None:
    """What ``metrics.json`` holds of a finished run whose result is whole and of these documents; None of any other run."""
    try:
        metrics = read_metrics(folder)
        folder.load_tensors("posterior")
        check_data(folder, data, metrics, folder.load_metadata("posterior"))
    except InputError:
        return None
    return metrics
