"""Checks of a finished run before it is read back: the result is complete, and the data are those of the fit."""

from __future__ import annotations

import json
from typing import Any

from bora_pyro.data import TaskData
from bora_pyro.errors import InputError
from bora_pyro.files.slugs import GLOBAL_MEAN
from bora_pyro.likelihoods import measure_of
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.layout import ADAPTERS, METRICS, NUM_CLIENTS

# Names that metrics.json must have, besides the measure of the test documents.
_NEEDED = ("train_documents", "test_documents", "tasks")


def read_metrics(folder: RunFolder) -> dict[str, Any]:
    """Read ``metrics.json`` and check that it is complete.

    Raises:
        InputError: the file is missing, or lacks a name that every run writes.
    """
    if NUM_CLIENTS in folder.read_config():
        raise InputError(
            f"the run in {folder.path} is that of a federated server, which has no tasks; its {ADAPTERS}/{GLOBAL_MEAN} is a PEFT "
            "folder, and the run folders of the clients have the tasks"
        )
    metrics = folder.read_metrics()
    if missing := [name for name in (f"test_{measure_of(metrics).name}", *_NEEDED) if name not in metrics]:
        raise InputError(f"{folder.path / METRICS} has no {missing[0]!r}; run the fit again with --resume true")
    return metrics


def check_data(folder: RunFolder, data: TaskData, metrics: dict[str, Any], metadata: dict[str, str]) -> None:
    """Check that data are those of the fit, by the numbers of documents and the names of the tasks.

    Args:
        folder: the run folder.
        data: the data that were loaded now.
        metrics: content of ``metrics.json``.
        metadata: metadata of ``posterior.safetensors``.

    Raises:
        InputError: the data differ from those of the fit, or the files of the run contradict each other.
    """
    for name, split in (("train_documents", data.train), ("test_documents", data.test)):
        number = split.num_documents
        if metrics[name] not in (number, len(split)):  # older versions counted the pieces of long documents
            raise InputError(
                f"the run in {folder.path} had {metrics[name]} {name.replace('_', ' ')}, but the data now have {number}; "
                "use the documents of the fit, or fit again"
            )
    try:
        tasks = json.loads(metadata["tasks"])
    except (KeyError, ValueError, RecursionError):
        tasks = None
    if tasks != data.tasks:
        raise InputError(f"the posterior in {folder.path} has other tasks than its split.json; run the fit again")
    rows = metrics["tasks"].values()
    if [row["name"] for row in rows] != data.tasks:
        raise InputError(f"{folder.path / METRICS} has other tasks than split.json; run the fit again with --resume true")
    measure = measure_of(metrics).name
    for row in rows:
        if missing := [name for name in (f"test_{measure}", f"base_test_{measure}") if name not in row]:
            raise InputError(
                f"{folder.path / METRICS} has no {missing[0]!r} of task {row['name']!r}; run the fit again with --resume true"
            )


def stored_result(folder: RunFolder, data: TaskData) -> dict[str, Any] | None:
    """Content of ``metrics.json`` of a finished run, if its result is complete and belongs to these data; otherwise None."""
    try:
        metrics = read_metrics(folder)
        folder.load_tensors("posterior")
        check_data(folder, data, metrics, folder.load_metadata("posterior"))
    except InputError:
        return None
    return metrics
